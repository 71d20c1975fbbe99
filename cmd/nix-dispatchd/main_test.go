package main

import (
	"bytes"
	"io"
	"strings"
	"testing"
)

func TestListComesFromNixUnlessGiven(t *testing.T) {
	for _, tt := range []struct {
		args    []string
		fromNix bool
		want    string
	}{
		{nil, true, ""},
		{[]string{"--builders", "ssh://mac"}, false, "ssh://mac"},
		{[]string{"--builders="}, false, ""},
	} {
		opts, _, err := parse(tt.args, io.Discard)
		if err != nil || (opts.NixConf != nil) != tt.fromNix || opts.Builders != tt.want {
			t.Errorf("parse(%q) = builders %q, from Nix %v, %v", tt.args, opts.Builders, opts.NixConf != nil, err)
		}
	}
}

func TestUsageNamesEveryFlag(t *testing.T) {
	var out bytes.Buffer
	if code := run(t.Context(), []string{"--help"}, signals{}, &out, io.Discard); code != 0 {
		t.Errorf("--help exits with %d", code)
	}
	for _, word := range []string{"--builders", "--machines-group", "--socket", "--state-dir", "--metrics-listen", "--machine-wait", "--log-level", "HUP", "Example"} {
		if !strings.Contains(out.String(), word) {
			t.Errorf("--help says nothing of %s", word)
		}
	}
	if code := run(t.Context(), []string{"surplus"}, signals{}, &out, io.Discard); code != 2 {
		t.Errorf("a surplus argument exits with %d, want 2", code)
	}
}
