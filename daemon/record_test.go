package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/scheduler"
)

// all reads a stream to its end.
func all[T any](t *testing.T, stream grpc.ServerStreamingClient[T], err error) (messages []*T, streamErr error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return messages, nil
		}
		if err != nil {
			return messages, err
		}
		messages = append(messages, m)
	}
}

// ended are the builds that have, the newest first: n of them.
func (s *site) ended(n int, req *dispatchv1.HistoryRequest) []*dispatchv1.FinishedBuild {
	s.t.Helper()
	stream, err := s.client.History(s.t.Context(), req)
	rows, err := all(s.t, stream, err)
	if err != nil || len(rows) != n {
		s.t.Fatalf("%d builds are in the history, want %d; error %v", len(rows), n, err)
	}
	return rows
}

func (s *site) log(req *dispatchv1.LogRequest) (string, error) {
	s.t.Helper()
	stream, err := s.client.Log(s.t.Context(), req)
	messages, err := all(s.t, stream, err)
	var text strings.Builder
	for _, m := range messages {
		text.Write(m.GetData())
	}
	return text.String(), err
}

func TestHistoryOfBuilds(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh-ng")
	s := newSite(t, m)
	good := s.drv("good", drvConfig{srcs: []nix.StorePath{s.source("src")}})
	good.log = []string{"one", "two"}
	s.mustBuild(good)
	s.ended(1, &dispatchv1.HistoryRequest{}) // rows come in the order of their ends
	bad := s.drv("bad", drvConfig{})
	bad.log = []string{"oh no"}
	bad.fail = &nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "exit code 3"}
	if st := s.build(bad); st.status() != dispatchv1.BuildStatus_BUILD_STATUS_PERMANENT_FAILURE {
		t.Fatalf("finished = %v", st.finished)
	}
	rows := s.ended(2, &dispatchv1.HistoryRequest{})
	if got := rows[1]; got.GetDrvPath() != string(good.path) || got.GetFailed() || got.GetStatus() != "built" || got.GetMachine() != m.uri() ||
		got.GetAttempts() != 1 || got.GetBytesSent() == 0 || got.GetBytesReceived() == 0 || got.GetBuilding().AsDuration() <= 0 ||
		got.GetUploading().AsDuration() <= 0 || got.GetDownloading().AsDuration() <= 0 || got.GetQueued().AsDuration() <= 0 {
		t.Errorf("row of the good build: %v", got)
	}
	if got := rows[0]; !got.GetFailed() || got.GetStatus() != "permanent failure" || !strings.Contains(got.GetError(), "exit code 3") {
		t.Errorf("row of the bad build: %v", got)
	}
	if got := s.ended(1, &dispatchv1.HistoryRequest{Failed: true}); got[0].GetDrvPath() != string(bad.path) {
		t.Errorf("failed: %v", got)
	}
	s.ended(1, &dispatchv1.HistoryRequest{Limit: 1})
	s.ended(0, &dispatchv1.HistoryRequest{Machine: "ssh://elsewhere"})

	for _, req := range []*dispatchv1.LogRequest{{BuildId: rows[0].GetId()}, {DrvPath: string(bad.path)}, {DrvPath: string(bad.path), Follow: true}} {
		if text, err := s.log(req); err != nil || text != "oh no\n" {
			t.Errorf("%v: log %q, %v", req, text, err)
		}
	}
	for _, req := range []*dispatchv1.LogRequest{{BuildId: 4711}, {DrvPath: string(s.path("none.drv"))}} {
		if _, err := s.log(req); status.Code(err) != codes.NotFound {
			t.Errorf("%v: %v, want NOT_FOUND", req, err)
		}
	}
	if _, err := s.log(&dispatchv1.LogRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no build: %v, want INVALID_ARGUMENT", err)
	}
}

