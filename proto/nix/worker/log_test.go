package worker_test

import (
	"testing"

	"nixdispatch/proto/nix/worker"
)

func TestBuildLogIsWhatTheBuilderWrote(t *testing.T) {
	text := func(s string) []worker.Field { return []worker.Field{{IsText: true, Text: s}} }
	for _, tt := range []struct {
		in   worker.Result
		want string
	}{
		{worker.Result{Type: worker.ResBuildLogLine, Fields: text("hello")}, "hello\n"},
		{worker.Result{Type: worker.ResBuildLogLine, Fields: text("")}, "\n"},
		{worker.Result{Type: worker.ResBuildLogLine, Fields: text("\xff raw")}, "\xff raw\n"},
		{worker.Result{Type: worker.ResSetPhase, Fields: text("buildPhase")}, "@nix {\"action\":\"setPhase\",\"phase\":\"buildPhase\"}\n"},
		{worker.Result{Type: worker.ResSetPhase, Fields: text("a\"\n\xff")}, "@nix {\"action\":\"setPhase\",\"phase\":\"a\\\"\\n\\ufffd\"}\n"},
		{worker.Result{Type: worker.ResProgress, Fields: []worker.Field{{Number: 1}}}, ""},
		{worker.Result{Type: worker.ResBuildLogLine}, ""},
		{worker.Result{Type: worker.ResBuildLogLine, Fields: []worker.Field{{Number: 1}}}, ""},
	} {
		if got := string(worker.AppendBuildLog(nil, tt.in)); got != tt.want {
			t.Errorf("AppendBuildLog(%+v) = %q, want %q", tt.in, got, tt.want)
		}
	}
}
