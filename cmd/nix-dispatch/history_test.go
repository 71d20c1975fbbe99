package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

var endedBuilds = []*dispatchv1.FinishedBuild{
	{Id: 8, DrvPath: otherDrv, System: "x86_64-linux", Machine: "ssh://mac", Status: "permanent failure", Failed: true,
		Error: "exit\x1b[31m code 3\nmore", Attempts: 2, Ended: timestamppb.New(time.Unix(1e9, 0)), Building: durationpb.New(1500 * time.Millisecond)},
	{Id: 7, DrvPath: helloDrv, System: "x86_64-linux", Machine: "ssh://b", Status: "built", Attempts: 1, Ended: timestamppb.New(time.Unix(1e9-60, 0)),
		Queued: durationpb.New(time.Second), Building: durationpb.New(2 * time.Second), BytesSent: 5},
}

func recorded(t *testing.T, asked *[]*dispatchv1.HistoryRequest) *fakeDaemon {
	return (&fakeDaemon{
		history: func(req *dispatchv1.HistoryRequest, s grpc.ServerStreamingServer[dispatchv1.FinishedBuild]) error {
			*asked = append(*asked, req)
			for _, b := range endedBuilds {
				if req.GetFailed() && !b.GetFailed() || req.GetMachine() == "ssh://none" {
					continue
				}
				if err := s.Send(b); err != nil {
					return err
				}
			}
			return nil
		},
		log: func(req *dispatchv1.LogRequest, s grpc.ServerStreamingServer[dispatchv1.LogResponse]) error {
			if req.GetBuildId() != 7 && req.GetDrvPath() != helloDrv {
				return status.Error(codes.NotFound, "no log of such a build is kept")
			}
			for _, part := range []string{"one\n", "two"} {
				if err := s.Send(&dispatchv1.LogResponse{Data: []byte(part)}); err != nil {
					return err
				}
			}
			return nil
		},
	}).start(t)
}

func TestHistoryIsShown(t *testing.T) {
	var asked []*dispatchv1.HistoryRequest
	d := recorded(t, &asked)
	code, out, stderr := runCommand(t.Context(), d.socket, "history")
	if code != 0 || stderr != "" {
		t.Fatalf("exit status %d, %q", code, stderr)
	}
	for _, want := range []string{"\n8 ", "permanent failure  1.5s", "exit code 3\n", "\n7 ", "built", "2.0s", "3.0s", "ssh://b", helloDrv} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	code, out, _ = runCommand(t.Context(), d.socket, "history", "--json", "--failed", "--since", "24h")
	var row historyJSON
	if err := json.Unmarshal([]byte(out), &row); code != 0 || err != nil || row.ID != 8 || !row.Failed || row.BuildSeconds != 1.5 {
		t.Errorf("exit status %d, %v, output %q", code, err, out)
	}
	if code, out, _ = runCommand(t.Context(), d.socket, "history", "--machine", "ssh://none", "--limit", "3"); code != 0 || out != "no such builds\n" {
		t.Errorf("without builds: exit status %d, output %q", code, out)
	}
	if asked[0].GetLimit() != 50 || asked[1].GetLimit() != 0 || asked[2].GetLimit() != 3 {
		t.Errorf("limits asked for: %v", asked)
	}
	if ago := time.Since(asked[1].GetSince().AsTime()); ago < 24*time.Hour || ago > 25*time.Hour {
		t.Errorf("asked for the last %v", ago)
	}
	if code, _, stderr := runCommand(t.Context(), d.socket, "history", "--since", "whenever"); code != exitUsage || !strings.Contains(stderr, `"whenever"`) {
		t.Errorf("bad time: exit status %d, %q", code, stderr)
	}
}

func TestParseSince(t *testing.T) {
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]time.Time{
		"90m":                  now.Add(-90 * time.Minute),
		"7d":                   now.AddDate(0, 0, -7),
		"2026-11-20":           time.Date(2026, 11, 20, 0, 0, 0, 0, time.Local),
		"2026-11-20T10:11":     time.Date(2026, 11, 20, 10, 11, 0, 0, time.Local),
		"2026-11-20T10:11:12Z": time.Date(2026, 11, 20, 10, 11, 12, 0, time.UTC),
	} {
		if got, err := parseSince(text, now); err != nil || !got.Equal(want) {
			t.Errorf("%s: %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "d", "-3h", "yesterday", "70000d"} {
		if got, err := parseSince(text, now); err == nil {
			t.Errorf("%q is read as %v", text, got)
		}
	}
}

func TestLogIsPrinted(t *testing.T) {
	var asked []*dispatchv1.HistoryRequest
	d := recorded(t, &asked)
	for _, build := range []string{"7", helloDrv} {
		if code, out, stderr := runCommand(t.Context(), d.socket, "log", build); code != 0 || out != "one\ntwo" {
			t.Errorf("%s: exit status %d, output %q, %q", build, code, out, stderr)
		}
	}
	if code, _, stderr := runCommand(t.Context(), d.socket, "log", "9"); code != exitFailed || !strings.Contains(stderr, "no log") {
		t.Errorf("no such build: exit status %d, %q", code, stderr)
	}
	for _, args := range [][]string{{"log"}, {"log", "0"}, {"log", "hello"}, {"log", "1", "2"}} {
		if code, _, _ := runCommand(t.Context(), d.socket, args...); code != exitUsage {
			t.Errorf("%v: exit status %d, want %d", args, code, exitUsage)
		}
	}
}

// On a terminal a log cannot move the cursor, set the title or forge a line.
func TestPlainWriterRemovesEscapes(t *testing.T) {
	var out strings.Builder
	w := &plainWriter{w: &out}
	for _, part := range []string{"one \x1b[2", "Jtwo\x1b]0;tit", "le\x07\nback\rred\x1b[31m", "\nlast"} {
		if n, err := w.Write([]byte(part)); n != len(part) || err != nil {
			t.Errorf("Write = %d, %v", n, err)
		}
	}
	w.end()
	if got, want := out.String(), "one two\nred\nlast\n"; got != want {
		t.Errorf("wrote %q, want %q", got, want)
	}
}
