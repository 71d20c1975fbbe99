package daemon

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// The cases are those of Nix's own test of shellSplitString, and more.
func TestShellSplit(t *testing.T) {
	tests := []struct {
		text string
		want []string
		err  string
	}{
		{text: ""},
		{text: " \t\n "},
		{text: "foo", want: []string{"foo"}},
		{text: "-F /etc/ssh/other\t-v", want: []string{"-F", "/etc/ssh/other", "-v"}},
		{text: "a\nb\r\nc", want: []string{"a", "b", "c"}},
		{text: "'foo bar'", want: []string{"foo bar"}},
		{text: `'foo bar"'`, want: []string{`foo bar"`}},
		{text: `"foo bar'"`, want: []string{"foo bar'"}},
		{text: `"foo bar\""`, want: []string{`foo bar"`}},
		{text: `"foo bar\\"`, want: []string{`foo bar\`}},
		{text: `"foo \bar \$x"`, want: []string{`foo \bar $x`}},
		{text: `'foo bar\'`, want: []string{`foo bar\`}},
		{text: `foo\ bar\'`, want: []string{"foo bar'"}},
		{text: `-o"User"Known'Hosts'File=/a\ b`, want: []string{"-oUserKnownHostsFile=/a b"}},
		{text: `'' ""`, want: []string{"", ""}},
		{text: `foo\`, want: []string{"foo"}},
		{text: `"foo`, err: "unterminated double quote"},
		{text: `foo'`, err: "unterminated single quote"},
		{text: `"foo\"`, err: "unterminated double quote"},
	}
	for _, tt := range tests {
		got, err := shellSplit(tt.text)
		if tt.err != "" {
			if err == nil || err.Error() != tt.err {
				t.Errorf("shellSplit(%q): error %v, want %q", tt.text, err, tt.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("shellSplit(%q): %v", tt.text, err)
		}
		if diff := cmp.Diff(tt.want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("shellSplit(%q) (-want +got):\n%s", tt.text, diff)
		}
	}
}

// Words without quotes are split as strings.Fields does, and what is quoted comes
// back as it was.
func FuzzShellSplit(f *testing.F) {
	f.Add("-o 'a b' c")
	f.Add(`"x\y`)
	f.Fuzz(func(t *testing.T, text string) {
		got, err := shellSplit(text)
		if !strings.ContainsAny(text, `"'\`+"\v\f\u0085\u00a0\u1680\u2000\u2028\u3000") && strings.ToValidUTF8(text, "") == text {
			ascii := strings.IndexFunc(text, func(r rune) bool { return r > 0x7f }) < 0
			if diff := cmp.Diff(strings.Fields(text), got, cmpopts.EquateEmpty()); ascii && (err != nil || diff != "") {
				t.Fatalf("shellSplit(%q): %v (-Fields +got):\n%s", text, err, diff)
			}
		}
		quoted := "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
		if got, err := shellSplit(quoted); err != nil || len(got) != 1 || got[0] != text {
			t.Errorf("shellSplit(%q) = %q, %v", quoted, got, err)
		}
	})
}
