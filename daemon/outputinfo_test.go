package daemon

import (
	"strings"
	"testing"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
)

// A talkativeStore reports a path that it was not asked for. In the serve protocol the
// machine says which paths its answer is about.
type talkativeStore struct {
	remoteStore
	more nix.PathInfo
}

func (s talkativeStore) pathInfos(paths []nix.StorePath) ([]nix.PathInfo, error) {
	infos := []nix.PathInfo{s.more}
	for _, p := range paths {
		infos = append(infos, nix.PathInfo{Path: p})
	}
	return infos, nil
}

// TestOnlyOutputsAreImported has a machine announce a path that is no output of the build.
func TestOnlyOutputsAreImported(t *testing.T) {
	t.Parallel()
	out, more := wiretest.Path(1, "out"), wiretest.Path(2, "more")
	drv := &nix.Derivation{BasicDerivation: nix.BasicDerivation{Outputs: map[string]nix.DerivationOutput{"out": {Path: out}}}}
	m := &machine{copyStall: time.Minute}
	a := &attempt{
		b: &build{drv: drv},
		m: m,
		r: &remote{
			machine: m, store: talkativeStore{more: nix.PathInfo{Path: more}}, stall: newStallWatch(func() {}),
			stderr: newStderrReader(strings.NewReader(""), func() {}),
		},
	}
	infos, err := a.outputInfos(nil, []nix.StorePath{out})
	if err == nil || !strings.Contains(err.Error(), string(more)+", which it was not asked for") {
		t.Errorf("outputs %v, %v; want the machine to be blamed for %s", infos, err, more)
	}
}
