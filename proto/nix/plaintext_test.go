package nix

import (
	"strings"
	"testing"
)

func TestPlainText(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"plain\ttext\n", "plain\ttext\n"},
		{"\x1b[31;1mred\x1b[0m", "red"},
		{"\x1b]0;title\aafter", "after"},
		{"\x1b]0;title\x1b\\after", "after"},
		{"\x1b]8;;unterminated\nnext", "\nnext"},
		{"\x1b(Bx\x1b7\x1b", "x"},
		{"\x1b", ""},
		{"\x1b[", ""},
		{"\x1b[3\nx", "\nx"},
		{"a\rb\bc\x7f\x00", "abc"},
		{"\u009b31mx", "31mx"},
		{"\xff\u202ex", "\ufffdx"},
		{"ü", "ü"},
	} {
		if got := PlainText(tt.in); got != tt.want {
			t.Errorf("PlainText(%q) = %q, want %q", tt.in, got, tt.want)
		}
	}
}

func FuzzPlainText(f *testing.F) {
	for _, seed := range []string{"", "\x1b[31m", "\x1b]0;x\a", "\x1b\x1b[", "\xff\xfe", "\u202e\n"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got := PlainText(s)
		for _, r := range got {
			if !isShown(r) {
				t.Fatalf("PlainText(%q) = %q holds %U", s, got, r)
			}
		}
		if strings.Count(got, "\n") != strings.Count(s, "\n") {
			t.Fatalf("PlainText(%q) = %q lost a line", s, got)
		}
		if again := PlainText(got); again != got {
			t.Fatalf("PlainText is not idempotent: %q, then %q", got, again)
		}
	})
}
