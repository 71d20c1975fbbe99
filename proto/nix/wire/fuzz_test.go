package wire

import (
	"bytes"
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/proto/nix"
)

// FuzzReader reads arbitrary bytes as every composite value: whatever is
// accepted must be the same when written and read again.
func FuzzReader(f *testing.F) {
	seed := func(write func(w *Writer)) {
		var b bytes.Buffer
		w := NewWriter(&b)
		write(w)
		w.Flush()
		f.Add(b.Bytes())
	}
	seed(func(w *Writer) {
		w.BasicDerivation(&nix.BasicDerivation{
			Outputs:  map[string]nix.DerivationOutput{"out": {Path: pathA}},
			Platform: "x", Args: []string{"a"}, Env: map[string]string{"k": "v"},
		})
	})
	seed(func(w *Writer) {
		w.PathInfo(&nix.PathInfo{Path: pathA, References: []nix.StorePath{pathA, pathB}, NarSize: 9, Sigs: []string{"s"}})
	})
	seed(func(w *Writer) {
		w.BuildResult(ResultForm{Times: true, CPU: true, Outputs: RealisationOutputs},
			&nix.BuildResult{BuiltOutputs: map[string]nix.StorePath{"out": pathA}})
	})
	seed(func(w *Writer) {
		w.BuildResult(ResultForm{Times: true, Outputs: PathOutputs}, &nix.BuildResult{BuiltOutputs: map[string]nix.StorePath{"out": pathA}})
	})
	f.Fuzz(func(t *testing.T, data []byte) {
		again(t, data, (*Reader).BasicDerivation, (*Writer).BasicDerivation)
		again(t, data,
			func(r *Reader) *nix.PathInfo { info := r.PathInfo(); return &info },
			(*Writer).PathInfo)
		for _, form := range []ResultForm{{}, {Times: true, CPU: true, Outputs: RealisationOutputs}, {Times: true, Outputs: PathOutputs}} {
			again(t, data,
				func(r *Reader) *nix.BuildResult { res := r.BuildResult(form, nix.DefaultStoreDir); return &res },
				func(w *Writer, res *nix.BuildResult) { w.BuildResult(form, res) })
		}
		framed, err := io.ReadAll(NewFramedReader(NewReader(bytes.NewReader(data))))
		if len(framed) > len(data) || err == nil && len(data) < 8 {
			t.Errorf("%d framed bytes out of %d, %v", len(framed), len(data), err)
		}
	})
}

func again[T any](t *testing.T, data []byte, read func(*Reader) *T, write func(*Writer, *T)) {
	t.Helper()
	r := NewReader(bytes.NewReader(data))
	first := read(r)
	if r.Err() != nil {
		return
	}
	var b bytes.Buffer
	w := NewWriter(&b)
	write(w, first)
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	r = NewReader(&b)
	second := read(r)
	sortLists(first)
	if d := cmp.Diff(first, second); d != "" || r.Err() != nil {
		t.Errorf("read again: %v (-first +second)\n%s", r.Err(), d)
	}
}

// sortLists brings sets into the order in which they are written.
func sortLists(v any) {
	switch v := v.(type) {
	case *nix.BasicDerivation:
		v.InputSrcs = sorted(v.InputSrcs)
	case *nix.PathInfo:
		v.References, v.Sigs = sorted(v.References), sorted(v.Sigs)
	}
}
