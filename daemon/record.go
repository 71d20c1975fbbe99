package daemon

import (
	"path/filepath"
	"strings"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"

	"nixdispatch/daemon/history"
	"nixdispatch/scheduler"
)

// An account is what a build has cost so far, all attempts together. It is the
// build's goroutine's own.
type account struct {
	attempts int

	queued, uploading, building, downloading time.Duration
	sent, received                           uint64
}

// A record is what is kept of builds that have ended. Either part may be nil: no
// build fails because its history cannot be written.
type record struct {
	rows *history.DB
	logs *keptLogs
}

// openRecord opens what is kept in the state directory. Ids of builds go on from
// there.
func (d *Daemon) openRecord() {
	rows, err := history.Open(filepath.Join(d.opts.StateDir, "history.db"), history.Limits{}, d.log)
	if err != nil {
		d.log.Error("no history of builds is kept", "err", err)
	} else {
		d.record.rows = rows
		last, err := rows.LastID()
		if err != nil {
			d.log.Error("builds are numbered from the beginning again", "err", err)
		}
		d.dispatcher.lastID = scheduler.BuildID(last)
	}
	logs, err := openKeptLogs(filepath.Join(d.opts.StateDir, "logs"), d.log)
	if err != nil {
		d.log.Error("no logs of builds are kept", "err", err)
		return
	}
	d.record.logs = logs
	d.dispatcher.lastID = max(d.dispatcher.lastID, scheduler.BuildID(logs.lastID()))
}

// close writes down what is not yet.
func (r *record) close() error {
	if r.rows == nil {
		return nil
	}
	return r.rows.Close()
}

// add writes down how a build ended.
func (r *record) add(b *build, o outcome) {
	if r.logs != nil {
		r.logs.keep(b.id, b.caller.uid, b.feed.log)
	}
	if r.rows == nil {
		return
	}
	if !b.queued.IsZero() {
		b.account.queued += time.Since(b.queued)
	}
	r.rows.Add(history.Row{
		ID:          uint64(b.id),
		DrvPath:     string(b.drvPath),
		System:      b.drv.Platform,
		Caller:      b.user,
		UID:         b.caller.uid,
		Machine:     o.machine,
		Status:      statusWords(o.status),
		Failed:      !o.status.Succeeded(),
		Error:       o.err,
		Attempts:    b.account.attempts,
		Ended:       time.Now(),
		Queued:      b.account.queued,
		Uploading:   b.account.uploading,
		Building:    b.account.building,
		Downloading: b.account.downloading,

		BytesSent:     b.account.sent,
		BytesReceived: b.account.received,
	})
}

// statusWords is a status in words, such as "permanent failure".
func statusWords(s dispatchv1.BuildStatus) string {
	name := strings.TrimPrefix(s.String(), "BUILD_STATUS_")
	return strings.ReplaceAll(strings.ToLower(name), "_", " ")
}
