package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func TestExplain(t *testing.T) {
	var asked *dispatchv1.ExplainRequest
	d := (&fakeDaemon{explain: func(req *dispatchv1.ExplainRequest) (*dispatchv1.ExplainResponse, error) {
		asked = req
		return &dispatchv1.ExplainResponse{
			System: "x86_64-linux", Possible: true, Chosen: "ssh://mac", Why: "goes to ssh://mac", Text: "build for \x1b[2Jsystem\n  ssh://mac is eligible",
			Machines: []*dispatchv1.Verdict{{Machine: "ssh://mac", Reason: dispatchv1.VerdictReason_VERDICT_REASON_FEATURE_MISSING, Text: "no"}},
		}, nil
	}}).start(t)
	code, stdout, _ := runCommand(t.Context(), d.socket, "explain", "--system", "x86_64-linux", "--features", "kvm,big")
	if code != exitOK || !strings.HasSuffix(stdout, "\n  ssh://mac is eligible\n") || strings.ContainsRune(stdout, 0x1b) {
		t.Errorf("status %d, output %q", code, stdout)
	}
	if asked.GetSystem() != "x86_64-linux" || strings.Join(asked.GetFeatures(), " ") != "kvm big" {
		t.Errorf("asked %v", asked)
	}
	_, stdout, _ = runCommand(t.Context(), d.socket, "explain", "--json", helloDrv)
	if asked.GetDrvPath() != helloDrv || asked.GetSystem() != "" {
		t.Errorf("asked %v", asked)
	}
	var got map[string]any
	if err := json.Unmarshal([]byte(stdout), &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"system": "x86_64-linux", "features": []any{}, "possible": true, "chosen": "ssh://mac", "why": "goes to ssh://mac",
		"machines": []any{map[string]any{"uri": "ssh://mac", "reason": "feature_missing", "text": "no"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, args := range [][]string{
		{}, {helloDrv, otherDrv}, {helloDrv, "--system", "x"}, {"--features", "kvm"}, {"/etc/passwd"}, {helloDrv, "--features", "x"},
	} {
		if code, _, stderr := runCommand(t.Context(), d.socket, append([]string{"explain"}, args...)...); code != exitUsage || stderr == "" {
			t.Errorf("explain %q: status %d, said %q; want wrong usage", args, code, stderr)
		}
	}
}

func TestDrainAndUndrain(t *testing.T) {
	var asked []string
	d := (&fakeDaemon{drain: func(machine string, drained bool) (string, error) {
		if machine == "nobody" {
			return "", status.Error(codes.NotFound, "no such machine")
		}
		if drained {
			asked = append(asked, "drain")
		}
		asked = append(asked, machine)
		return "ssh://" + machine, nil
	}}).start(t)
	code, stdout, stderr := runCommand(t.Context(), d.socket, "drain", "mac", "nobody", "big")
	if code != exitFailed || !strings.Contains(stderr, "no such machine") || !strings.Contains(stdout, "ssh://big is drained; builds still on it: 2\n") {
		t.Errorf("drain: status %d, printed %q, said %q", code, stdout, stderr)
	}
	if code, stdout, _ := runCommand(t.Context(), d.socket, "undrain", "mac"); code != exitOK || stdout != "ssh://mac takes builds\n" {
		t.Errorf("undrain: status %d, printed %q", code, stdout)
	}
	if diff := cmp.Diff([]string{"drain", "mac", "drain", "big", "mac"}, asked); diff != "" {
		t.Errorf("asked (-want +got):\n%s", diff)
	}
	if code, _, _ := runCommand(t.Context(), d.socket, "drain"); code != exitUsage {
		t.Errorf("drain of nothing: status %d", code)
	}
}

func TestReload(t *testing.T) {
	d := (&fakeDaemon{reload: &dispatchv1.ReloadResponse{Machines: 3}}).start(t)
	if code, stdout, _ := runCommand(t.Context(), d.socket, "reload"); code != exitOK || stdout != "machines: 3\n" {
		t.Errorf("status %d, printed %q", code, stdout)
	}
	d.reload = &dispatchv1.ReloadResponse{Machines: 3, Errors: []*dispatchv1.MachineError{{Message: "m:1: bad\x1b"}}}
	code, _, stderr := runCommand(t.Context(), d.socket, "reload")
	if code != exitFailed || !strings.HasPrefix(stderr, "error: m:1: bad") || strings.ContainsRune(stderr, 0x1b) || !strings.Contains(stderr, "nothing was changed") {
		t.Errorf("status %d, said %q", code, stderr)
	}
	if code, _, _ := runCommand(t.Context(), d.socket, "reload", "x"); code != exitUsage {
		t.Errorf("reload with an operand: status %d", code)
	}
}

func TestEveryHelpHasAnExample(t *testing.T) {
	for _, c := range commands() {
		args := []string{c.Name, "--help"}
		switch c.Name {
		case "hook":
			continue // Nix runs it
		case "machines":
			args = []string{c.Name, "check", "--help"}
		}
		var out bytes.Buffer
		code := run(t.Context(), append([]string{"nix-dispatch"}, args...), stdio{out: &out, err: &out})
		if text := out.String(); code != exitOK || !strings.Contains(text, "Example") || !strings.Contains(text, "  nix-dispatch "+c.Name) {
			t.Errorf("%q: status %d, said:\n%s", args, code, text)
		}
	}
}
