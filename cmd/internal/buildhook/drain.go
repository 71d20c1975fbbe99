package buildhook

import (
	"time"

	"golang.org/x/sys/unix"
)

const (
	// drainTimeout bounds how long the hook waits for Nix to read the last of
	// the log.
	drainTimeout = 10 * time.Second
	// firstDrainPoll and lastDrainPoll are how often the hook looks, at growing
	// intervals, where it cannot be told.
	firstDrainPoll = time.Millisecond
	lastDrainPoll  = 20 * time.Millisecond
)

// drain waits until Nix has read everything: it takes the first end of file on
// either pipe for the end of the build and drops what the other still holds.
func (h *hookProcess) drain() {
	h.log.Flush()
	end := time.Now().Add(drainTimeout)
	awaitRead(logWriteFD, end)
	awaitRead(unix.Stderr, end)
}

// awaitRead waits until the pipe whose write end is fd is empty, or nobody reads
// it, or it is no pipe, but not longer than until end.
//
// A busy Nix takes a while, and a hundred hooks that look time and again keep it
// from reading. So the kernel is to tell: a pipe with room for a single page, into
// which this one is made, can be written to only when it is empty (pipe_poll in
// Linux's fs/pipe.c). That may fail while more than a page is in it.
func awaitRead(fd int, end time.Time) {
	pause, tells := firstDrainPoll, true
	for unread(fd) > 0 {
		left := time.Until(end)
		if left <= 0 {
			return
		}
		if tells {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, 1); err == nil {
				poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}} //nolint:gosec // a descriptor
				n, _ := unix.Poll(poll, int(left/time.Millisecond)+1)        // a signal, mostly
				tells = n <= 0                                               // it was to be empty
				continue
			}
		}
		// time.Sleep would start the runtime's timers and poller for this alone.
		ts := unix.NsecToTimespec(int64(pause))
		unix.Nanosleep(&ts, nil) //nolint:errcheck // a signal only makes it shorter
		pause = min(2*pause, lastDrainPoll)
	}
}

// unread is how many bytes wait in the pipe whose write end is fd; 0 if it is no
// pipe or nobody reads it.
func unread(fd int) int {
	poll := []unix.PollFd{{Fd: int32(fd)}} //nolint:gosec // a descriptor
	if _, err := unix.Poll(poll, 0); err == nil && poll[0].Revents&unix.POLLERR != 0 {
		return 0
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	if err != nil {
		return 0
	}
	return n
}
