package buildhook

import (
	"os"

	"golang.org/x/sys/unix"
)

// Files on disk are opened here as plain descriptors: an os.File would be offered
// to the runtime's poller, which takes eight system calls to find out that it has
// no use for it.

// openFile opens a file; it is not inherited.
func openFile(path string, flags int) (fd int, err error) {
	for {
		fd, err = unix.Open(path, flags|unix.O_CLOEXEC, 0)
		switch err { //nolint:errorlint // unwrapped
		case nil:
			return fd, nil
		case unix.EINTR:
		default:
			return -1, &os.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

func closeFile(fd int) { unix.Close(fd) } //nolint:errcheck // nothing waits to be written

// readFile reads a file, of which it returns limit bytes at most.
func readFile(path string, limit int) ([]byte, error) {
	fd, err := openFile(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer closeFile(fd)
	data := make([]byte, 0, min(limit, 8<<10))
	for len(data) < limit {
		if len(data) == cap(data) {
			data = append(data, 0)[:len(data)]
		}
		n, err := unix.Read(fd, data[len(data):min(cap(data), limit)])
		switch {
		case err == unix.EINTR: //nolint:errorlint // unwrapped
		case err != nil:
			return nil, &os.PathError{Op: "read", Path: path, Err: err}
		case n == 0:
			return data, nil
		default:
			data = data[:len(data)+n]
		}
	}
	return data, nil
}
