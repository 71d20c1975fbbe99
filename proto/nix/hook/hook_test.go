package hook

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire"
)

const testDrv = "/nix/store/s66mzxpvicwk07gjbjfw9izjfa797vsw-hello.drv"

// encode is the wire form of what write writes.
func encode(write func(w *wire.Writer)) []byte {
	var b bytes.Buffer
	w := wire.NewWriter(&b)
	write(w)
	w.Flush()
	return b.Bytes()
}

func settings(pairs ...string) []byte {
	return encode(func(w *wire.Writer) {
		for i := 0; i < len(pairs); i += 2 {
			w.Bool(true)
			w.String(pairs[i])
			w.String(pairs[i+1])
		}
		w.Bool(false)
	})
}

func try(system string, features ...string) []byte {
	return encode(func(w *wire.Writer) {
		w.String("try")
		w.Bool(true)
		w.String(system)
		w.String(testDrv)
		w.Strings(features)
	})
}

// recorded is the start of a conversation as the bytes that Nix 2.34.8 writes.
const recorded = "\x01\x00\x00\x00\x00\x00\x00\x00" +
	"\x08\x00\x00\x00\x00\x00\x00\x00max-jobs" +
	"\x01\x00\x00\x00\x00\x00\x00\x004\x00\x00\x00\x00\x00\x00\x00" +
	"\x00\x00\x00\x00\x00\x00\x00\x00" +
	"\x03\x00\x00\x00\x00\x00\x00\x00try\x00\x00\x00\x00\x00" +
	"\x01\x00\x00\x00\x00\x00\x00\x00" +
	"\x0c\x00\x00\x00\x00\x00\x00\x00x86_64-linux\x00\x00\x00\x00" +
	"\x35\x00\x00\x00\x00\x00\x00\x00" + testDrv + "\x00\x00\x00" +
	"\x01\x00\x00\x00\x00\x00\x00\x00" +
	"\x03\x00\x00\x00\x00\x00\x00\x00kvm\x00\x00\x00\x00\x00"

func TestReaderReadsAConversation(t *testing.T) {
	input := "/nix/store/0c0qmlv2ixdxvsazmkg3aj2jh4ajx4m7-input"
	rest := encode(func(w *wire.Writer) {
		w.Strings([]string{input})
		w.Strings([]string{"out", "dev"})
	})
	for name, in := range map[string]io.Reader{
		"whole":        strings.NewReader(recorded + string(rest)),
		"byte by byte": iotest.OneByteReader(strings.NewReader(recorded + string(rest))),
	} {
		t.Run(name, func(t *testing.T) {
			r := NewReader(in)
			s, err := r.Settings()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&Settings{MaxJobs: 4}, s); diff != "" {
				t.Errorf("settings (-want +got):\n%s", diff)
			}
			got, err := r.Try()
			if err != nil {
				t.Fatal(err)
			}
			want := &Try{AmWilling: true, System: "x86_64-linux", DrvPath: testDrv, RequiredFeatures: []string{"kvm"}}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("try (-want +got):\n%s", diff)
			}
			if got := string(r.Replay()); got != recorded {
				t.Errorf("replay = %q", got)
			}
			start, err := r.Start()
			if err != nil {
				t.Fatal(err)
			}
			wantStart := &Start{Inputs: []nix.StorePath{nix.StorePath(input)}, WantedOutputs: []string{"out", "dev"}}
			if diff := cmp.Diff(wantStart, start); diff != "" {
				t.Errorf("start (-want +got):\n%s", diff)
			}
		})
	}
}

