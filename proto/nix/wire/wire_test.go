package wire

import (
	"bytes"
	"errors"
	"io"
	"math"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/proto/nix"
)

const (
	pathA = nix.StorePath("/nix/store/00000000000000000000000000000001-a")
	pathB = nix.StorePath("/nix/store/00000000000000000000000000000002-b")
)

// written is what f writes.
func written(t *testing.T, f func(w *Writer)) []byte {
	t.Helper()
	var b bytes.Buffer
	w := NewWriter(&b)
	f(w)
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestStringIsEncodedAsNixDoes(t *testing.T) {
	got := written(t, func(w *Writer) { w.String("foo") })
	want := []byte{3, 0, 0, 0, 0, 0, 0, 0, 'f', 'o', 'o', 0, 0, 0, 0, 0}
	if !bytes.Equal(got, want) {
		t.Errorf("String(foo) = % x, want % x", got, want)
	}
}

func TestSetsAndMapsAreWrittenSorted(t *testing.T) {
	paths := []nix.StorePath{pathB, pathA}
	got := written(t, func(w *Writer) {
		w.StorePathSet(paths)
		w.StringMap(map[string]string{"b": "2", "a": "1"})
	})
	want := written(t, func(w *Writer) {
		w.Strings([]string{string(pathA), string(pathB)})
		w.Uint64(2)
		for _, s := range []string{"a", "1", "b", "2"} {
			w.String(s)
		}
	})
	if !bytes.Equal(got, want) {
		t.Errorf("got % x, want % x", got, want)
	}
	if paths[0] != pathB {
		t.Error("StorePathSet changed its argument")
	}
}

func TestValuesRoundTrip(t *testing.T) {
	long := strings.Repeat("x", 3*readBuffer+5)
	now := time.Unix(1_700_000_000, 0)
	data := written(t, func(w *Writer) {
		w.Uint64(math.MaxUint64)
		w.Bool(true)
		w.String("")
		w.String(long)
		w.Strings([]string{"a", ""})
		w.StringMap(map[string]string{"k": "v"})
		w.StorePath("")
		w.StorePathSet([]nix.StorePath{pathA, pathB})
		w.Time(now)
		w.Time(time.Time{})
		w.Seconds(1500 * time.Millisecond)
	})
	for _, tt := range []struct {
		name string
		in   io.Reader
	}{
		{"whole", bytes.NewReader(data)},
		{"byte by byte", iotest.OneByteReader(bytes.NewReader(data))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := NewReader(tt.in)
			got := []any{
				r.Uint64(), r.Bool(), r.String(1), r.String(len(long)), r.Strings(2, 1), r.StringMap(1, 1),
				r.OptStorePath(), r.StorePaths(2), r.Time(), r.Time(), r.Int(2),
			}
			want := []any{
				uint64(math.MaxUint64), true, "", long, []string{"a", ""}, map[string]string{"k": "v"},
				nix.StorePath(""), []nix.StorePath{pathA, pathB}, now, time.Time{}, 2,
			}
			if d := cmp.Diff(want, got); d != "" || r.Err() != nil {
				t.Errorf("%v; (-want +got)\n%s", r.Err(), d)
			}
			if r.Uint64(); r.Err() != io.EOF {
				t.Errorf("after the last value: %v, want EOF", r.Err())
			}
		})
	}
}

