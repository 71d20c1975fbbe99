// Package plainfile reads regular files whose names come from somebody else: a
// caller, a list of machines, a configuration of OpenSSH.
//
// Opening whatever stands at such a name is unsafe: the open of a FIFO waits for a
// writer and keeps a thread of the process meanwhile, a read from a terminal waits
// for input, and the mere open of some devices does something. So a file is looked
// at before it is opened, opened without waiting, and looked at again.
package plainfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// ErrNotRegular says that there is something else than a regular file at a name.
var ErrNotRegular = errors.New("not a regular file")

// ErrTooLarge says that a file is larger than its reader allows.
var ErrTooLarge = errors.New("file too large")

// Open opens a regular file for reading. It follows symbolic links, as
// configurations that consist of them need. The error is [ErrNotRegular] for
// anything else, which is never waited for. The caller must close the file.
func Open(name string) (*os.File, error) { return open(name, os.Stat, 0) }

// OpenNoFollow is Open, but a symbolic link at name is [ErrNotRegular], too. Links in
// the directories before it are followed.
func OpenNoFollow(name string) (*os.File, error) { return open(name, os.Lstat, unix.O_NOFOLLOW) }

// Read reads a file of at most limit bytes as Open opens it. The error is
// [ErrTooLarge] for a larger one.
func Read(name string, limit int64) ([]byte, error) {
	f, err := Open(name)
	if err != nil {
		return nil, err
	}
	return readAll(f, limit)
}

// ReadNoFollow is Read for a file that OpenNoFollow opens.
func ReadNoFollow(name string, limit int64) ([]byte, error) {
	f, err := OpenNoFollow(name)
	if err != nil {
		return nil, err
	}
	return readAll(f, limit)
}

func open(name string, stat func(string) (fs.FileInfo, error), flags int) (*os.File, error) {
	info, err := stat(name)
	if err != nil {
		return nil, err
	}
	if err := check(name, info); err != nil {
		return nil, err
	}
	// The name may lead elsewhere by now, so neither wait nor believe the above.
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|flags, 0)
	if errors.Is(err, unix.ELOOP) && flags != 0 {
		return nil, refused(name, "a symbolic link")
	}
	if err != nil {
		return nil, err
	}
	if info, err = f.Stat(); err == nil {
		err = check(name, info)
	}
	if err != nil {
		_ = f.Close() // nothing was read
		return nil, err
	}
	return f, nil
}

func check(name string, info fs.FileInfo) error {
	switch info.Mode().Type() {
	case 0:
		return nil
	case fs.ModeSymlink:
		return refused(name, "a symbolic link")
	case fs.ModeNamedPipe:
		return refused(name, "a pipe")
	case fs.ModeDir:
		return refused(name, "a directory")
	case fs.ModeSocket:
		return refused(name, "a socket")
	default:
		return refused(name, "a device")
	}
}

func refused(name, kind string) error {
	return &fs.PathError{Op: "open", Path: name, Err: fmt.Errorf("%w but %s", ErrNotRegular, kind)}
}

// readAll reads and closes f. A file may grow while it is read.
func readAll(f *os.File, limit int64) ([]byte, error) {
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, &fs.PathError{Op: "read", Path: f.Name(), Err: fmt.Errorf("%w: more than %d bytes", ErrTooLarge, limit)}
	}
	return data, nil
}