func TestReaderKeepsOnlySettingsOfUse(t *testing.T) {
	s, err := NewReader(bytes.NewReader(settings(
		"access-tokens", "github.com=secret",
		"builders", "ssh://a ; ssh://b\n",
		"builders-use-substitutes", "true",
		"extra-platforms", "i686-linux  aarch64-linux",
		"keep-failed", "false",
		"max-build-log-size", "1000",
		"max-jobs", "0",
		"max-silent-time", "18446744073709551615",
		"store", "daemon",
		"system", "x86_64-linux",
		"system-features", "kvm nixos-test",
		"timeout", "3600",
	))).Settings()
	if err != nil {
		t.Fatal(err)
	}
	want := &Settings{
		Builders: "ssh://a ; ssh://b\n", BuildersUseSubstitutes: true, Store: "daemon",
		Systems: []string{"x86_64-linux", "i686-linux", "aarch64-linux"}, SystemFeatures: []string{"kvm", "nixos-test"},
		Timeout: time.Hour, MaxBuildLogSize: 1000,
	}
	if diff := cmp.Diff(want, s); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestReaderReplaysOnlyTheLastTry(t *testing.T) {
	set, first, second := settings("system", "a", "secret", "b"), try("first"), try("second")
	left := "what follows"
	r := NewReader(io.MultiReader(bytes.NewReader(set), bytes.NewReader(first), bytes.NewReader(second), strings.NewReader(left)))
	if _, err := r.Settings(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := r.Try(); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := r.Replay(), append(set, second...); !bytes.Equal(got, want) {
		t.Errorf("replay = %q, want %q", got, want)
	}
	if rest, err := io.ReadAll(r.Rest()); string(rest) != left || err != nil {
		t.Errorf("rest = %q, %v, want %q", rest, err, left)
	}
}

func TestReaderEnds(t *testing.T) {
	if _, err := NewReader(strings.NewReader("")).Settings(); err != io.EOF {
		t.Errorf("settings of nothing: %v, want io.EOF", err)
	}
	for name, after := range map[string][]byte{"end": nil, "another word": encode(func(w *wire.Writer) { w.String("quit") })} {
		r := NewReader(bytes.NewReader(append(settings(), after...)))
		if _, err := r.Settings(); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Try(); err != io.EOF {
			t.Errorf("%s: %v, want io.EOF", name, err)
		}
	}
}

func TestReaderRefuses(t *testing.T) {
	whole := string(settings("max-jobs", "4")) + string(try("s", "f"))
	for n := 1; n < len(whole); n++ {
		r := NewReader(strings.NewReader(whole[:n]))
		_, err := r.Settings()
		if err == nil {
			_, err = r.Try()
		}
		if end := len(settings("max-jobs", "4")); n != end && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut after %d bytes: %v, want an unexpected end", n, err)
		}
	}
	for name, in := range map[string][]byte{
		"long value":    encode(func(w *wire.Writer) { w.Bool(true); w.String("builders"); w.Uint64(maxSettingValue + 1) }),
		"long name":     encode(func(w *wire.Writer) { w.Bool(true); w.Uint64(1 << 60) }),
		"many settings": bytes.Repeat(encode(func(w *wire.Writer) { w.Bool(true); w.String(""); w.String("") }), maxSettings+1),
		"large settings": bytes.Repeat(encode(func(w *wire.Writer) {
			w.Bool(true)
			w.String("")
			w.String(strings.Repeat("x", maxSettingValue))
		}), maxRecorded/maxSettingValue+1),
	} {
		_, err := NewReader(bytes.NewReader(in)).Settings()
		if !errors.Is(err, wire.ErrTooLong) && !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: %v, want a complaint about size", name, err)
		}
	}
	for _, bad := range [][]string{{"max-jobs", "many"}, {"timeout", "-1"}, {"keep-failed", "perhaps"}} {
		if _, err := NewReader(bytes.NewReader(settings(bad...))).Settings(); err == nil || !strings.Contains(err.Error(), bad[0]) {
			t.Errorf("%v: %v, want an error that names the setting", bad, err)
		}
	}
}

func TestCouldBuildLocally(t *testing.T) {
	s := Settings{MaxJobs: 1, Systems: []string{"x86_64-linux", "i686-linux"}, SystemFeatures: []string{"kvm"}}
	none := s
	none.MaxJobs = 0
	for _, tt := range []struct {
		settings Settings
		try      Try
		want     bool
	}{
		{s, Try{System: "x86_64-linux"}, true},
		{s, Try{System: "i686-linux", RequiredFeatures: []string{"kvm"}}, true},
		{s, Try{System: "builtin"}, true},
		{s, Try{System: "aarch64-linux"}, false},
		{s, Try{System: "x86_64-linux", RequiredFeatures: []string{"kvm", "ca-derivations"}}, false},
		{none, Try{System: "x86_64-linux"}, false},
		{none, Try{System: "builtin"}, false},
	} {
		if got := tt.settings.CouldBuildLocally(&tt.try); got != tt.want {
			t.Errorf("max-jobs %d: CouldBuildLocally(%+v) = %v, want %v", tt.settings.MaxJobs, tt.try, got, tt.want)
		}
	}
}

// A writeCounter keeps each write apart.
type writeCounter []string

func (w *writeCounter) Write(p []byte) (int, error) {
	*w = append(*w, string(p))
	return len(p), nil
}

