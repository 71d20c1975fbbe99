package daemon

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"nixdispatch/daemon/history"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
)

var (
	errNoHistory = errors.New("no history of builds is kept; the log of nix-dispatchd says why")
	errNoLog     = errors.New("no log of such a build is kept")
	errEnough    = errors.New("enough")
)

// History tells of builds that have ended.
func (s *server) History(req *dispatchv1.HistoryRequest, stream grpc.ServerStreamingServer[dispatchv1.FinishedBuild]) error {
	if s.d.record.rows == nil {
		return toStatus(errNoHistory)
	}
	q := history.Query{Failed: req.GetFailed(), Machine: req.GetMachine()}
	if req.GetSince() != nil {
		q.Since = req.GetSince().AsTime()
	}
	c, _ := callerFrom(stream.Context())
	sent := uint32(0)
	err := s.d.record.rows.Each(q, func(r history.Row) error {
		if !c.mayRead(ownersOf(r)) {
			r.Error = firstLine(r.Error) // the end of the log follows
		}
		if err := stream.Send(finishedBuild(r)); err != nil {
			return err
		}
		if sent++; sent == req.GetLimit() {
			return errEnough
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return toStatus(err)
	}
	return nil
}

func finishedBuild(r history.Row) *dispatchv1.FinishedBuild {
	return &dispatchv1.FinishedBuild{
		Id:          r.ID,
		DrvPath:     r.DrvPath,
		System:      r.System,
		Caller:      r.Caller,
		Machine:     r.Machine,
		Status:      r.Status,
		Failed:      r.Failed,
		Error:       r.Error,
		Attempts:    uint32(r.Attempts), //nolint:gosec // a handful
		Ended:       timestamppb.New(r.Ended),
		Queued:      durationpb.New(r.Queued),
		Uploading:   durationpb.New(r.Uploading),
		Building:    durationpb.New(r.Building),
		Downloading: durationpb.New(r.Downloading),

		BytesSent:     r.BytesSent,
		BytesReceived: r.BytesReceived,
	}
}

// Log gives the log of a build.
func (s *server) Log(req *dispatchv1.LogRequest, stream grpc.ServerStreamingServer[dispatchv1.LogResponse]) error {
	c, _ := callerFrom(stream.Context())
	var drvPath nix.StorePath
	if req.GetBuildId() == 0 {
		var err error
		if drvPath, err = nix.ParseStorePath(req.GetDrvPath()); err != nil {
			return toStatus(fmt.Errorf("%w: %w", errBadRequest, err))
		}
	}
	if j := s.d.detached.find(req.GetBuildId()); j != nil {
		t, err := parseTarget(j.request.GetDerivations()[0])
		if err != nil {
			return toStatus(err)
		}
		req, drvPath = &dispatchv1.LogRequest{Follow: req.GetFollow()}, t.drvPath
	}
	if b, done := s.d.dispatcher.read(scheduler.BuildID(req.GetBuildId()), drvPath); b != nil {
		defer done()
		if !c.mayRead(s.d.dispatcher.ownersOf(b)) {
			return toStatus(errNotYours)
		}
		return b.sendLog(stream, req.GetFollow())
	}
	id := req.GetBuildId()
	if id == 0 {
		row, err := s.d.record.last(history.Query{DrvPath: string(drvPath)})
		if err != nil {
			return toStatus(err)
		}
		id = row.ID
	}
	text, err := s.d.record.openLog(id, c)
	if err != nil {
		return toStatus(err)
	}
	defer text.Close()
	return sendAll(stream, text)
}

// last is the last build that ended of those wanted. The error is errNoLog if there
// is none.
func (r *record) last(q history.Query) (row history.Row, err error) {
	if r.rows == nil {
		return row, errNoHistory
	}
	err = r.rows.Each(q, func(found history.Row) error {
		row = found
		return errEnough
	})
	switch {
	case err == nil:
		return row, errNoLog
	case errors.Is(err, errEnough):
		return row, nil
	default:
		return row, err
	}
}

// openLog opens the log of a build that has ended, for a caller. The log of a build
// that printed nothing is empty, and no file.
func (r *record) openLog(id uint64, c caller) (io.ReadCloser, error) {
	if r.logs != nil {
		file, err := r.logs.open(id, c)
		if !errors.Is(err, fs.ErrNotExist) {
			return file, err
		}
	}
	row, err := r.last(history.Query{ID: id})
	switch {
	case errors.Is(err, errNoHistory):
		return nil, errNoLog
	case err != nil:
		return nil, err
	case !c.mayRead(ownersOf(row)):
		return nil, errNotYours
	case !row.Silent:
		return nil, errNoLog
	default:
		return io.NopCloser(strings.NewReader("")), nil
	}
}

// sendLog sends what a build has printed, and with follow what it prints until it
// has ended.
func (b *build) sendLog(stream grpc.ServerStreamingServer[dispatchv1.LogResponse], follow bool) error {
	r := &spoolReader{s: b.feed.log}
	var c cursor
	for {
		news := b.feed.read(&c)
		if err := sendAll(stream, r); err != nil {
			return err
		}
		if news.outcome != nil || !follow {
			return nil
		}
		select {
		case <-news.changed:
		case <-stream.Context().Done():
			return toStatus(stream.Context().Err())
		}
	}
}

func sendAll(stream grpc.ServerStreamingServer[dispatchv1.LogResponse], r io.Reader) error {
	for {
		buf := make([]byte, logChunk) // the message keeps it
		n, err := r.Read(buf)
		if n > 0 {
			if err := stream.Send(&dispatchv1.LogResponse{Data: buf[:n]}); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return toStatus(err)
		}
	}
}
