package nar

import (
	"bytes"
	"errors"
	"io"
	"math"
	"strings"
	"testing"
	"testing/iotest"

	"nixdispatch/proto/nix/wire"
)

// encode writes words, as the format consists of them.
func encode(words ...string) []byte {
	var b bytes.Buffer
	w := wire.NewWriter(&b)
	for _, s := range words {
		w.String(s)
	}
	w.Flush()
	return b.Bytes()
}

func join(parts ...[]string) []string {
	var all []string
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func file(content string) []string {
	return []string{"(", "type", "regular", "contents", content, ")"}
}

func program(content string) []string {
	return []string{"(", "type", "regular", "executable", "", "contents", content, ")"}
}

func link(target string) []string { return []string{"(", "type", "symlink", "target", target, ")"} }

func entry(name string, node []string) []string {
	return join([]string{"entry", "(", "name", name, "node"}, node, []string{")"})
}

func dir(entries ...[]string) []string {
	return join([]string{"(", "type", "directory"}, join(entries...), []string{")"})
}

func archive(node []string) []byte { return encode(join([]string{magic}, node)...) }

// nested is a directory of depth directories in one another.
func nested(depth int) []string {
	node := dir()
	for range depth - 1 {
		node = dir(entry("d", node))
	}
	return node
}

func goodArchives() map[string][]byte {
	return map[string][]byte{
		"empty file":        archive(file("")),
		"file":              archive(file("hello")),
		"large file":        archive(file(strings.Repeat("0123456789", 50_001))),
		"program":           archive(program("#!/bin/sh\n")),
		"link":              archive(link("../elsewhere")),
		"longest link":      archive(link(strings.Repeat("x", maxTarget))),
		"empty directory":   archive(dir()),
		"deepest directory": archive(nested(maxDepth)),
		"tree": archive(dir(
			entry("B", file("upper case sorts first")),
			entry("a", dir(entry("x", file("1")), entry("y", link("x")))),
			entry("a.b", program("2")),
			entry(strings.Repeat("n", maxName), file("3")),
			entry("\xff", file("4")),
		)),
	}
}

func TestCopyTakesExactlyOneArchive(t *testing.T) {
	for name, data := range goodArchives() {
		t.Run(name, func(t *testing.T) {
			for _, in := range []io.Reader{
				bytes.NewReader(append(bytes.Clone(data), "rest"...)),
				iotest.OneByteReader(bytes.NewReader(append(bytes.Clone(data), "rest"...))),
			} {
				src := wire.NewReader(in)
				var got bytes.Buffer
				n, err := Copy(&got, src)
				if err != nil || n != int64(len(data)) || !bytes.Equal(got.Bytes(), data) {
					t.Fatalf("Copy = %d, %v; copied %d bytes of %d", n, err, got.Len(), len(data))
				}
				rest, err := io.ReadAll(src)
				if string(rest) != "rest" || err != nil {
					t.Errorf("after the archive: %q, %v", rest, err)
				}
			}
		})
	}
}

func TestCopyRefusesWhatNixRefuses(t *testing.T) {
	badPadding := archive(file("abc"))
	badPadding[bytes.Index(badPadding, []byte("abc"))+3] = 1
	tests := map[string][]byte{
		"not an archive":         encode("nix-archive-2", "("),
		"text":                   []byte("error: path '/nix/store/x' is not valid\n"),
		"unknown type":           archive([]string{"(", "type", "fifo", ")"}),
		"no type":                archive([]string{"(", ")"}),
		"executable with value":  archive([]string{"(", "type", "regular", "executable", "1", "contents", "", ")"}),
		"file without contents":  archive([]string{"(", "type", "regular", ")"}),
		"contents twice":         archive([]string{"(", "type", "regular", "contents", "a", "contents", "b", ")"}),
		"padding not zero":       badPadding,
		"empty name":             archive(dir(entry("", file("")))),
		"name .":                 archive(dir(entry(".", file("")))),
		"name ..":                archive(dir(entry("..", file("")))),
		"name with slash":        archive(dir(entry("a/b", file("")))),
		"name with zero":         archive(dir(entry("a\x00", file("")))),
		"name too long":          archive(dir(entry(strings.Repeat("n", maxName+1), file("")))),
		"not sorted":             archive(dir(entry("b", file("")), entry("a", file("")))),
		"same name twice":        archive(dir(entry("a", file("")), entry("a", file("")))),
		"not sorted after a dir": archive(dir(entry("b", dir(entry("z", file("")))), entry("a", file("")))),
		"empty link":             archive(link("")),
		"link with zero":         archive(link("a\x00b")),
		"link too long":          archive(link(strings.Repeat("x", maxTarget+1))),
		"too deep":               archive(nested(maxDepth + 1)),
		"word instead of entry":  archive([]string{"(", "type", "directory", "name", ")"}),
		"entry without node":     archive([]string{"(", "type", "directory", "entry", "(", "name", "a", ")", ")"}),
	}
	for name, data := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := Copy(io.Discard, wire.NewReader(bytes.NewReader(data))); !errors.Is(err, ErrFormat) {
				t.Errorf("Copy = %v, want ErrFormat", err)
			}
		})
	}
}

