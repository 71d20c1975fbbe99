package buildhook

// FindStock finds Nix's own build hook, as the hook does when it has to leave
// builds to it.
func FindStock() (string, error) { return findStockHook() }
