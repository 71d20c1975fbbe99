package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"nixdispatch/proto/dispatch/dispatchtest"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

const (
	drvBase  = "s66mzxpvicwk07gjbjfw9izjfa797vsw-hello.drv"
	outBase  = "0c0qmlv2ixdxvsazmkg3aj2jh4ajx4m7-hello"
	docBase  = "1d1qmlv2ixdxvsazmkg3aj2jh4ajx4m7-hello-doc"
	helloDrv = "/nix/store/" + drvBase
	helloOut = "/nix/store/" + outBase
	helloDoc = "/nix/store/" + docBase
	otherDrv = "/nix/store/3d1qmlv2ixdxvsazmkg3aj2jh4ajx4m7-other.drv"
	otherOut = "/nix/store/4d1qmlv2ixdxvsazmkg3aj2jh4ajx4m7-other"
)

type buildStream = grpc.ServerStreamingServer[dispatchv1.BuildResponse]

// command runs a subcommand against a socket.
func runCommand(ctx context.Context, socket string, args ...string) (code int, stdout, stderr string) {
	var out, errOut bytes.Buffer
	args = append([]string{"nix-dispatch", args[0], "--socket", socket}, args[1:]...)
	code = run(ctx, args, stdio{in: strings.NewReader(""), out: &out, err: &errOut})
	return code, out.String(), errOut.String()
}

func eventOf(drv string, ev *dispatchv1.BuildEvent) *dispatchv1.BuildResponse {
	ev.DrvPath = drv
	return &dispatchv1.BuildResponse{Message: &dispatchv1.BuildResponse_Event{Event: ev}}
}

func logOf(text string) *dispatchv1.BuildEvent {
	return &dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Log{Log: &dispatchv1.Log{Data: []byte(text)}}}
}

func finishedOf(s dispatchv1.BuildStatus, machine, text string) *dispatchv1.BuildEvent {
	return &dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Finished{
		Finished: &dispatchv1.Finished{Status: s, Machine: machine, Error: text}}}
}

func summary(success bool, outputs ...*dispatchv1.Output) *dispatchv1.BuildResponse {
	return &dispatchv1.BuildResponse{Message: &dispatchv1.BuildResponse_Summary{
		Summary: &dispatchv1.Summary{Success: success, Outputs: outputs}}}
}

func output(drv, name, path string) *dispatchv1.Output {
	return &dispatchv1.Output{DrvPath: drv, Name: name, Path: path}
}

// builtTwo is a daemon that builds two derivations with three outputs.
func builtTwo(t testing.TB) *fakeDaemon {
	return (&fakeDaemon{build: func(_ *dispatchv1.BuildRequest, s buildStream) error {
		s.Send(&dispatchv1.BuildResponse{Message: &dispatchv1.BuildResponse_Plan{
			Plan: &dispatchv1.Plan{WillBuild: []string{helloDrv, otherDrv}, WillSubstitute: []string{helloOut}}}})
		s.Send(eventOf(helloDrv, queued("full")))
		s.Send(eventOf(helloDrv, placed("ssh://mac", "")))
		s.Send(eventOf(otherDrv, placed("", "builtin")))
		s.Send(eventOf(helloDrv, logOf("one\ntwo\x1b[2J\nthr")))
		s.Send(eventOf(helloDrv, logOf("ee")))
		s.Send(eventOf(helloDrv, finishedOf(dispatchv1.BuildStatus_BUILD_STATUS_BUILT, "ssh://mac", "")))
		s.Send(eventOf(otherDrv, finishedOf(dispatchv1.BuildStatus_BUILD_STATUS_BUILT, "", "")))
		return s.Send(summary(true, output(helloDrv, "out", helloOut), output(helloDrv, "doc", helloDoc), output(otherDrv, "out", otherOut)))
	}}).start(t)
}

