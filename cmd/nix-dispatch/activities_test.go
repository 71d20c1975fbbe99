package main

import (
	"bytes"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix/hook"
)

func queued(reason string) *dispatchv1.BuildEvent {
	return &dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Queued{Queued: &dispatchv1.Queued{Reason: reason}}}
}

func placed(machine, reason string) *dispatchv1.BuildEvent {
	return &dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Placed{Placed: &dispatchv1.Placed{Machine: machine, Reason: reason}}}
}

func copying(t *dispatchv1.Transfer) *dispatchv1.BuildEvent {
	return &dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Copying{Copying: &dispatchv1.Copying{Transfer: t}}}
}

func fetching(t *dispatchv1.Transfer) *dispatchv1.BuildEvent {
	return &dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Fetching{Fetching: &dispatchv1.Fetching{Transfer: t}}}
}

var buildingEvent = &dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Building{Building: &dispatchv1.Building{}}}

// shown plays events and returns what Nix is told, ids counted from 1.
func shown(machine string, events ...*dispatchv1.BuildEvent) string {
	var out bytes.Buffer
	a := newActivities(hook.NewLog(&out), "/nix/store/d.drv", machine)
	for _, ev := range events {
		a.event(ev)
	}
	a.stopAll()
	base := uint64(os.Getpid()) << 32
	return regexp.MustCompile(`"(id|parent)":(\d+)`).ReplaceAllStringFunc(out.String(), func(s string) string {
		key, number, _ := strings.Cut(s, ":")
		if id, _ := strconv.ParseUint(number, 10, 64); id > base {
			return key + ":" + strconv.FormatUint(id-base, 10)
		}
		return s
	})
}

func TestActivitiesOfAQueuedBuild(t *testing.T) {
	got := shown("nix-dispatch",
		queued("all 4 slots are taken"),
		placed("ssh://mac", "least load"),
		copying(&dispatchv1.Transfer{Path: "/nix/store/in", PathBytesDone: 10, PathBytes: 40, Paths: 2, Bytes: 100}),
		copying(&dispatchv1.Transfer{Path: "/nix/store/src", PathBytes: 60, PathsDone: 1, Paths: 2, BytesDone: 40, Bytes: 100}),
		buildingEvent,
		fetching(&dispatchv1.Transfer{Path: "/nix/store/out", PathBytesDone: 5, PathBytes: 5, Paths: 1, Bytes: 5}),
	)
	want := `@nix {"action":"start","id":1,"level":4,"type":111,"text":"waiting for a machine to build '/nix/store/d.drv': all 4 slots are taken","parent":0}
@nix {"action":"stop","id":1}
@nix {"action":"start","id":2,"level":3,"type":0,"text":"building '/nix/store/d.drv' on 'ssh://mac'","parent":0}
@nix {"action":"start","id":3,"level":3,"type":103,"text":"copying 2 paths to 'ssh://mac'","parent":2}
@nix {"action":"result","id":3,"type":106,"fields":[100,100]}
@nix {"action":"start","id":4,"level":4,"type":100,"text":"copying path '/nix/store/in' to 'ssh://mac'","parent":3,"fields":["/nix/store/in","local","ssh://mac"]}
@nix {"action":"result","id":4,"type":105,"fields":[10,40,0,0]}
@nix {"action":"result","id":3,"type":105,"fields":[0,2,1,0]}
@nix {"action":"result","id":4,"type":105,"fields":[40,40,0,0]}
@nix {"action":"stop","id":4}
@nix {"action":"start","id":5,"level":4,"type":100,"text":"copying path '/nix/store/src' to 'ssh://mac'","parent":3,"fields":["/nix/store/src","local","ssh://mac"]}
@nix {"action":"result","id":5,"type":105,"fields":[0,60,0,0]}
@nix {"action":"result","id":3,"type":105,"fields":[1,2,1,0]}
@nix {"action":"result","id":5,"type":105,"fields":[60,60,0,0]}
@nix {"action":"stop","id":5}
@nix {"action":"result","id":3,"type":105,"fields":[2,2,0,0]}
@nix {"action":"stop","id":3}
@nix {"action":"start","id":6,"level":3,"type":103,"text":"copying 1 path from 'ssh://mac'","parent":2}
@nix {"action":"result","id":6,"type":106,"fields":[100,5]}
@nix {"action":"start","id":7,"level":4,"type":100,"text":"copying path '/nix/store/out' from 'ssh://mac'","parent":6,"fields":["/nix/store/out","ssh://mac","local"]}
@nix {"action":"result","id":7,"type":105,"fields":[5,5,0,0]}
@nix {"action":"result","id":6,"type":105,"fields":[0,1,1,0]}
@nix {"action":"stop","id":7}
@nix {"action":"stop","id":6}
@nix {"action":"stop","id":2}
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestActivitiesSayTheMachineOnlyWhenItIsNews(t *testing.T) {
	if got := shown("ssh://mac", placed("ssh://mac", "first listed"), buildingEvent); got != "" {
		t.Errorf("told again what the reply said:\n%s", got)
	}
	got := shown("ssh://mac", placed("ssh://mac", ""), placed("ssh://b", "ssh://mac went down"))
	if !strings.Contains(got, "building '/nix/store/d.drv' on 'ssh://b': ssh://mac went down") {
		t.Errorf("a move was not told:\n%s", got)
	}
}

func TestEveryActivityIsStopped(t *testing.T) {
	up := &dispatchv1.Transfer{Path: "p", Paths: 3, PathBytes: 1}
	all := []*dispatchv1.BuildEvent{
		queued("a"), queued("b"), placed("m", ""), copying(up), fetching(up), copying(nil),
		placed("n", ""), fetching(up), queued("c"), copying(&dispatchv1.Transfer{Paths: 1}), buildingEvent, {},
	}
	for n := range len(all) + 1 {
		got := shown("x", all[:n]...)
		if starts, stops := strings.Count(got, `"start"`), strings.Count(got, `"stop"`); starts != stops {
			t.Errorf("after %d events: %d started, %d stopped:\n%s", n, starts, stops, got)
		}
	}
}
