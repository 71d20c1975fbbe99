package serve

import (
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"nixdispatch/proto/nix"
)

// errNarSize is a NAR that is not as long as its path info says, or has no
// length, which the server would refuse.
var errNarSize = errors.New("wrong NAR size")

// A NarFunc writes the NAR of a path, exactly info.NarSize bytes. It is called
// from the goroutine that called the upload, for one path after the other. When
// w fails it should return soon; what it returns then does not matter.
type NarFunc = func(info *nix.PathInfo, w io.Writer) error

// Upload adds paths to the server's store, in order; references come before
// what refers to them. All is sent without waiting; the answers are read
// meanwhile.
//
// It returns how many paths, counted from the first, are confirmed to be valid.
// If writeNar fails or writes the wrong length, Upload sends nothing more, and
// its error wraps writeNar's. The client stays usable only if the failing NAR
// was not yet begun, for the protocol has no way out of a NAR. See [Client.Err].
//
// The server does not check signatures. A path that is valid already is read
// and dropped.
func (c *Client) Upload(infos []nix.PathInfo, writeNar NarFunc) (int, error) {
	const op = "add to store"
	if err := c.begin(op); err != nil {
		return 0, err
	}
	a := c.awaitAcks(len(infos))
	var err error // of the sending side
	for i := range infos {
		if err = c.sendPath(&infos[i], writeNar, a); err != nil {
			err = fmt.Errorf("%s %s: %w", op, infos[i].Path, err)
			break
		}
		a.sent <- struct{}{}
	}
	// Also after an error: what was sent whole will be answered.
	ferr := c.w.Flush()
	close(a.sent)
	<-a.done

	switch {
	case a.err != nil:
		// The server's end is the cause; the sender only felt it.
		return a.count, c.fail(fmt.Sprintf("%s %s", op, infos[a.count].Path), a.err)
	case err != nil:
		if a.midNar || ferr != nil {
			c.err = err
		}
		return a.count, err
	case ferr != nil:
		return a.count, c.fail(op, ferr)
	}
	return a.count, nil
}

// acks is the reading side of an upload.
type acks struct {
	sent   chan struct{} // one for each path sent whole; room for all
	done   chan struct{} // closed when the reading has ended
	failed atomic.Bool   // the reading has failed: sending more is useless
	midNar bool          // set by the sender: it stopped inside a NAR

	// Valid once done is closed.
	count int
	err   error
}

// awaitAcks starts to read answers. It reads only those of paths that were sent
// whole: they will come, so it ends however the upload ends.
func (c *Client) awaitAcks(n int) *acks {
	a := &acks{sent: make(chan struct{}, n), done: make(chan struct{})}
	go func() {
		defer close(a.done)
		for range a.sent {
			ok := c.r.Uint64()
			if a.err = c.r.Err(); a.err == nil && ok != 1 {
				a.err = fmt.Errorf("the server answered %d instead of 1", ok)
			}
			if a.err != nil {
				a.failed.Store(true)
				return
			}
			a.count++
		}
	}()
	return a
}

func (c *Client) sendPath(info *nix.PathInfo, writeNar NarFunc, a *acks) error {
	if info.NarSize == 0 {
		return fmt.Errorf("%w: unknown", errNarSize)
	}
	nw := &narWriter{c: c, info: info, acks: a}
	err := writeNar(info, nw)
	switch {
	case nw.err != nil:
		err = nw.err
	case err == nil && nw.n != info.NarSize:
		err = fmt.Errorf("%w: NAR ended after %d of %d bytes", errNarSize, nw.n, info.NarSize)
	}
	a.midNar = err != nil && nw.n > 0
	return err
}

// narWriter sends the request when the NAR's first byte comes, so that a NAR
// that cannot be had costs nothing.
type narWriter struct {
	c    *Client
	info *nix.PathInfo
	acks *acks
	n    uint64
	err  error // of a Write, whatever the writer of the NAR made of it
}

var errServer = errors.New("the server stopped answering")

func (w *narWriter) Write(p []byte) (int, error) {
	switch {
	case w.err != nil:
	case w.acks.failed.Load():
		w.err = errServer
	case uint64(len(p)) > w.info.NarSize-w.n:
		w.err = fmt.Errorf("%w: NAR longer than %d bytes", errNarSize, w.info.NarSize)
	case len(p) > 0:
		if w.n == 0 {
			w.c.w.Uint64(cmdAddToStoreNar)
			w.c.w.PathInfo(w.info)
		}
		var n int
		n, w.err = w.c.w.Write(p)
		w.n += uint64(n)
		return n, w.err
	}
	return 0, w.err
}
