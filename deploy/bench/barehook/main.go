// Command barehook is the least that a build hook written in Go can be: it says
// yes to everything at once, and leaves the rest to "bare importer". It takes no
// care of anything and is for measurements only.
//
// It has no package initialised but what the runtime needs, and one thread.
package main

import (
	"encoding/binary"
	"os"
	"syscall"
)

// importerSocket is where "bare importer" listens.
const importerSocket = "/run/bare-importer"

func main() {
	var in input
	for in.number() != 0 { // a setting follows
		in.text()
		in.text()
	}
	if string(in.text()) != "try" {
		return
	}
	in.number() // whether Nix could build it, too
	in.text()   // its system
	drvPath := append([]byte(nil), in.text()...)
	for range in.number() { // required features
		in.text()
	}
	syscall.Write(2, []byte("# accept\nbare\n")) //nolint:errcheck // then Nix is gone
	in.rest()
	if !ask(drvPath) {
		os.Exit(1)
	}
}

// ask has the outputs of a derivation imported.
func ask(drvPath []byte) bool {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil || syscall.Connect(fd, &syscall.SockaddrUnix{Name: importerSocket}) != nil {
		return false
	}
	if _, err := syscall.Write(fd, append(drvPath, '\n')); err != nil {
		return false
	}
	answer := make([]byte, 1)
	n, err := syscall.Read(fd, answer)
	return err == nil && n == 1 && answer[0] == '+'
}

// An input reads Nix's wire encoding from standard input. Nix is trusted.
type input struct {
	buf        [64 << 10]byte
	start, end int
}

// next returns the next n bytes, which stay valid until the next call.
func (in *input) next(n int) []byte {
	if in.start+n > len(in.buf) {
		in.end = copy(in.buf[:], in.buf[in.start:in.end])
		in.start = 0
	}
	for in.end-in.start < n {
		got, err := syscall.Read(0, in.buf[in.end:])
		if err == syscall.EINTR { //nolint:errorlint // unwrapped
			continue
		}
		if got <= 0 {
			os.Exit(0)
		}
		in.end += got
	}
	p := in.buf[in.start : in.start+n]
	in.start += n
	return p
}

func (in *input) number() uint64 { return binary.LittleEndian.Uint64(in.next(8)) }

func (in *input) text() []byte {
	n := int(in.number()) //nolint:gosec // Nix is trusted
	return in.next(n + -n&7)[:n]
}

// rest reads to the end.
func (in *input) rest() {
	for {
		n, err := syscall.Read(0, in.buf[:])
		if err != syscall.EINTR && n <= 0 { //nolint:errorlint // unwrapped
			return
		}
	}
}