func TestLogOfABuildInProgress(t *testing.T) {
	t.Parallel()
	goOn := make(chan struct{})
	m := oneMachine("ssh-ng")
	m.build = func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
		req.Log("early")
		<-goOn
		req.Log("late")
		return m.site.recipe(req.DrvPath).build(m.store, req)
	}
	s := newSite(t, m)
	r := s.drv("thing", drvConfig{})
	h := s.hook()
	id := h.accepted(r).GetBuildId()
	told := make(chan *story, 1)
	go func() { told <- h.finish() }()
	s.eventually("the first line is there", func() bool {
		text, err := s.log(&dispatchv1.LogRequest{BuildId: id})
		return err == nil && text == "early\n"
	})
	stream, err := s.client.Log(t.Context(), &dispatchv1.LogRequest{DrvPath: string(r.path), Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil || string(first.GetData()) != "early\n" {
		t.Fatalf("followed: %v, %v", first, err)
	}
	close(goOn)
	rest, err := all(t, stream, nil)
	var text string
	for _, part := range rest {
		text += string(part.GetData())
	}
	if err != nil || !strings.HasPrefix(text, "late\n") {
		t.Errorf("followed on: %q, %v", text, err)
	}
	(<-told).mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
}

// restart ends the daemon and starts another in its place.
func (s *site) restart() {
	s.t.Helper()
	s.stop()
	d, err := New(s.d.opts)
	if err != nil {
		s.t.Fatal(err)
	}
	d.stores.own.LocalStore, d.ssh = s.store(), s.d.ssh
	d.ssh.OnChange = d.hostChanged
	s.d = d
	s.run()
}

func TestBuildsAreNumberedOn(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh-ng"))
	r := s.drv("first", drvConfig{})
	r.log = []string{"kept"}
	first := s.hook()
	id := first.accepted(r).GetBuildId()
	first.finish()
	s.ended(1, &dispatchv1.HistoryRequest{})
	s.restart()
	second := s.hook()
	if got := second.accepted(s.drv("second", drvConfig{})).GetBuildId(); got <= id {
		t.Errorf("build %d after a restart, %d before", got, id)
	}
	second.finish()
	if text, err := s.log(&dispatchv1.LogRequest{BuildId: id}); err != nil || text != "kept\n" {
		t.Errorf("log of the build before the restart: %q, %v", text, err)
	}
}

func TestKeptLogsAreBounded(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "logs")
	k, err := openKeptLogs(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	long := newSpool(t.TempDir())
	line := []byte(strings.Repeat("x", 1<<20-1) + "\n")
	for range maxKeptLog>>20 + 4 {
		long.Write(line)
	}
	long.Write([]byte("the end\n"))
	k.keep(1, owners{1000}, newSpool(t.TempDir())) // says nothing
	const logs = maxKeptLogs/maxKeptLog + 2
	for id := range scheduler.BuildID(logs) {
		k.keep(id+2, owners{1000}, long)
	}
	if k.room > maxKeptLogs || k.lastID() != logs+1 {
		t.Errorf("%d bytes of logs are kept, the last of build %d", k.room, k.lastID())
	}
	names := func() (ids []string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			ids = append(ids, e.Name())
		}
		return ids
	}
	if got := names(); len(got) != len(k.order) || slices.Contains(got, "1-1000") || slices.Contains(got, "2-1000") {
		t.Errorf("files %v, want the last %d", got, len(k.order))
	}
	text, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("%d-1000", logs)))
	if err != nil || !strings.HasPrefix(string(text), "(the first ") || !strings.HasSuffix(string(text), "\nthe end\n") {
		t.Errorf("the log begins with %.40q and ends with %.20q, %v", text, text[max(0, len(text)-20):], err)
	}
	if err := os.WriteFile(filepath.Join(dir, "77.part"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := openKeptLogs(dir, slog.New(slog.DiscardHandler))
	if err != nil || again.room != k.room || again.lastID() != k.lastID() || slices.Contains(names(), "77.part") {
		t.Errorf("after a restart: %+v, %v, want as before", again, err)
	}
}