func TestBuildPrintsOutputs(t *testing.T) {
	d := builtTwo(t)
	code, stdout, stderr := runCommand(t.Context(), d.socket, "build", helloDrv, otherDrv)
	if want := helloOut + "\n" + helloDoc + "\n" + otherOut + "\n"; code != exitOK || stdout != want {
		t.Errorf("status %d, output %q, want %q", code, stdout, want)
	}
	wantErr := "2 derivations to build\n1 path to fetch from substituters\n" +
		"building '" + helloDrv + "' on 'ssh://mac'\nbuilding '" + otherDrv + "' locally\n"
	if diff := cmp.Diff(wantErr, stderr); diff != "" {
		t.Errorf("progress (-want +got):\n%s", diff)
	}
}

func TestBuildPrintsLogs(t *testing.T) {
	_, _, stderr := runCommand(t.Context(), builtTwo(t).socket, "build", helloDrv, "-L")
	if want := "hello> one\nhello> two\nhello> three\n"; !strings.Contains(stderr, want) {
		t.Errorf("progress %q does not hold %q", stderr, want)
	}
}

func TestBuildPrintsJSON(t *testing.T) {
	_, stdout, _ := runCommand(t.Context(), builtTwo(t).socket, "build", "--json", helloDrv)
	var got any
	if err := json.Unmarshal([]byte(stdout), &got); err != nil {
		t.Fatal(err)
	}
	want := []any{
		map[string]any{"drvPath": helloDrv, "outputs": map[string]any{"out": helloOut, "doc": helloDoc}},
		map[string]any{"drvPath": otherDrv, "outputs": map[string]any{"out": otherOut}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestBuildSaysWhatItWants(t *testing.T) {
	var got *dispatchv1.BuildRequest
	d := (&fakeDaemon{build: func(req *dispatchv1.BuildRequest, s buildStream) error {
		got = req
		return s.Send(summary(true))
	}}).start(t)
	code, _, stderr := runCommand(t.Context(), d.socket, "build", helloDrv+"^out,doc", "--timeout", "90",
		"-k", "--max-silent-time=1m30s", "--builders-use-substitutes", "--builders", "ssh://mac", "--max-build-log-size", "5", "--", otherDrv+"!*")
	if code != exitOK {
		t.Fatalf("status %d: %s", code, stderr)
	}
	want := &dispatchv1.BuildRequest{
		Derivations: []string{helloDrv + "!out,doc", otherDrv}, KeepGoing: true, BuildersUseSubstitutes: true,
		Builders: proto.String("ssh://mac"),
		Limits:   &dispatchv1.Limits{Timeout: durationpb.New(90 * time.Second), MaxSilentTime: durationpb.New(90 * time.Second), MaxLogSize: 5},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
}

func TestBuildShowsWhyABuildFailed(t *testing.T) {
	d := (&fakeDaemon{build: func(_ *dispatchv1.BuildRequest, s buildStream) error {
		s.Send(eventOf(helloDrv, placed("ssh://mac", "")))
		for i := range 30 {
			s.Send(eventOf(helloDrv, logOf(fmt.Sprintf("line %d\n", i))))
		}
		s.Send(eventOf(helloDrv, finishedOf(dispatchv1.BuildStatus_BUILD_STATUS_PERMANENT_FAILURE, "ssh://mac", "builder failed with exit code 1")))
		return s.Send(summary(false))
	}}).start(t)
	code, stdout, stderr := runCommand(t.Context(), d.socket, "build", helloDrv)
	if code != exitFailed || stdout != "" {
		t.Errorf("status %d, output %q; want %d and nothing", code, stdout, exitFailed)
	}
	want := "error: build of '" + helloDrv + "' on 'ssh://mac' failed: builder failed with exit code 1\nlast 25 lines of its log:\n> line 5\n"
	if !strings.Contains(stderr, want) || !strings.HasSuffix(stderr, "> line 29\n") || strings.Contains(stderr, "line 4\n") {
		t.Errorf("progress:\n%s", stderr)
	}
}

func TestExitStatusTellsWhoseFaultItIs(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want int
		text string
	}{
		{status.Error(codes.InvalidArgument, "no output \"x\""), exitUsage, "no output"},
		{status.Error(codes.NotFound, "not valid"), exitFailed, "not valid"},
		{status.Error(codes.Unavailable, "shutting down"), exitUnreachable, "out of reach: shutting down"},
		{status.Error(codes.PermissionDenied, "not in the group"), exitUnreachable, "refuses: not in the group"},
		{nil, exitUnreachable, "without a summary"},
	} {
		d := (&fakeDaemon{build: func(*dispatchv1.BuildRequest, buildStream) error { return tt.err }}).start(t)
		code, _, stderr := runCommand(t.Context(), d.socket, "build", helloDrv)
		if code != tt.want || !strings.Contains(stderr, tt.text) {
			t.Errorf("%v: status %d, want %d; said %q", tt.err, code, tt.want, stderr)
		}
	}
	for _, sub := range [][]string{{"build", helloDrv}, {"status"}, {"cancel", "1"}} {
		code, _, stderr := runCommand(t.Context(), "/nonexistent/socket", sub...)
		if code != exitUnreachable || !strings.Contains(stderr, "no such file") {
			t.Errorf("%v without a daemon: status %d, said %q", sub, code, stderr)
		}
	}
}

func TestWrongUsage(t *testing.T) {
	for _, args := range [][]string{
		{"build"}, {"build", "/etc/passwd"}, {"build", helloOut}, {"build", helloDrv + "^"}, {"build", "--timeout", "soon", helloDrv},
		{"build", "--frobnicate", helloDrv}, {"status", "now"}, {"cancel"}, {"cancel", "all"}, {"cancel", "-1"},
	} {
		if code, stdout, stderr := runCommand(t.Context(), "/nonexistent/socket", args...); code != exitUsage || stdout != "" || stderr == "" {
			t.Errorf("%v: status %d, output %q, said %q; want %d and an explanation", args, code, stdout, stderr, exitUsage)
		}
	}
	for _, argv := range [][]string{{"nix-dispatch"}, {"nix-dispatch", "frobnicate"}} {
		if code := run(t.Context(), argv, stdio{out: io.Discard, err: io.Discard}); code != exitUsage {
			t.Errorf("%v: status %d, want %d", argv, code, exitUsage)
		}
	}
}

func TestInterruptEndsTheCall(t *testing.T) {
	began, ended := make(chan struct{}), make(chan struct{})
	d := (&fakeDaemon{build: func(_ *dispatchv1.BuildRequest, s buildStream) error {
		close(began)
		<-s.Context().Done()
		close(ended)
		return s.Context().Err()
	}}).start(t)
	go func() {
		<-began
		syscall.Kill(os.Getpid(), syscall.SIGINT)
	}()
	code, _, stderr := runCommand(t.Context(), d.socket, "build", helloDrv)
	if code != exitInterrupted || !strings.Contains(stderr, "interrupted") {
		t.Errorf("status %d, said %q", code, stderr)
	}
	<-ended
}

func TestResolveDerivation(t *testing.T) {
	store := t.TempDir()
	drv := filepath.Join(store, drvBase)
	if err := os.WriteFile(drv, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	if err := os.Symlink(drv, filepath.Join(work, "result.drv")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(helloOut, filepath.Join(work, "dangling")); err != nil {
		t.Fatal(err)
	}
	t.Chdir(work)
	rel, err := filepath.Rel(work, drv)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ operand, want string }{
		{drv, drv},
		{helloDrv, helloDrv}, // the daemon tells whether it is there
		{helloDrv + "!doc", helloDrv + "!doc"},
		{helloDrv + "^doc,out", helloDrv + "!doc,out"},
		{helloDrv + "^*", helloDrv},
		{"result.drv", drv},
		{"./result.drv^doc", drv + "!doc"},
		{rel, drv},
		{"dangling", ""},
		{"missing", ""},
		{"", ""},
		{"result.drv!", ""},
	} {
		got, err := resolveDerivation(tt.operand)
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("resolveDerivation(%q) = %q, %v, want %q", tt.operand, got, err, tt.want)
		}
	}
}

func TestHungDaemonIsOutOfReach(t *testing.T) {
	socket, _ := dispatchtest.Silent(t)
	ctx, cancel := context.WithTimeoutCause(t.Context(), 200*time.Millisecond, errors.New("test"))
	defer cancel()
	if _, err := dialReady(ctx, socket); status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("dialReady = %v", err)
	}
}
