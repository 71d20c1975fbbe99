package nix

// SystemName is Nix's name of the system a Go program was built for, such as
// "x86_64-linux" of ("linux", "amd64"): what Nix takes for the local system
// where the setting "system" does not say otherwise.
func SystemName(goos, goarch string) string {
	cpus := map[string]string{
		"amd64": "x86_64", "386": "i686", "arm64": "aarch64", "arm": "armv7l",
		"ppc64le": "powerpc64le", "loong64": "loongarch64",
		"mipsle": "mipsel", "mips64le": "mips64el",
	}
	cpu, ok := cpus[goarch]
	if !ok {
		cpu = goarch // riscv64, s390x and others have one name
	}
	return cpu + "-" + goos
}
