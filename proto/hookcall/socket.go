package hookcall

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoAnswer is a daemon that did not say in time what was waited for.
var ErrNoAnswer = errors.New("it does not answer")

// A socket is a connected unix socket that is waited for by poll(2): no other
// goroutine, no timer and no poller of the runtime takes part.
type socket int

// connect connects to the socket at path, at most until deadline.
func connect(path string, deadline time.Time) (socket, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	// A connection to a full backlog waits as long as a write would.
	wait := unix.NsecToTimeval(int64(max(time.Until(deadline), time.Millisecond)))
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait)
	if err == nil {
		err = retried(func() error { return unix.Connect(fd, &unix.SockaddrUnix{Name: path}) })
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	switch {
	case err == nil:
		return socket(fd), nil
	case errors.Is(err, unix.EAGAIN):
		err = ErrNoAnswer
	default:
		err = &os.PathError{Op: "connect to", Path: path, Err: err}
	}
	unix.Close(fd) //nolint:errcheck // nothing was sent
	return -1, err
}

// wait waits until the socket is ready for events, one of unix.POLLIN and
// unix.POLLOUT, at most until deadline, whose passing is ErrNoAnswer.
func (s socket) wait(events int16, deadline time.Time) error {
	poll := []unix.PollFd{{Fd: int32(s), Events: events}} //nolint:gosec // a descriptor
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return ErrNoAnswer
		}
		n, err := unix.Poll(poll, int(left/time.Millisecond)+1)
		switch {
		case n > 0:
			return nil
		case err != nil && err != unix.EINTR: //nolint:errorlint // unwrapped
			return os.NewSyscallError("poll", err)
		}
	}
}

// read waits for something to read and reads what is there; 0 is the end.
func (s socket) read(p []byte, deadline time.Time) (n int, err error) {
	for {
		if err := s.wait(unix.POLLIN, deadline); err != nil {
			return 0, err
		}
		n, err = unix.Read(int(s), p)
		if err != unix.EAGAIN && err != unix.EINTR { //nolint:errorlint // unwrapped
			return max(n, 0), err
		}
	}
}

// write writes all of p.
func (s socket) write(p []byte, deadline time.Time) error {
	for len(p) > 0 {
		// A daemon that is gone is an error, not a signal.
		var n int
		err := retried(func() (err error) { n, err = unix.SendmsgN(int(s), p, nil, nil, unix.MSG_NOSIGNAL); return err })
		switch {
		case err == unix.EAGAIN: //nolint:errorlint // unwrapped
			if err := s.wait(unix.POLLOUT, deadline); err != nil {
				return err
			}
		case err != nil:
			return err
		default:
			p = p[n:]
		}
	}
	return nil
}

func (s socket) close() { unix.Close(int(s)) } //nolint:errcheck // nothing waits to be written

// retried calls fn until no signal interrupts it.
func retried(fn func() error) error {
	for {
		if err := fn(); err != unix.EINTR { //nolint:errorlint // unwrapped
			return err
		}
	}
}