func TestLogWritesRepliesAtOnceAndMessagesTogether(t *testing.T) {
	var w writeCounter
	l := NewLog(&w)
	l.Accept("ssh://mac\n# decline\x00")
	l.Decline()
	l.DeclinePermanently()
	l.Postpone()
	l.Msg(Error, "two\nlines \xff \"quoted\"")
	id := l.Start(Info, CopyPath, "copying", 0, "/nix/store/x", "local", "ssh://mac")
	child := l.Start(Talkative, UnknownActivity, "", id)
	l.Progress(id, 1, 2, 3)
	l.SetExpected(id, CopyPath, 9)
	l.Stop(child)
	l.Stop(id)
	l.Flush()
	l.Flush() // nothing is left
	base := ActivityID(os.Getpid()) << 32
	if id != base+1 || child != base+2 {
		t.Errorf("ids %d and %d, want them counted from the process id", id, child)
	}
	want := []string{
		"# accept\nssh://mac # decline \n",
		"# decline\n",
		"# decline-permanently\n",
		"# postpone\n",
		strings.Join([]string{`@nix {"action":"msg","level":0,"msg":"two\nlines ` + "\ufffd" + ` \"quoted\""}` + "\n",
			`@nix {"action":"start","id":ID1,"level":3,"type":100,"text":"copying","parent":0,"fields":["/nix/store/x","local","ssh://mac"]}` + "\n",
			`@nix {"action":"start","id":ID2,"level":4,"type":0,"text":"","parent":ID1}` + "\n",
			`@nix {"action":"result","id":ID1,"type":105,"fields":[1,2,3,0]}` + "\n",
			`@nix {"action":"result","id":ID1,"type":106,"fields":[100,9]}` + "\n",
			`@nix {"action":"stop","id":ID2}` + "\n",
			`@nix {"action":"stop","id":ID1}` + "\n"}, ""),
	}
	for i := range want {
		want[i] = strings.NewReplacer("ID1", fmt.Sprint(base+1), "ID2", fmt.Sprint(base+2)).Replace(want[i])
	}
	if diff := cmp.Diff(want, []string(w)); diff != "" {
		t.Errorf("writes (-want +got):\n%s", diff)
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte(recorded))
	f.Add([]byte{})
	f.Add(settings("max-jobs", "auto", "timeout", "1"))
	f.Add(append(settings(), try("x")...))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := NewReader(bytes.NewReader(in))
		if _, err := r.Settings(); err != nil {
			return
		}
		for {
			q, err := r.Try()
			if err != nil {
				break
			}
			if _, err := nix.ParseStorePath(string(q.DrvPath)); err != nil {
				t.Fatalf("derivation %q: %v", q.DrvPath, err)
			}
			// A replay must bring another reader to the same question.
			again := NewReader(bytes.NewReader(r.Replay()))
			if _, err := again.Settings(); err != nil {
				t.Fatalf("replayed settings: %v", err)
			}
			q2, err := again.Try()
			if err != nil {
				t.Fatalf("replayed try: %v", err)
			}
			if diff := cmp.Diff(q, q2); diff != "" {
				t.Fatalf("replayed try (-want +got):\n%s", diff)
			}
		}
		r.Start() //nolint:errcheck // must only not panic
	})
}

func FuzzLog(f *testing.F) {
	f.Add("text", "field")
	f.Add("\n# accept\n", "\xff\x00\u2028")
	line := regexp.MustCompile(`^@nix \{[^\n]*\}\n$`)
	f.Fuzz(func(t *testing.T, text, field string) {
		var b bytes.Buffer
		l := NewLog(&b)
		l.Start(Info, CopyPath, text, 0, field)
		l.Flush()
		if !line.Match(b.Bytes()) {
			t.Fatalf("Start(%q) wrote %q", text, b.String())
		}
		var m struct {
			Text   string
			Fields []string
		}
		if err := json.Unmarshal(b.Bytes()[len("@nix "):], &m); err != nil {
			t.Fatalf("Start(%q) wrote %q: %v", text, b.String(), err)
		}
		if want := strings.ToValidUTF8(text, "\ufffd"); strings.ReplaceAll(m.Text, "\ufffd", "") != strings.ReplaceAll(want, "\ufffd", "") {
			t.Fatalf("Start(%q) is read as %q", text, m.Text)
		}
		b.Reset()
		NewLog(&b).Accept(text)
		if strings.Count(b.String(), "\n") != 2 || !strings.HasPrefix(b.String(), "# accept\n") {
			t.Fatalf("Accept(%q) wrote %q", text, b.String())
		}
	})
}
