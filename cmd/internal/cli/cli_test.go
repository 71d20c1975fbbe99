package cli

import (
	"bytes"
	"errors"
	"flag"
	"slices"
	"strings"
	"testing"
	"time"
)

// example describes a program with everything a description can have.
func example() *Command {
	build := &Command{
		Name: "build", Args: "DRV...", Summary: "build things", Flags: NewFlags("build"),
		About: "Builds things, well.\n\nAnd 'more'.\n\nExamples:\n  x build -L a.drv\n  x build ~/b\\c.drv\n\nExit status: 0 all is well.",
	}
	build.Flags.Bool("logs", false, "show logs; all of them")
	Alias(build.Flags, "L", "logs")
	build.Flags.Duration("wait", 10*time.Minute, "wait for so long, a `TIME`")
	build.Flags.String("out-link", "", "make `PATH` a link")
	build.Flags.String("machine", "", "only the machine with this `URI`, "+strings.Repeat("and so on ", 10))
	check := &Command{Name: "check", Args: "all|some [FILE|-]", Summary: "look", About: "Looks.", Flags: NewFlags("check")}
	secret := &Command{Name: "secret", Flags: NewFlags("secret"), Hidden: true}
	p := &Command{
		Name: "x", Summary: "do it", Flags: NewFlags("x"), Commands: []*Command{build, check, secret},
		About: "Does it.\n.SH is no macro here.\n\nSignals:\n  HUP  hang up",
	}
	return p
}

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		args, operands []string
		link           string
	}{
		{[]string{"a", "--out-link", "l", "b", "-L"}, []string{"a", "b"}, "l"},
		{[]string{"--out-link=l", "--", "-L", "--"}, []string{"-L", "--"}, "l"},
		{nil, nil, ""},
	} {
		c := example().Commands[0]
		operands, err := Parse(c.Flags, tt.args)
		if err != nil || !slices.Equal(operands, tt.operands) || c.Flags.Lookup("out-link").Value.String() != tt.link {
			t.Errorf("Parse(%q) = %q, %v", tt.args, operands, err)
		}
	}
	if _, err := Parse(example().Commands[0].Flags, []string{"a", "--help"}); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
	c := example().Commands[0]
	if _, err := Parse(c.Flags, []string{"-L"}); err != nil || c.Flags.Lookup("logs").Value.String() != "true" {
		t.Errorf("an alias does not set its option: %v", err)
	}
}

func TestHelp(t *testing.T) {
	var out bytes.Buffer
	example().Commands[0].WriteHelp(&out, "x")
	want := `Usage: x build [OPTION]... DRV...

Builds things, well.

And 'more'.

Options:
  -L, --logs              show logs; all of them
  --machine URI           only the machine with this URI, and so on and so on and so on
                          and so on and so on and so on and so on and so on and so on and
                          so on
  --out-link PATH         make PATH a link
  --wait TIME             wait for so long, a TIME (default 10m)

Examples:
  x build -L a.drv
  x build ~/b\c.drv

Exit status: 0 all is well.
`
	if out.String() != want {
		t.Errorf("got:\n%s\nwant:\n%s", out.String(), want)
	}
	out.Reset()
	example().WriteHelp(&out, "")
	want = `Usage: x SUBCOMMAND [ARGUMENT]...

Does it.
.SH is no macro here.

Subcommands:
  build  DRV...             build things
  check  all|some [FILE|-]  look

Signals:
  HUP  hang up
`
	if out.String() != want {
		t.Errorf("got:\n%s\nwant:\n%s", out.String(), want)
	}
}

func TestDefaultsForPeople(t *testing.T) {
	for value, want := range map[string]string{
		"": "", "0": "", "0s": "", "false": "", "true": "true", "10m0s": "10m", "1h0m0s": "1h", "1h30m0s": "1h30m", "15s": "15s", "/a b": "/a b",
	} {
		if got := defaultText(value); got != want {
			t.Errorf("defaultText(%q) = %q, want %q", value, got, want)
		}
	}
}