func TestArchiveCutShortIsUnexpectedEOF(t *testing.T) {
	data := goodArchives()["tree"]
	for n := range data {
		_, err := Copy(io.Discard, wire.NewReader(bytes.NewReader(data[:n])))
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut after %d of %d bytes: %v, want unexpected EOF", n, len(data), err)
		}
	}
}

var errTest = errors.New("test")

// A limitedWriter fails after n bytes.
type limitedWriter struct{ n int }

func (w *limitedWriter) Write(p []byte) (int, error) {
	if len(p) > w.n {
		n := w.n
		w.n = 0
		return n, errTest
	}
	w.n -= len(p)
	return len(p), nil
}

func TestCopyReturnsTheWritersError(t *testing.T) {
	data := goodArchives()["large file"]
	for _, n := range []int{0, 8, 100_000, len(data) - 1} {
		got, err := Copy(&limitedWriter{n}, wire.NewReader(bytes.NewReader(data)))
		if !errors.Is(err, errTest) || got != int64(n) {
			t.Errorf("writer that takes %d bytes: Copy = %d, %v", n, got, err)
		}
	}
}

func FuzzCopy(f *testing.F) {
	for _, data := range goodArchives() {
		if len(data) < 10_000 {
			f.Add(data)
		}
	}
	f.Add(archive(dir(entry("b", file("")), entry("a", file("")))))
	f.Fuzz(func(t *testing.T, data []byte) {
		var got bytes.Buffer
		n, err := Copy(&got, wire.NewReader(bytes.NewReader(data)))
		if n != int64(got.Len()) || !bytes.HasPrefix(data, got.Bytes()) {
			t.Fatalf("copied %d bytes that are not the beginning of the input", n)
		}
		if err != nil {
			return
		}
		// What was taken is a whole archive by itself, and not one byte less is.
		if _, err := Copy(io.Discard, wire.NewReader(bytes.NewReader(data[:n]))); err != nil {
			t.Fatalf("the copy is refused: %v", err)
		}
		if _, err := Copy(io.Discard, wire.NewReader(bytes.NewReader(data[:n-1]))); err == nil {
			t.Fatal("the copy without its last byte is accepted")
		}
	})
}

func BenchmarkCopy(b *testing.B) {
	many := make([][]string, 0, 5000)
	for i := range 5000 {
		name := string([]byte{'a' + byte(i/676%26), 'a' + byte(i/26%26), 'a' + byte(i%26)})
		many = append(many, entry(name, file("a small file of some sixty bytes, as there are many of them")))
	}
	for _, bb := range []struct {
		name string
		data []byte
	}{
		{"one file of 64 MiB", archive(file(strings.Repeat("x", 64<<20)))},
		{"5000 small files", archive(dir(many...))},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.SetBytes(int64(len(bb.data)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Copy(io.Discard, wire.NewReader(bytes.NewReader(bb.data))); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestCopySizedWantsTheLengthAnnounced(t *testing.T) {
	nar := archive(dir(entry("a", file("12345678")), entry("b", file("12345678"))))
	size := uint64(len(nar))
	var huge bytes.Buffer // a file's header that claims more than there will be
	w := wire.NewWriter(&huge)
	for _, s := range []string{magic, "(", "type", "regular", "contents"} {
		w.String(s)
	}
	w.Uint64(1 << 60)
	w.Flush()
	tests := []struct {
		name string
		nar  []byte
		size uint64
		want error
	}{
		{"as announced", nar, size, nil},
		{"shorter", nar, size + 8, ErrSize},
		{"longer", nar, size - 8, ErrSize},
		{"much longer", nar, 16, ErrSize},
		{"a file that is longer", huge.Bytes(), size, ErrSize},
		{"any length", nar, math.MaxUint64, ErrSize},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			src := io.MultiReader(bytes.NewReader(tt.nar), iotest.ErrReader(errors.New("read on")))
			var dst bytes.Buffer
			n, err := CopySized(tt.size, &dst, wire.NewReader(src))
			if !errors.Is(err, tt.want) || n != int64(dst.Len()) || uint64(n) > tt.size {
				t.Errorf("CopySized = %d, %v with %d bytes written, want %v", n, err, dst.Len(), tt.want)
			}
		})
	}
}
