package main

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func (d *fakeDaemon) Attach(req *dispatchv1.AttachRequest, s buildStream) error {
	if req.GetBuildId() != 17 {
		return status.Error(codes.NotFound, "no such build is in progress")
	}
	return d.build(&dispatchv1.BuildRequest{Detach: true}, s)
}

func TestDetachAndAttach(t *testing.T) {
	var asked *dispatchv1.BuildRequest
	d := (&fakeDaemon{build: func(req *dispatchv1.BuildRequest, s buildStream) error {
		asked = req
		return s.Send(&dispatchv1.BuildResponse{Message: &dispatchv1.BuildResponse_Detached{Detached: &dispatchv1.Detached{BuildId: 17}}})
	}}).start(t)
	code, stdout, stderr := runCommand(t.Context(), d.socket, "build", "--detach", "--priority", "-3", helloDrv)
	if code != exitOK || stdout != "17\n" || !strings.Contains(stderr, "nix-dispatch attach 17") || !asked.GetDetach() || asked.GetPriority() != -3 {
		t.Errorf("build --detach: status %d, %q, %q, asked %v", code, stdout, stderr, asked)
	}
	if code, stdout, _ := runCommand(t.Context(), d.socket, "build", "--detach", "--json", helloDrv); code != exitOK || stdout != "{\n  \"id\": 17\n}\n" {
		t.Errorf("build --detach --json: status %d, %q", code, stdout)
	}
	two := builtTwo(t)
	code, stdout, stderr = runCommand(t.Context(), two.socket, "attach", "17")
	if code != exitOK || stdout != helloOut+"\n"+helloDoc+"\n"+otherOut+"\n" || !strings.Contains(stderr, "ssh://mac") {
		t.Errorf("attach: status %d, %q, %q", code, stdout, stderr)
	}
	for _, tt := range []struct {
		args []string
		code int
		said string
	}{
		{[]string{"build", "--detach", "--out-link", "result", helloDrv}, exitUsage, "attach --out-link"},
		{[]string{"build", "--priority", "11", helloDrv}, exitUsage, "from -10 to 10"},
		{[]string{"attach"}, exitUsage, "want one build"},
		{[]string{"attach", "hello"}, exitUsage, "not the number"},
		{[]string{"attach", "18"}, exitFailed, "no such build"},
	} {
		if code, _, stderr := runCommand(t.Context(), d.socket, tt.args...); code != tt.code || !strings.Contains(stderr, tt.said) {
			t.Errorf("%q: status %d, %q; want %d and to be told %q", tt.args, code, stderr, tt.code, tt.said)
		}
	}
}