func TestMan(t *testing.T) {
	var out bytes.Buffer
	example().WriteMan(&out, "1", "1.2", "y(5)", "z(8)")
	for _, want := range []string{
		".TH X 1 \"\" \"nix\\-dispatch 1.2\"\n",
		"\n.SH NAME\nx \\- do it\n",
		"\n.SH DESCRIPTION\nDoes it.\n\\&.SH is no macro here.\n",
		"\n.SS x build [OPTION]... DRV...\nBuilds things, well.\n.PP\nAnd \\(aqmore\\(aq.\n.PP\nOptions:\n.TP\n\\fB\\-L\\fR, \\fB\\-\\-logs\\fR\nshow logs; all of them\n",
		"\n\\fB\\-\\-wait\\fR \\fITIME\\fR\nwait for so long, a TIME (default 10m)\n",
		"\n.PP\nExamples:\n.PP\n.RS 4\n.nf\nx build \\-L a.drv\nx build \\(ti/b\\ec.drv\n",
		"\n.PP\nExit status:\n0 all is well.\n",
		"\n.SH SIGNALS\n",
		"\n.SH SEE ALSO\n.BR y (5) ,\n.BR z (8)\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in:\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "secret") {
		t.Error("a hidden subcommand is shown")
	}
}

func TestComplete(t *testing.T) {
	lookUp := func(kind string) []Candidate {
		if kind == "URI" {
			return []Candidate{{"ssh://mac", "up"}, {"ssh-ng://big", "down"}}
		}
		return nil
	}
	for _, tt := range []struct{ line, want string }{
		{"", "build check"},
		{"b", "build"},
		{"s", ""},
		{"nonesuch ", ""},
		{"build ", FileNames},
		{"build a.drv ", FileNames},
		{"build --", "--logs --machine --out-link --wait --help"},
		{"build -", "-L --logs --machine --out-link --wait --help"},
		{"build --l", "--logs"},
		{"build --machine ", "ssh://mac ssh-ng://big"},
		{"build --machine=ssh:", "--machine=ssh://mac"},
		{"build -machine ssh-", "ssh-ng://big"},
		{"build --out-link ", FileNames},
		{"build --out-link=/", FileNames},
		{"build --wait ", ""},
		{"build --nonesuch=", ""},
		{"build -- --", FileNames},
		{"check ", "all some"},
		{"check all ", FileNames},
		{"check all file ", ""},
		{"build --machine build ", FileNames},
		{"build -L --lo", "--logs"},
	} {
		var words []string
		for _, c := range example().Complete(strings.Split(tt.line, " "), lookUp) {
			words = append(words, c.Word)
		}
		if got := strings.Join(words, " "); got != tt.want {
			t.Errorf("%q: got %q, want %q", tt.line, got, tt.want)
		}
	}
}

func TestGenerator(t *testing.T) {
	g := &Generator{Program: example(), ManSection: "1", Version: "1"}
	for _, tt := range []struct {
		args      []string
		ok, fails bool
		want      string
	}{
		{[]string{"man"}, true, false, ".TH X 1"},
		{[]string{"completion", "bash"}, true, false, "complete -F _x x\n"},
		{[]string{"completion", "zsh"}, true, false, "#compdef x\n"},
		{[]string{"completion", "fish"}, true, false, "complete -c x "},
		{[]string{"completion", "../cli.go"}, true, true, ""},
		{[]string{"complete", "--", "bu"}, true, false, "build\tbuild things\n"},
		{[]string{"complete", "--", "check", "all", ""}, true, false, ":files\n"},
		{[]string{"complete", "bu"}, false, false, ""},
		{[]string{"man", "x"}, false, false, ""},
		{nil, false, false, ""},
	} {
		var out bytes.Buffer
		ok, err := g.Run(tt.args, &out)
		if ok != tt.ok || (err != nil) != tt.fails || !strings.Contains(out.String(), tt.want) || tt.want == "" && out.Len() > 0 {
			t.Errorf("%q: %v, %v, printed %q", tt.args, ok, err, out.String())
		}
	}
}
