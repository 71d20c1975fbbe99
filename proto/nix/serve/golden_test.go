package serve

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"nixdispatch/proto/nix/wire"
)

// TestGoldenPathInfos reads Nix's own test vector out of the source tree that
// NIX_DISPATCH_NIX_SOURCE names.
func TestGoldenPathInfos(t *testing.T) {
	dir := os.Getenv("NIX_DISPATCH_NIX_SOURCE")
	if dir == "" {
		t.Skip("NIX_DISPATCH_NIX_SOURCE names no Nix source tree")
	}
	name := filepath.Join(dir, "src/libstore-tests/data/serve-protocol/unkeyed-valid-path-info-2.4")
	data, err := os.ReadFile(name + ".bin")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	var want []struct {
		Deriver    string
		NarSize    uint64
		References []string
		Signatures []any
		CA         any
	}
	if err := json.Unmarshal(text, &want); err != nil || len(want) == 0 {
		t.Fatal(len(want), err)
	}
	r := wire.NewReader(bytes.NewReader(data))
	for i, w := range want {
		got := readPathInfo(r, "")
		if r.Err() != nil || got.Deriver.Base() != w.Deriver || got.NarSize != w.NarSize ||
			len(got.References) != len(w.References) || len(got.Sigs) != len(w.Signatures) || (got.CA != "") != (w.CA != nil) {
			t.Errorf("info %d = %+v, %v; want %+v", i, got, r.Err(), w)
		}
	}
}
