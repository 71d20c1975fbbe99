package worker

import (
	"errors"
	"fmt"
	"io"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire"
)

var (
	// errNarSize is a NAR that is not as long as its path info says.
	errNarSize = errors.New("wrong NAR size")
	// errStopped tells the function that writes a NAR to stop: the server has
	// already answered that it does not want it.
	errStopped = errors.New("the server refused a path")
)

// A NarFunc writes the NAR of a path, exactly info.NarSize bytes. It is called
// from the goroutine that called the upload, for one path after the other. When
// w fails it should return soon; what it returns then does not matter.
type NarFunc = func(info *nix.PathInfo, w io.Writer) error

// Upload adds paths to the server's store, in order; references come before
// what refers to them. It sends one request after the other without waiting and
// reads the answers meanwhile, which takes as long as one request for all, and
// a path that is refused or valid already does not spoil the others.
//
// It returns how many paths, counted from the first, are confirmed to be valid.
// At the first failure it sends no more. If writeNar fails or writes the wrong length,
// Upload's error wraps writeNar's, and the client stays usable.
//
// With dontCheckSigs a server that trusts the user takes paths without a
// signature by a key that it trusts; one that does not trust the user silently
// checks.
func (c *Client) Upload(infos []nix.PathInfo, dontCheckSigs bool, writeNar NarFunc) (int, error) {
	const what = "add to store"
	if err := c.begin(what); err != nil {
		return 0, err
	}
	p := c.startPipe(len(infos), func(int) error { return c.answer(nil) })
	var err error // of the sending side
	last := 0
	for i := range infos {
		if p.stopped() {
			break
		}
		last = i
		if err = c.sendPath(p, &infos[i], dontCheckSigs, writeNar); err != nil {
			break
		}
	}
	werr := p.finish(c)
	if err = c.uploadError(p, err, werr); err != nil {
		if p.err != nil && p.answered < len(infos) {
			last = p.answered
		}
		err = fmt.Errorf("%s %s: %w", what, infos[last].Path, err)
		if p.broken || werr != nil {
			c.err = err
		}
	}
	return p.answered, err
}

// AddToStoreNar is [Client.Upload] of one path.
func (c *Client) AddToStoreNar(info *nix.PathInfo, dontCheckSigs bool, writeNar NarFunc) error {
	_, err := c.Upload([]nix.PathInfo{*info}, dontCheckSigs, writeNar)
	return err
}

// uploadError chooses the error that tells the cause: what went wrong on our
// side, if it did not just follow from what went wrong on the server's.
func (c *Client) uploadError(p *pipe, err, werr error) error {
	ours := err != nil && werr == nil && !errors.Is(err, errStopped)
	switch {
	case ours:
		return err
	case p.err != nil:
		return wire.UnexpectedEOF(p.err)
	case werr != nil:
		return werr
	default:
		return err
	}
}

func (c *Client) sendPath(p *pipe, info *nix.PathInfo, dontCheckSigs bool, writeNar NarFunc) error {
	nw := &narWriter{size: info.NarSize, pipe: p}
	var framed *wire.FramedWriter
	// The request is sent when the NAR's first byte comes, so that a NAR that
	// cannot be had costs nothing.
	nw.begin = func() io.Writer {
		p.sent <- struct{}{}
		c.w.Uint64(uint64(opAddToStoreNar))
		c.w.PathInfo(info)
		c.w.Bool(false) // repair
		c.w.Bool(dontCheckSigs)
		framed = wire.NewFramedWriter(c.w)
		return framed
	}
	err := nw.write(info, writeNar)
	if framed != nil {
		// Also after an error: the server reads on to the end of the stream, finds
		// the NAR incomplete and says so, and the connection is in order again.
		err = errors.Join(err, framed.Close())
	}
	return err
}

// AddMultipleToStore adds paths to the server's store in one request;
// references come before what refers to them. Either it confirms all of them or
// it fails, with some of them added. If writeNar fails the client stays usable.
//
// A path that is valid already garbles the request for servers before Nix
// 2.18, which do not skip its NAR. [Client.Upload] has no such trouble and takes
// no longer.
func (c *Client) AddMultipleToStore(infos []nix.PathInfo, dontCheckSigs bool, writeNar NarFunc) error {
	const what = "add paths to store"
	if err := c.begin(what); err != nil {
		return err
	}
	p := c.startPipe(1, func(int) error { return c.answer(nil) })
	p.sent <- struct{}{}
	c.w.Uint64(uint64(opAddMultipleToStore))
	c.w.Bool(false) // repair
	c.w.Bool(dontCheckSigs)
	framed := wire.NewFramedWriter(c.w)
	err := sendAll(framed, p, infos, writeNar)
	err = errors.Join(err, framed.Close())
	werr := p.finish(c)
	if err = c.uploadError(p, err, werr); err != nil {
		err = fmt.Errorf("%s: %w", what, err)
		if p.broken || werr != nil {
			c.err = err
		}
	}
	return err
}

func sendAll(framed *wire.FramedWriter, p *pipe, infos []nix.PathInfo, writeNar NarFunc) error {
	w := wire.NewWriter(framed)
	w.Uint64(uint64(len(infos)))
	for i := range infos {
		w.PathInfo(&infos[i])
		nw := &narWriter{size: infos[i].NarSize, pipe: p, begin: func() io.Writer { return w }}
		if err := nw.write(&infos[i], writeNar); err != nil {
			return fmt.Errorf("%s: %w", infos[i].Path, err)
		}
	}
	return w.Flush()
}

// narWriter checks the length of one NAR on its way.
type narWriter struct {
	begin func() io.Writer // called before the first byte
	dst   io.Writer
	pipe  *pipe
	size  uint64
	n     uint64
	err   error // of a Write, whatever the writer of the NAR made of it
}

func (w *narWriter) write(info *nix.PathInfo, writeNar NarFunc) error {
	err := writeNar(info, w)
	switch {
	case w.err != nil:
		return w.err
	case err != nil:
		return err
	case w.n != w.size:
		return fmt.Errorf("%w: NAR ended after %d of %d bytes", errNarSize, w.n, w.size)
	case w.dst == nil:
		return fmt.Errorf("%w: unknown", errNarSize)
	}
	return nil
}

func (w *narWriter) Write(p []byte) (int, error) {
	switch {
	case w.err != nil:
	case w.pipe.stopped():
		w.err = errStopped
	case uint64(len(p)) > w.size-w.n:
		w.err = fmt.Errorf("%w: NAR longer than %d bytes", errNarSize, w.size)
	case len(p) > 0:
		if w.dst == nil {
			w.dst = w.begin()
		}
		var n int
		n, w.err = w.dst.Write(p)
		w.n += uint64(n)
		return n, w.err
	}
	return 0, w.err
}
