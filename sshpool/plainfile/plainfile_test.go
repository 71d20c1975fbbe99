package plainfile

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a call that must not wait may take on a busy machine.
const patience = time.Minute

func TestRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(at("file"), []byte("1234"), 0o600))
	must(unix.Mkfifo(at("fifo"), 0o600))
	must(os.Mkdir(at("dir"), 0o700))
	l, err := net.Listen("unix", at("socket"))
	must(err)
	defer l.Close()
	for link, target := range map[string]string{
		"to-file": "file", "to-fifo": "fifo", "to-device": "/dev/zero", "to-terminal": "/dev/ptmx", "to-nothing": "nothing", "to-itself": "to-itself",
	} {
		must(os.Symlink(target, at(link)))
	}
	for _, tt := range []struct {
		name             string
		follow, noFollow error // nil: the contents
	}{
		{"file", nil, nil},
		{"fifo", ErrNotRegular, ErrNotRegular},
		{"dir", ErrNotRegular, ErrNotRegular},
		{"socket", ErrNotRegular, ErrNotRegular},
		{"nothing", fs.ErrNotExist, fs.ErrNotExist},
		{"to-file", nil, ErrNotRegular},
		{"to-fifo", ErrNotRegular, ErrNotRegular},
		{"to-device", ErrNotRegular, ErrNotRegular},
		{"to-terminal", ErrNotRegular, ErrNotRegular},
		{"to-nothing", fs.ErrNotExist, ErrNotRegular},
		{"to-itself", unix.ELOOP, ErrNotRegular},
	} {
		for how, read := range map[string]struct {
			f    func(string, int64) ([]byte, error)
			want error
		}{"Read": {Read, tt.follow}, "ReadNoFollow": {ReadNoFollow, tt.noFollow}} {
			data, err := inTime(t, func() ([]byte, error) { return read.f(at(tt.name), 4) })
			if !errors.Is(err, read.want) || (read.want == nil) != (string(data) == "1234") {
				t.Errorf("%s(%s) = %q, %v; want %v", how, tt.name, data, err, read.want)
			}
			if err != nil && !strings.Contains(err.Error(), at(tt.name)) {
				t.Errorf("%s(%s): the error %q does not name the file", how, tt.name, err)
			}
		}
	}
	if data, err := ReadNoFollow(at("file"), 3); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a file of 4 bytes with a limit of 3: %q, %v", data, err)
	}
}

// A name may lead to something else between the look and the open.
func TestOpenAfterTheFileWasReplaced(t *testing.T) {
	t.Parallel()
	for name, put := range map[string]func(name string) error{
		"a pipe":    func(name string) error { return unix.Mkfifo(name, 0o600) },
		"a link":    func(name string) error { return os.Symlink("file", name) },
		"a device":  func(name string) error { return os.Symlink("/dev/zero", name) },
		"a catalog": func(name string) error { return os.Mkdir(name, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			file, there := filepath.Join(dir, "file"), filepath.Join(dir, "there")
			if err := os.WriteFile(file, []byte("1234"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := put(there); err != nil {
				t.Fatal(err)
			}
			f, err := inTime(t, func() (*os.File, error) {
				return open(there, func(string) (fs.FileInfo, error) { return os.Stat(file) }, unix.O_NOFOLLOW)
			})
			if !errors.Is(err, ErrNotRegular) {
				t.Errorf("open = %v, %v; want ErrNotRegular", f, err)
			}
		})
	}
}

// inTime fails the test when f waits for something.
func inTime[T any](t *testing.T, f func() (T, error)) (T, error) {
	t.Helper()
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() { // a failure leaves it behind
		v, err := f()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-time.After(patience):
		t.Fatal("it waits")
		panic("unreachable")
	}
}
