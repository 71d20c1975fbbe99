package main

import (
	"flag"
	"os"
	"path/filepath"
	"strings"

	"nixdispatch/proto/nix"
)

// storeFlag registers --store, with Nix's own default.
func storeFlag(flags *flag.FlagSet, uri *string) {
	*uri = os.Getenv("NIX_REMOTE")
	flags.Func("store", "the store of this host that it is about, a `URI` or a directory as in Nix; a daemon of your own serves others than its own", func(s string) error {
		if isPath := strings.Contains(s, "/") && !strings.Contains(s, "://"); isPath && !filepath.IsAbs(s) {
			path, query, hasQuery := strings.Cut(s, "?")
			abs, err := filepath.Abs(path)
			if err != nil {
				return err
			}
			if s = abs; hasQuery {
				s += "?" + query
			}
		}
		*uri = s
		return nil
	})
}

// storeEnvironment says what else tells where the store is.
func storeEnvironment() []string { return nix.StoreEnvironment(os.Getenv) }
