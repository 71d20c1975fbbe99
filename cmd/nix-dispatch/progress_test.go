package main

import (
	"strings"
	"testing"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func TestBuildLogCutsLines(t *testing.T) {
	var l buildLog
	var lines []string
	for _, part := range []string{"a", "b\nc\r\n", "50%\r100%\n", "@nix {\"action\":\"setPhase\",\"phase\":\"buildPhase\"}\n", "\n", strings.Repeat("x", 3*maxLogLine), "\nend"} {
		lines = append(lines, l.write([]byte(part))...)
	}
	lines = append(lines, l.end()...)
	want := []string{"ab", "c", "100%", "", strings.Repeat("x", maxLogLine) + " [...]", "end"}
	if strings.Join(lines, "|") != strings.Join(want, "|") {
		t.Errorf("lines = %.200q, want %.200q", lines, want)
	}
	if l.phase != "buildPhase" {
		t.Errorf("phase = %q", l.phase)
	}
	if cap(l.partial) > 2*maxLogLine {
		t.Errorf("%d bytes kept of one line", cap(l.partial))
	}
}

func TestPaintShowsWhatRuns(t *testing.T) {
	p := newProgress(new(strings.Builder), false)
	defer p.close()
	p.plan(&dispatchv1.Plan{WillBuild: make([]string, 4)})
	send := func(drv string, ev *dispatchv1.BuildEvent) {
		ev.DrvPath = drv
		p.event(ev)
	}
	send("/nix/store/"+drvBase, placed("ssh://mac", ""))
	send("/nix/store/"+drvBase, copying(&dispatchv1.Transfer{PathsDone: 1, Paths: 3, BytesDone: 1 << 20, Bytes: 5 << 20}))
	send("b.drv", placed("", ""))
	send("b.drv", &dispatchv1.BuildEvent{Event: buildingEvent.Event})
	send("b.drv", logOf("@nix {\"action\":\"setPhase\",\"phase\":\"checkPhase\"}\ncompiling\n"))
	send("c.drv", queued("full"))
	send("d.drv", placed("ssh://b", ""))
	send("d.drv", finishedOf(dispatchv1.BuildStatus_BUILD_STATUS_MISC_FAILURE, "", "x"))
	got := p.paint(10)
	want := []string{
		"[0 of 4 built, 2 running, 1 queued, 1 failed]",
		"  hello on ssh://mac: copying 1 of 3 paths, 1.0 MiB of 5.0 MiB 0s",
		"  b: building (checkPhase) 0s  compiling",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("painted\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if got := p.paint(2); len(got) != 2 || got[1] != "  and 2 more" {
		t.Errorf("in two rows: %q", got)
	}
	if line := p.order[0].line(time.Now().Add(90 * time.Second)); !strings.Contains(line, "1m30s") {
		t.Errorf("after 90 s: %q", line)
	}
}

func TestFit(t *testing.T) {
	for _, tt := range []struct {
		in      string
		columns int
		want    string
	}{
		{"hello", 3, "hel"}, {"hello", 9, "hello"}, {"a\nb\tc", 9, "a b c"}, {"日本", 3, "日"}, {"x", -1, ""},
	} {
		if got := fit(tt.in, tt.columns); got != tt.want {
			t.Errorf("fit(%q, %d) = %q, want %q", tt.in, tt.columns, got, tt.want)
		}
	}
}

func placed(machine, reason string) *dispatchv1.BuildEvent {
	return &dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Placed{Placed: &dispatchv1.Placed{Machine: machine, Reason: reason}}}
}

func copying(t *dispatchv1.Transfer) *dispatchv1.BuildEvent {
	return &dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Copying{Copying: &dispatchv1.Copying{Transfer: t}}}
}

var buildingEvent = &dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Building{Building: &dispatchv1.Building{}}}

func queued(reason string) *dispatchv1.BuildEvent {
	return &dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Queued{Queued: &dispatchv1.Queued{Reason: reason}}}
}
