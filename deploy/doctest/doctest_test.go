package doctest

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const page = "# Title\n" +
	"* item\n\n    goes on\n\n" +
	"Text with `nix-dispatch status` and\n`--json`.\n\n" +
	"```console\n# nix-dispatch status\nMACHINE  STATE\n\n$ echo a \\\n  b\na b\n```\n" +
	"```sh\nmake build\nmake install\n```\n" +
	"```text\n# no command\n```\n"

func TestCommandsOfAPage(t *testing.T) {
	blocks, err := Blocks("p.md", page)
	if err != nil {
		t.Fatal(err)
	}
	var got []Command
	for _, b := range blocks {
		commands, err := b.Commands()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, commands...)
	}
	want := []Command{
		{"p.md", 10, "root", "nix-dispatch status\n", "MACHINE  STATE\n\n"},
		{"p.md", 13, "alice", "echo a \\\n  b\n", "a b\n"},
		{"p.md", 18, "root", "make build\nmake install\n", ""},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("commands (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]int{"nix-dispatch status": 6, "--json": 7}, Spans(page)); diff != "" {
		t.Errorf("spans (-want +got):\n%s", diff)
	}
}

func TestPagesThatCannotBeTested(t *testing.T) {
	for text, want := range map[string]string{
		"a\n\n    make test\n":            "p.md:3: code block by indentation",
		"```\nmake test\n```\n":           `p.md:1: code block of ""`,
		"```bash\nmake test\n```\n":       `p.md:1: code block of "bash"`,
		"```text\nmake test\n```\n":       "p.md:2: a command in a block of text",
		"```sh\nmake test\n":              "p.md:2: the code block has no end",
		"```console\nmake test\n```\n":    "p.md:2: output before the first command",
		"\n\n```console\n```\n":           "p.md:4: a console without a command",
		"```console\n#make test\n```\n\n": "p.md:2: output before the first command",
	} {
		blocks, err := Blocks("p.md", text)
		for _, b := range blocks {
			if err == nil {
				_, err = b.Commands()
			}
		}
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: error %v, want %q", text, err, want)
		}
	}
}

func TestMatch(t *testing.T) {
	const printed = `MACHINE    STATE  RUNNING
ssh://mac  up     3 of 12
/nix/store/bp1rl5y8azrx194sdrplfw7klynxr30v-a.drv since 2026-11-22 14:03:11, 246.0 ms
`
	for sample, ok := range map[string]bool{
		printed:                 true,
		"ssh://mac up 0 of 4\n": true,
		"ssh://mac down 0 of 4": false,
		"ssh://mac up 0 of 4\n...\n/nix/store/00000000000000000000000000000000-a.drv since 2020-01-01 00:00:00, 1 s": true,
		"ssh://mac ... of 4": true,
		"ssh://mac ... on 4": false,
		"...":                true,
		"ssh://mac":          false,
		"ssh://mac  up     3 of 12\nMACHINE    STATE  RUNNING\n": false,
	} {
		if _, err := Match(sample, printed); (err == nil) != ok {
			t.Errorf("%q: %v", sample, err)
		}
	}
}

func TestNumbersOfBuilds(t *testing.T) {
	numbers, err := Match("BUILD  PHASE\n2  building  1 s\n3\n", "BUILD  PHASE\n14     building  0s\n15\n")
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"nix-dispatch log 2\n":                    "nix-dispatch log 14",
		"nix-dispatch attach -L --out-link r 3\n": "nix-dispatch attach -L --out-link r 15",
		"nix-dispatch cancel 4\n":                 "nix-dispatch cancel 4",
		"nix-dispatch build --priority 3 x.drv\n": "nix-dispatch build --priority 3 x.drv\n",
	} {
		if got := (Command{Text: text}).With(numbers).Text; got != want {
			t.Errorf("%q became %q, want %q", text, got, want)
		}
	}
}
