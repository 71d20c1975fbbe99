// Command fakemachine stands for nix-store or nix-daemon on a machine that breaks
// the protocol, in the way that the name it is run by says. The integration tests
// have it as the remote-program of machines.
package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/serve/servetest"
	"nixdispatch/proto/nix/wire"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/proto/nix/worker/workertest"
)

func main() {
	m := &machine{fault: filepath.Base(os.Args[0]), ng: slices.Contains(os.Args, "--stdio")}
	m.store.Build = m.build
	if err := m.serve(); err != nil {
		os.Stderr.WriteString("fakemachine: " + err.Error() + "\n")
		os.Exit(1)
	}
}

type machine struct {
	fault string
	ng    bool // speaks the worker protocol
	store wiretest.Store
	out   nix.StorePath // last built
}

// huge is a length that nobody has room for.
const huge = 1 << 60

func (m *machine) serve() error {
	var version wire.Version
	switch m.fault {
	case "ends-early":
		_, err := os.Stdout.Write([]byte{0xcb, 0xee, 0x52}[:2])
		return err
	case "too-old":
		version = wire.MakeVersion(1, 2)
		if !m.ng {
			version = wire.MakeVersion(2, 1)
		}
	case "too-new":
		version = wire.MakeVersion(9, 0)
	}
	if m.ng {
		s := &workertest.Server{Store: &m.store, Version: version}
		return s.Serve(os.Stdin, m)
	}
	s := &servetest.Server{Store: &m.store, Version: version}
	return s.Serve(os.Stdin, m)
}

// build answers a build in its own way.
func (m *machine) build(req wiretest.BuildRequest) nix.BuildResult {
	m.out = req.Drv.OutputPaths()["out"]
	info := m.store.PutFile(m.out, "made up\n")
	_, nar, _ := m.store.Get(m.out)
	switch m.fault {
	case "ends-mid-build":
		os.Stderr.WriteString("No space left on device\n")
		os.Exit(1)
	case "endless-text":
		m.endlessText()
	case "endless-list":
		m.raw(0, 0, 1, 0, 0, 0, huge) // built, no message, times, outputs
	case "wrong-hash":
		info.NarHash[0] ^= 1
	case "wrong-size":
		info.NarSize += 8
	case "more-than-said":
		info.NarSize -= 8
	case "false-reference":
		info.References = []nix.StorePath{"/nix/store/00000000000000000000000000000000-nowhere"}
	case "false-signature":
		// Another hash, too, so that the build goes elsewhere.
		info.Sigs, info.CA, info.Deriver = []string{"none"}, "fixed:r:sha256:"+info.NarHash.Base32(), "/nix/store/00000000000000000000000000000000-other.drv"
		info.NarHash[0] ^= 1
	case "climbs":
		nar = directoryNAR("../../../../tmp/climbed")
		info = wiretest.Info(m.out, nar)
	case "endless-stderr":
		m.endlessStderr()
	case "no-nar":
		nar = bytes.Repeat([]byte("garbage "), 20)
		info = wiretest.Info(m.out, nar)
	case "endless-file":
		// The length of the contents is the word before them.
		nar = bytes.Clone(nar)
		nar[bytes.Index(nar, []byte("made up\n"))-1] = 0x10
	case "no-output":
		m.store.Remove(m.out)
		return nix.BuildResult{Status: nix.Built}
	case "escapes":
		const text = "\x1b[2J\x1b]0;title\x07cleared\rback\x1b[31m red"
		req.Log(text)
		return nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: text}
	}
	m.store.Put(info, nar)
	return nix.BuildResult{Status: nix.Built}
}

// directoryNAR is a directory with an empty file of this name in it.
func directoryNAR(name string) []byte {
	var nar bytes.Buffer
	w := wire.NewWriter(&nar)
	for _, word := range []string{"nix-archive-1", "(", "type", "directory", "entry", "(", "name", name, "node",
		"(", "type", "regular", "contents", "", ")", ")", ")"} {
		w.String(word)
	}
	w.Flush() //nolint:errcheck // into memory
	return nar.Bytes()
}

// endlessStderr prints as fast as it can until nobody reads any more.
func (m *machine) endlessStderr() {
	block := bytes.Repeat([]byte("much to say\n"), 1<<12)
	for {
		if _, err := os.Stderr.Write(block); err != nil {
			os.Exit(1)
		}
	}
}

// endlessText begins a message that is as long as can be and goes on for 64 MiB.
func (m *machine) endlessText() {
	if m.ng {
		m.raw(0x6f6c6d67, huge) // a line of log
	} else {
		m.raw(3, huge) // a failure's message
	}
	for range 64 {
		os.Stdout.Write(bytes.Repeat([]byte("blah"), 1<<18)) //nolint:errcheck // ends with us
	}
	io.Copy(io.Discard, os.Stdin) //nolint:errcheck // until we are hung up on
	os.Exit(0)
}

func (m *machine) raw(words ...uint64) {
	w := wire.NewWriter(os.Stdout)
	for _, n := range words {
		w.Uint64(n)
	}
	w.Flush() //nolint:errcheck // the client notices
}

// Write sends what the server says, changed where the fault is there.
func (m *machine) Write(p []byte) (int, error) {
	switch m.fault {
	case "cut-nar":
		if i := bytes.Index(p, []byte("nix-archive-1")); i >= 0 {
			os.Stdout.Write(p[:i+40]) //nolint:errcheck // the client notices
			os.Exit(0)
		}
	case "more-paths":
		// The list of infos ends with an empty string: another one before it.
		if i := bytes.LastIndex(p, make([]byte, 8)); m.out != "" && i == len(p)-8 && bytes.Contains(p, []byte(m.out)) {
			one := bytes.ReplaceAll(p[:i], []byte(m.out.Base()), []byte("00000000000000000000000000000000"+m.out.Base()[32:]))
			return len(p), writeAll(slices.Concat(p[:i], one, p[i:]))
		}
	case "other-path":
		if m.out != "" {
			base := m.out.Base()
			return len(p), writeAll(bytes.ReplaceAll(p, []byte(base), []byte("00000000000000000000000000000000"+base[32:])))
		}
	}
	return os.Stdout.Write(p)
}

func writeAll(p []byte) error {
	_, err := os.Stdout.Write(p)
	return err
}
