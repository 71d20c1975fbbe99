package daemon

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Groups that are not in /etc/group are those that getent(1) knows.
func TestGroupsOfOtherNameServices(t *testing.T) { // not parallel: it has a PATH of its own
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	getent := func(text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "getent.new"), []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "getent.new"), filepath.Join(dir, "getent")); err != nil {
			t.Fatal(err)
		}
	}
	const name = "builders@example.org"
	var log bytes.Buffer
	table := newGroupTable(slog.New(slog.NewTextHandler(&log, nil)), name, "", "root")
	member := caller{uid: 4711, gid: 4711, groups: []uint32{1, 70001}}
	for _, tt := range []struct {
		what, script string
		gid          uint32
		ok           bool
		warned       string
	}{
		{"there is no getent", "", 0, false, "executable file not found"},
		{"nobody knows it", "exit 2", 0, false, ""},
		{"it is there", `[ "$*" = "group -- ` + name + `" ] || exit 1; echo '` + name + `:*:70001:alice,bob'`, 70001, true, ""},
		{"the server is away", "exit 1", 70001, true, "exit status 1"},
		{"it is another", "echo '" + name + ":*:70002:'", 70002, true, ""},
		{"nonsense", "echo 'root:x:0:'", 70002, true, "getent printed"},
		{"it is gone", "exit 2", 0, false, ""},
		{"a number that is none", "echo '" + name + ":*:-1:'", 0, false, ""}, // said once until it is known again
	} {
		log.Reset()
		if tt.script != "" {
			getent(tt.script)
		}
		table.refresh(t.Context())
		gid, ok := table.gid(name)
		if gid != tt.gid || ok != tt.ok {
			t.Errorf("%s: the group is %d, %v; want %d, %v", tt.what, gid, ok, tt.gid, tt.ok)
		}
		g := gate{own: 1, group: name, groups: table}
		if got, want := g.allows(member), tt.gid == 70001; got != want {
			t.Errorf("%s: the member is let in: %v, want %v", tt.what, got, want)
		}
		if !strings.Contains(log.String(), tt.warned) || (log.Len() > 0) != (tt.warned != "") {
			t.Errorf("%s: the log has %q, want %q", tt.what, log.String(), tt.warned)
		}
	}
	// What is in the file is not asked for.
	getent("echo root:x:4711:")
	table.refresh(t.Context())
	if gid, ok := table.gid("root"); gid != 0 || !ok {
		t.Errorf("the group root is %d, %v", gid, ok)
	}
}

func FuzzParseGroupLine(f *testing.F) {
	f.Add("a:x:1:b,c", "a")
	f.Add("a:x:4294967296:", "a")
	f.Add("::", "")
	f.Fuzz(func(t *testing.T, line, name string) {
		if _, err := parseGroupLine(line, name); err == nil && !strings.HasPrefix(line, name+":") {
			t.Errorf("%q was taken for the group %q", line, name)
		}
	})
}
