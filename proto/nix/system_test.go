package nix

import "testing"

func TestSystemName(t *testing.T) {
	for _, tt := range []struct{ goos, goarch, want string }{
		{"linux", "amd64", "x86_64-linux"},
		{"linux", "arm64", "aarch64-linux"},
		{"darwin", "arm64", "aarch64-darwin"},
		{"linux", "386", "i686-linux"},
		{"linux", "riscv64", "riscv64-linux"},
	} {
		if got := SystemName(tt.goos, tt.goarch); got != tt.want {
			t.Errorf("SystemName(%q, %q) = %q, want %q", tt.goos, tt.goarch, got, tt.want)
		}
	}
}