func TestReaderRefuses(t *testing.T) {
	tests := []struct {
		name string
		data []byte
		read func(r *Reader)
		want error
	}{
		{"string above its limit", written(t, func(w *Writer) { w.String("abc") }), func(r *Reader) { r.String(2) }, ErrTooLong},
		{"string of absurd length", written(t, func(w *Writer) { w.Uint64(math.MaxUint64) }), func(r *Reader) { r.String(math.MaxInt) }, ErrTooLong},
		{"string into a small buffer", written(t, func(w *Writer) { w.String("abc") }), func(r *Reader) { r.StringIn(make([]byte, 2)) }, ErrTooLong},
		{"list above its limit", written(t, func(w *Writer) { w.Strings([]string{"a", "b"}) }), func(r *Reader) { r.Strings(1, 9) }, ErrTooLong},
		{"list of absurd length", written(t, func(w *Writer) { w.Uint64(math.MaxUint64) }), func(r *Reader) { r.StorePaths(MaxPaths) }, ErrTooLong},
		{"map above its limit", written(t, func(w *Writer) { w.Uint64(2) }), func(r *Reader) { r.StringMap(1, 9) }, ErrTooLong},
		{"padding", append(written(t, func(w *Writer) { w.Uint64(1) }), 'a', 0, 0, 0, 0, 0, 0, 1), func(r *Reader) { r.String(1) }, ErrPadding},
		{"integer above its limit", written(t, func(w *Writer) { w.Uint64(1 << 32) }), func(r *Reader) { r.Int(math.MaxUint32) }, ErrRange},
		{"time beyond the calendar", written(t, func(w *Writer) { w.Uint64(math.MaxInt64) }), func(r *Reader) { r.Time() }, ErrRange},
		{"nothing", nil, func(r *Reader) { r.String(9) }, io.EOF},
		{"half an integer", make([]byte, 4), func(r *Reader) { r.Uint64() }, io.ErrUnexpectedEOF},
		{"length without string", written(t, func(w *Writer) { w.Uint64(1) }), func(r *Reader) { r.String(9) }, io.ErrUnexpectedEOF},
		{"long string cut", append(written(t, func(w *Writer) { w.Uint64(1 << 20) }), "abc"...), func(r *Reader) { r.String(1 << 20) }, io.ErrUnexpectedEOF},
		{"missing padding", append(written(t, func(w *Writer) { w.Uint64(3) }), "abc"...), func(r *Reader) { r.Text(9) }, io.ErrUnexpectedEOF},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := NewReader(bytes.NewReader(tt.data))
			tt.read(r)
			if !errors.Is(r.Err(), tt.want) {
				t.Errorf("error %v, want %v", r.Err(), tt.want)
			}
			if r.Uint64() != 0 || !errors.Is(r.Err(), tt.want) {
				t.Errorf("the first error did not stay: %v", r.Err())
			}
		})
	}
}

func TestStorePathMustBeOne(t *testing.T) {
	for _, s := range []string{"", "/etc/passwd", "/nix/store/short", "../x"} {
		r := NewReader(bytes.NewReader(written(t, func(w *Writer) { w.String(s) })))
		if p := r.StorePath(); r.Err() == nil {
			t.Errorf("StorePath accepts %q as %q", s, p)
		}
	}
}

func TestAnnouncedLengthAllocatesNothing(t *testing.T) {
	data := written(t, func(w *Writer) { w.Uint64(MaxEnvironment) })
	list := written(t, func(w *Writer) { w.Uint64(MaxPaths) })
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 10 {
		NewReader(bytes.NewReader(data)).String(MaxEnvironment)
		NewReader(bytes.NewReader(list)).StorePaths(MaxPaths)
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 16<<20 {
		t.Errorf("20 empty promises cost %d bytes of memory", got)
	}
}

func TestTextThatIsTooLongToSkipIsRefusedAtOnce(t *testing.T) {
	for _, n := range []uint64{MaxSkipped + 1, 1 << 60, math.MaxUint64} {
		r := NewReader(io.MultiReader(bytes.NewReader(written(t, func(w *Writer) { w.Uint64(n) })), iotest.ErrReader(errors.New("read on"))))
		if got := r.Text(4); got != "" || !errors.Is(r.Err(), ErrTooLong) {
			t.Errorf("Text of %d bytes = %q, %v; want %v", n, got, r.Err(), ErrTooLong)
		}
	}
}

func TestTextIsCutNotRefused(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"abc", "abc"},
		{"abcd", "abcd"},
		{"abcde", "abcd[... 1 bytes cut]"},
		{strings.Repeat("abcd", 100_000), "abcd[... 399996 bytes cut]"},
	} {
		r := NewReader(bytes.NewReader(written(t, func(w *Writer) { w.String(tt.in); w.Uint64(7) })))
		if got := r.Text(4); got != tt.want || r.Err() != nil {
			t.Errorf("Text of %d bytes = %q, %v; want %q", len(tt.in), got, r.Err(), tt.want)
		}
		if got := r.Uint64(); got != 7 {
			t.Errorf("the value after a text of %d bytes = %d, want 7", len(tt.in), got)
		}
	}
}

func TestFramedStreamsRoundTripAndEndExactly(t *testing.T) {
	for _, size := range []int{0, 1, frameSize - 1, frameSize, frameSize + 1, 5*frameSize + 3} {
		content := bytes.Repeat([]byte("0123456789"), size/10+1)[:size]
		data := written(t, func(w *Writer) {
			f := NewFramedWriter(w)
			for rest := content; len(rest) > 0; {
				n := min(len(rest), 7001)
				f.Write(rest[:n])
				rest = rest[n:]
			}
			f.Close()
			f.Close()
			if _, err := f.Write([]byte("x")); err == nil {
				t.Error("write after Close succeeds")
			}
			w.Uint64(7)
		})
		r := NewReader(bytes.NewReader(data))
		got, err := io.ReadAll(NewFramedReader(r))
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("framed stream of %d bytes: got %d bytes, %v", size, len(got), err)
		}
		if v := r.Uint64(); v != 7 {
			t.Errorf("after a framed stream of %d bytes: %d, want 7", size, v)
		}
	}
}

