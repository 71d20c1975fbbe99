package wire_test

import (
	"bytes"
	"io"
	"testing"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire"
	"nixdispatch/proto/nix/wire/wiretest"
)

// benchmarkInfos are infos of paths with ten references each.
func benchmarkInfos() []nix.PathInfo {
	infos := make([]nix.PathInfo, 1000)
	for n := range infos {
		var refs []nix.StorePath
		for r := range min(n, 10) {
			refs = append(refs, infos[n-1-r].Path)
		}
		infos[n] = wiretest.Info(wiretest.Path(n+1, "some-package-1.2.3"), nil, refs...)
		infos[n].NarSize = 1 << 20
	}
	return infos
}

func BenchmarkWritePathInfo(b *testing.B) {
	infos := benchmarkInfos()
	w := wire.NewWriter(io.Discard)
	b.ReportAllocs()
	for b.Loop() {
		for i := range infos {
			w.PathInfo(&infos[i])
		}
		if err := w.Flush(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(infos)), "ns/info")
}

func BenchmarkReadPathInfo(b *testing.B) {
	infos := benchmarkInfos()
	var data bytes.Buffer
	w := wire.NewWriter(&data)
	for i := range infos {
		w.PathInfo(&infos[i])
	}
	if err := w.Flush(); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		r := wire.NewReader(bytes.NewReader(data.Bytes()))
		for range infos {
			r.PathInfo()
		}
		if err := r.Err(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(infos)), "ns/info")
}
