package main

import (
	"bytes"
	"io"
	"log/slog"
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

func TestUsage(t *testing.T) {
	var out bytes.Buffer
	if code := run(t.Context(), []string{"--help"}, signals{}, &out, io.Discard); code != 0 {
		t.Errorf("--help exits with %d", code)
	}
	for _, want := range []string{
		"Usage: nix-dispatchd [OPTION]...\n       nix-dispatchd probe [OPTION]... URI\n",
		"\n  --socket PATH           ", "(default 127.0.0.1:9747)", "(default 5m)", "\n  --log-level LEVEL       ", "\n  HUP ", "\nExamples:\n  nix-dispatchd\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("--help does not say %q:\n%s", want, out.String())
		}
	}
	for _, args := range [][]string{{"surplus"}, {"probe"}, {"probe", "a", "b"}, {"--machine-wait", "0s"}, {"--hedge", "maybe"}} {
		if code := run(t.Context(), args, signals{}, io.Discard, io.Discard); code != 2 {
			t.Errorf("%q exits with %d, want 2", args, code)
		}
	}
}

func TestJournalGetsPriorities(t *testing.T) {
	t.Setenv("JOURNAL_STREAM", "8:1")
	var out bytes.Buffer
	log := newLogger(&out, slog.LevelDebug)
	log.Debug("d")
	log.Info("i", "level", "ERROR")
	log.With("machine", "m").Warn("w\nlevel=ERROR")
	log.Error("e")
	want := "<7>level=DEBUG msg=d\n<6>level=INFO msg=i level=ERROR\n<4>level=WARN msg=\"w\\nlevel=ERROR\" machine=m\n<3>level=ERROR msg=e\n"
	if out.String() != want {
		t.Errorf("got:\n%swant:\n%s", out.String(), want)
	}
}