func TestFramedStreamCutShortIsUnexpectedEOF(t *testing.T) {
	data := written(t, func(w *Writer) { f := NewFramedWriter(w); f.Write([]byte("abc")); f.Close() })
	for n := range data {
		_, err := io.ReadAll(NewFramedReader(NewReader(bytes.NewReader(data[:n]))))
		if err != io.ErrUnexpectedEOF {
			t.Errorf("cut after %d of %d bytes: %v, want unexpected EOF", n, len(data), err)
		}
	}
}

func TestHugeFrameIsRefused(t *testing.T) {
	data := written(t, func(w *Writer) { w.Uint64(1 << 32) })
	if err := NewFramedReader(NewReader(bytes.NewReader(data))).Drain(); !errors.Is(err, ErrTooLong) {
		t.Errorf("frame of 4 GiB: %v, want ErrTooLong", err)
	}
}

func TestCompositesRoundTrip(t *testing.T) {
	drv := &nix.BasicDerivation{
		Outputs: map[string]nix.DerivationOutput{
			"out": {Path: pathA}, "dev": {HashAlgo: "r:sha256"}, "fix": {Path: pathB, HashAlgo: "r:sha256", Hash: "00"},
		},
		InputSrcs: []nix.StorePath{pathA, pathB},
		Platform:  "x86_64-linux", Builder: "/bin/sh", Args: []string{"-c", "x"},
		Env: map[string]string{"A": "1", "B": ""},
	}
	info := nix.PathInfo{
		Path: pathA, Deriver: pathB, NarHash: nix.NarHash{1, 2}, References: []nix.StorePath{pathA, pathB},
		RegistrationTime: time.Unix(5, 0), NarSize: 1 << 40, Ultimate: true, Sigs: []string{"a:b", "c:d"}, CA: "text:sha256:x",
	}
	res := nix.BuildResult{
		Status: nix.PermanentFailure, ErrorMsg: "no", TimesBuilt: 1, NonDeterministic: true,
		StartTime: time.Unix(7, 0), StopTime: time.Unix(8, 0), BuiltOutputs: map[string]nix.StorePath{"out": pathA, "dev": pathB},
	}
	forms := []ResultForm{
		{Times: true, Outputs: RealisationOutputs}, {Times: true, CPU: true, Outputs: RealisationOutputs}, {Times: true, Outputs: PathOutputs},
	}
	r := NewReader(bytes.NewReader(written(t, func(w *Writer) {
		w.BasicDerivation(drv)
		w.PathInfo(&info)
		for _, form := range forms {
			w.BuildResult(form, &res)
		}
		w.BuildResult(ResultForm{}, &res)
	})))
	if d := cmp.Diff(drv, r.BasicDerivation()); d != "" {
		t.Errorf("derivation (-want +got)\n%s", d)
	}
	if d := cmp.Diff(info, r.PathInfo()); d != "" {
		t.Errorf("path info (-want +got)\n%s", d)
	}
	for _, form := range forms {
		if d := cmp.Diff(res, r.BuildResult(form, nix.DefaultStoreDir)); d != "" {
			t.Errorf("build result %+v (-want +got)\n%s", form, d)
		}
	}
	if d := cmp.Diff(nix.BuildResult{Status: res.Status, ErrorMsg: "no"}, r.BuildResult(ResultForm{}, "")); d != "" {
		t.Errorf("shortest build result (-want +got)\n%s", d)
	}
	if r.Uint64(); r.Err() != io.EOF {
		t.Errorf("at the end: %v, want EOF", r.Err())
	}
}

func TestWriterKeepsItsFirstError(t *testing.T) {
	w := NewWriter(failingWriter{})
	w.String(strings.Repeat("x", 2*writeBuffer))
	w.Uint64(1)
	if err := w.Flush(); err != errTest {
		t.Errorf("Flush = %v, want %v", err, errTest)
	}
	if w.Err() != errTest {
		t.Errorf("Err = %v, want %v", w.Err(), errTest)
	}
}

var errTest = errors.New("test")

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errTest }
