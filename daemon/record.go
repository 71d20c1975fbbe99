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

// add adds what a second attempt has cost.
func (a *account) add(b account) {
	a.attempts += b.attempts
	a.queued += b.queued
	a.uploading += b.uploading
	a.building += b.building
	a.downloading += b.downloading
	a.sent += b.sent
	a.received += b.received
}

// A record is what is kept of builds that have ended. Either part may be nil: no
// build fails because its history cannot be written.
type record struct {
	rows *history.DB
	logs *keptLogs
}

// openRecord opens what is kept in the state directory. Ids of builds go on from
// there. No build may have begun.
func (d *Daemon) openRecord() {
	rows, err := history.Open(filepath.Join(d.opts.StateDir, "history.db"), history.Limits{}, d.log)
	if err != nil {
		d.log.Error("no history of builds is kept", "err", err)
	} else {
		d.record.rows = rows
		d.dispatcher.lastID = scheduler.BuildID(rows.LastID())
		d.dispatcher.idGiven = rows.Use
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

// conclude ends a build, in the order that the package's comment states. The
// build's goroutine calls it last.
func (d *Daemon) conclude(b *build, o outcome) {
	if !b.queued.IsZero() {
		b.account.queued += time.Since(b.queued)
	}
	row := finishedRow(b, o)
	var of owners
	d.dispatcher.remove(b, func() {
		row.Ended = time.Now()
		of = b.owners // nobody joins any more
		row.Sharers = of[1:]
		if d.record.rows != nil {
			d.record.rows.Add(row)
		}
		d.metrics.buildEnded(b, o)
	})
	b.feed.finish(o)
	if d.record.logs != nil {
		d.record.logs.keep(b.id, of, b.feed.log)
	}
	d.dispatcher.ended(b) // the log is read from its file now
}

// finishedRow is what the history keeps of a build, but for the moment of its end.
func finishedRow(b *build, o outcome) history.Row {
	return history.Row{
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
		Queued:      b.account.queued,
		Uploading:   b.account.uploading,
		Building:    b.account.building,
		Downloading: b.account.downloading,

		BytesSent:     b.account.sent,
		BytesReceived: b.account.received,
		Silent:        b.feed.log.length() == 0,
	}
}

// ownersOf are those who asked for a build that has ended.
func ownersOf(r history.Row) owners { return append(owners{r.UID}, r.Sharers...) }

// statusWords is a status in words, such as "permanent failure".
func statusWords(s dispatchv1.BuildStatus) string {
	name := strings.TrimPrefix(s.String(), "BUILD_STATUS_")
	return strings.ReplaceAll(strings.ToLower(name), "_", " ")
}
