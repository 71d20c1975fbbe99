package wire

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const testMagic = 0x6478696f // its first byte is an "o"

func greet(r io.Reader) (Version, error) {
	return NewReader(r).Greeting("nix-daemon", testMagic, MakeVersion(1, 34))
}

func TestGreetingTellsNoiseFromEndFromVersion(t *testing.T) {
	hello := func(v uint64) string {
		return string(written(t, func(w *Writer) { w.Uint64(testMagic); w.Uint64(v) }))
	}
	tests := []struct {
		name, in string
		want     HandshakeError
	}{
		{"message of the shell", "bash: nix-daemon: command not found\n",
			HandshakeError{Fault: Noise, Got: []byte("bash: nix-daemon: command not found\n")}},
		{"short message", "no\n", HandshakeError{Fault: Noise, Got: []byte("no\n")}},
		{"message that begins like the magic number", "oh", HandshakeError{Fault: Noise, Got: []byte("oh")}},
		{"message before the protocol", "hi\n" + hello(1<<8|38), HandshakeError{Fault: Noise, Got: []byte("hi\n" + hello(1<<8|38))}},
		{"long message", strings.Repeat("motd ", 1000), HandshakeError{Fault: Noise, Got: []byte(strings.Repeat("motd ", 40))}},
		{"nothing", "", HandshakeError{Fault: Closed, Err: io.EOF}},
		{"part of the magic number", hello(0)[:5], HandshakeError{Fault: Closed, Err: io.ErrUnexpectedEOF}},
		{"no version", hello(0)[:8], HandshakeError{Fault: Closed, Err: io.ErrUnexpectedEOF}},
		{"too old", hello(1<<8 | 33), HandshakeError{Fault: UnsupportedVersion, Version: 1<<8 | 33, Oldest: 1<<8 | 34}},
		{"another major", hello(2<<8 | 40), HandshakeError{Fault: UnsupportedVersion, Version: 2<<8 | 40, Oldest: 1<<8 | 34}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := greet(strings.NewReader(tt.in))
			got, ok := errors.AsType[*HandshakeError](err)
			if !ok {
				t.Fatalf("error %v, want a HandshakeError", err)
			}
			tt.want.Protocol = "nix-daemon"
			if d := cmp.Diff(tt.want, *got, cmpopts.EquateErrors()); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
	if v, err := greet(strings.NewReader(hello(1<<8 | 40))); err != nil || v != MakeVersion(1, 40) {
		t.Errorf("newer server: %v, %v; want 1.40", v, err)
	}
}

func TestNoiseIsReportedWhileThePeerStaysOpen(t *testing.T) {
	pr, pw := io.Pipe()
	defer pw.Close()
	go io.WriteString(pw, "Last login: today\n")
	_, err := greet(pr)
	got, ok := errors.AsType[*HandshakeError](err)
	if !ok || got.Fault != Noise || !bytes.HasPrefix(got.Got, []byte("Last login")) {
		t.Errorf("error %v, want the noise", err)
	}
}
