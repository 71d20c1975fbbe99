package nixos

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// needNix skips a test where there is no Nix, or fails it if CI or
// NIX_DISPATCH_REQUIRE_FLEET is set.
func needNix(t *testing.T) {
	t.Helper()
	_, err := exec.LookPath("nix-instantiate")
	switch {
	case err == nil:
	case os.Getenv("CI") != "" || os.Getenv("NIX_DISPATCH_REQUIRE_FLEET") != "":
		t.Fatal(err)
	default:
		t.Skip(err)
	}
}

// eval evaluates the module with what a configuration.nix says.
func eval(t *testing.T, settings string) (config map[string]any, goPackage map[string]any) {
	t.Helper()
	needNix(t)
	cmd := exec.Command("nix-instantiate", "--eval", "--strict", "--json", "--store", "dummy://", "testdata/eval.nix", "--arg", "settings", settings)
	cmd.Env = append(os.Environ(), "NIX_STATE_DIR="+t.TempDir())
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("nix-instantiate: %v\n%s", err, stderr.String())
	}
	var result struct{ Config, Package map[string]any }
	if err := json.Unmarshal(out, &result); err != nil {
		t.Fatal(err)
	}
	return result.Config, result.Package
}

// at is what stands at a path of names.
func at(config map[string]any, names ...string) any {
	var v any = config
	for _, name := range names {
		set, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = set[name]
	}
	return v
}

func TestModule(t *testing.T) {
	t.Parallel()
	if config, _ := eval(t, "{ }"); len(config) > 0 {
		t.Errorf("when it is off it sets %v", config)
	}
	config, _ := eval(t, `{ services.nix-dispatch = { enable = true; extraArgs = [ "--machine-wait" "15m" ]; }; nix.distributedBuilds = true; }`)
	const setting = "build-hook = /nix/store/0-nix-dispatch/bin/nix-dispatch-hook"
	for _, tt := range []struct {
		path []string
		want any
	}{
		{[]string{"warnings"}, []any{}},
		{[]string{"systemd", "services", "nix-daemon"}, map[string]any{"environment": map[string]any{"NIX_CONFIG": setting}}},
		{[]string{"environment", "etc"}, map[string]any{"nix-dispatch/nix.conf": map[string]any{"text": setting + "\n"}}},
		{[]string{"systemd", "services", "nix-dispatchd", "serviceConfig"}, map[string]any{"ExecStart": []any{"", "/nix/store/0-nix-dispatch/bin/nix-dispatchd '--machine-wait' '15m'"}}},
		{[]string{"systemd", "services", "nix-dispatchd", "path"}, []any{"/nix/store/0-getent", "/nix/store/0-nix", "/nix/store/0-openssh"}},
		{[]string{"systemd", "sockets", "nix-dispatchd", "wantedBy"}, []any{"sockets.target"}},
		{[]string{"systemd", "packages"}, []any{"/nix/store/0-nix-dispatch"}},
		{[]string{"users", "groups"}, map[string]any{"nix-dispatch": map[string]any{}}},
	} {
		if diff := cmp.Diff(tt.want, at(config, tt.path...)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", strings.Join(tt.path, "."), diff)
		}
	}
	// It leaves the machines, the rest of Nix's settings and the network alone.
	for name := range config {
		if !slices.Contains([]string{"warnings", "environment", "users", "systemd"}, name) {
			t.Errorf("it sets %s", name)
		}
	}

	config, _ = eval(t, `{ services.nix-dispatch = { enable = true; buildsOnThisHost = true; }; }`)
	if warnings, _ := at(config, "warnings").([]any); len(warnings) != 1 || !strings.Contains(warnings[0].(string), "no machines") {
		t.Errorf("without nix.distributedBuilds it warns %q", warnings)
	}
	const example = "share/doc/nix-dispatch/examples/builds-on-this-host.conf"
	if got := at(config, "environment", "etc", "systemd/system/nix-dispatchd.service.d/builds-on-this-host.conf", "source"); got != "/nix/store/0-nix-dispatch/"+example {
		t.Errorf("buildsOnThisHost: %v", got)
	}
	if script, err := os.ReadFile("../install.sh"); err != nil || !strings.Contains(string(script), "share/doc/nix-dispatch/examples/$example") || !strings.Contains(string(script), "builds-on-this-host.conf") {
		t.Errorf("the package does not install %s: %v", example, err)
	}
}

func TestModuleRefusesWrongTypes(t *testing.T) {
	t.Parallel()
	needNix(t)
	for _, settings := range []string{`{ services.nix-dispatch.enable = "yes"; }`, `{ services.nix-dispatch.port = 1; }`} {
		cmd := exec.Command("nix-instantiate", "--eval", "--strict", "--store", "dummy://", "testdata/eval.nix", "--arg", "settings", settings)
		cmd.Env = append(os.Environ(), "NIX_STATE_DIR="+t.TempDir())
		if out, err := cmd.CombinedOutput(); err == nil {
			t.Errorf("%s evaluates: %s", settings, out)
		}
	}
}

func TestPackageBuildsEveryProgram(t *testing.T) {
	t.Parallel()
	_, goPackage := eval(t, `{ services.nix-dispatch.enable = true; }`)
	var want []any
	mains, _ := filepath.Glob("../../cmd/*/main.go")
	for _, main := range mains {
		want = append(want, "cmd/"+filepath.Base(filepath.Dir(main)))
	}
	got, _ := goPackage["subPackages"].([]any)
	less := func(a, b any) int { return strings.Compare(a.(string), b.(string)) }
	slices.SortFunc(got, less)
	slices.SortFunc(want, less)
	if diff := cmp.Diff(want, got); diff != "" || len(want) == 0 {
		t.Errorf("subPackages (-want +got):\n%s", diff)
	}
}

// TestVendorHash makes what buildGoModule makes of go.mod, and compares the hash.
func TestVendorHash(t *testing.T) {
	t.Parallel()
	needNix(t)
	text, err := os.ReadFile("package.nix")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`vendorHash = "(sha256-[^"]*)"`).FindSubmatch(text)
	if m == nil {
		t.Fatal("package.nix has no vendorHash")
	}
	vendor := filepath.Join(t.TempDir(), "vendor")
	if out, err := exec.Command("go", "mod", "vendor", "-o", vendor).CombinedOutput(); err != nil {
		t.Fatalf("go mod vendor: %v\n%s", err, out)
	}
	out, err := exec.Command("nix", "--extra-experimental-features", "nix-command", "hash", "path", vendor).Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(out)); got != string(m[1]) {
		t.Errorf("go.mod has changed: set vendorHash = %q in package.nix", got)
	}
}
