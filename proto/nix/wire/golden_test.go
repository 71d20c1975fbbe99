package wire

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nixdispatch/proto/nix"
)

// golden reads one of Nix's own test vectors. They are not ours to copy, so
// the test needs a Nix source tree, named by NIX_DISPATCH_NIX_SOURCE.
func golden(t *testing.T, name string) []byte {
	t.Helper()
	dir := os.Getenv("NIX_DISPATCH_NIX_SOURCE")
	if dir == "" {
		t.Skip("NIX_DISPATCH_NIX_SOURCE names no Nix source tree")
	}
	data, err := os.ReadFile(filepath.Join(dir, "src/libstore-tests/data", name))
	if os.IsNotExist(err) {
		t.Skip("this Nix has no such vector: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestGoldenBuildResults(t *testing.T) {
	all := ResultForm{Times: true, CPU: true, Outputs: RealisationOutputs}
	old := ResultForm{Times: true, Outputs: RealisationOutputs}
	for name, form := range map[string]ResultForm{
		"serve-protocol/build-result-2.2":   {},
		"serve-protocol/build-result-2.3":   {Times: true},
		"serve-protocol/build-result-2.6":   old,
		"serve-protocol/build-result-2.8":   {Times: true, Outputs: PathOutputs},
		"worker-protocol/build-result-1.29": old,
		"worker-protocol/build-result-1.37": all,
	} {
		t.Run(name, func(t *testing.T) {
			var want []struct {
				ErrorMsg           string
				IsNonDeterministic bool
				Status             string
				TimesBuilt         uint64
				StartTime          int64
				StopTime           int64
				BuiltOutputs       map[string]struct{ OutPath string }
			}
			if err := json.Unmarshal(golden(t, name+".json"), &want); err != nil {
				t.Fatal(err)
			}
			r := NewReader(bytes.NewReader(golden(t, name+".bin")))
			for _, w := range want {
				got := r.BuildResult(form, nix.DefaultStoreDir)
				outputs := make(map[string]nix.StorePath)
				for output, o := range w.BuiltOutputs {
					outputs[output] = nix.StorePath(nix.DefaultStoreDir + "/" + o.OutPath)
				}
				wantRes := nix.BuildResult{Status: got.Status, ErrorMsg: w.ErrorMsg, BuiltOutputs: outputs}
				if form.Times {
					wantRes.TimesBuilt, wantRes.NonDeterministic = w.TimesBuilt, w.IsNonDeterministic
					wantRes.StartTime, wantRes.StopTime = unix(w.StartTime), unix(w.StopTime)
				}
				if form.Outputs == NoOutputs {
					wantRes.BuiltOutputs = nil
				}
				if d := cmp.Diff(wantRes, got, cmpopts.EquateEmpty()); d != "" || got.Status.String() != w.Status {
					t.Errorf("status %v, want %s (-want +got)\n%s", got.Status, w.Status, d)
				}
			}
			if r.Uint64(); r.Err() != io.EOF {
				t.Errorf("at the end: %v, want EOF", r.Err())
			}
		})
	}
}

func unix(s int64) time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(s, 0)
}

func TestGoldenPathInfosAreWrittenAsNixDoes(t *testing.T) {
	data := golden(t, "worker-protocol/valid-path-info-1.16.bin")
	r := NewReader(bytes.NewReader(data))
	var b bytes.Buffer
	w := NewWriter(&b)
	n := 0
	for ; b.Len() < len(data); n++ {
		info := r.PathInfo()
		if r.Err() != nil {
			t.Fatal(r.Err())
		}
		w.PathInfo(&info)
		w.Flush()
	}
	if !bytes.Equal(b.Bytes(), data) || n != 3 {
		t.Errorf("%d infos written again differ from Nix's bytes", n)
	}
}
