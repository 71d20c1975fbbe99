package doctest

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/api.md anew")

func TestAPIPage(t *testing.T) {
	proto, err := os.ReadFile(filepath.Join(root, "proto/dispatch/v1/dispatch.proto"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := API(string(proto))
	if err != nil {
		t.Fatal(err)
	}
	page := filepath.Join(root, "docs/api.md")
	if *update {
		if err := os.WriteFile(page, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(page); err != nil || string(got) != want {
		t.Errorf("docs/api.md is not what dispatch.proto says (%v): go test ./deploy/doctest -run TestAPIPage -update", err)
	}
}

func TestAPIOfFormsItDoesNotKnow(t *testing.T) {
	for _, proto := range []string{"message A {\n  map<string, string> m = 1;\n}\n", "string loose = 1;\n"} {
		if page, err := API(proto); err == nil || !strings.Contains(err.Error(), "dispatch.proto:") {
			t.Errorf("%q became %q, %v", proto, page, err)
		}
	}
}
