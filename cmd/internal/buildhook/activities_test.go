package buildhook

import (
	"bytes"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/proto/hookcall"
	"nixdispatch/proto/nix/hook"
)

// shown plays events and returns what Nix is told, ids counted from 1.
func shown(machine string, events ...hookcall.Message) string {
	var out bytes.Buffer
	log := hook.NewLog(&out)
	a := newActivities(log, "/nix/store/d.drv", machine)
	for _, ev := range events {
		a.event(ev)
	}
	a.stopAll()
	log.Flush()
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
		hookcall.Queued{Reason: "all 4 slots are taken"},
		hookcall.Placed{Machine: "ssh://mac", Reason: "least load"},
		hookcall.Copying{Transfer: &hookcall.Transfer{Path: "/nix/store/in", PathBytesDone: 10, PathBytes: 40, Paths: 2, Bytes: 100}},
		hookcall.Copying{Transfer: &hookcall.Transfer{Path: "/nix/store/src", PathBytes: 60, PathsDone: 1, Paths: 2, BytesDone: 40, Bytes: 100}},
		hookcall.Building{},
		hookcall.Fetching{Transfer: &hookcall.Transfer{Path: "/nix/store/out", PathBytesDone: 5, PathBytes: 5, Paths: 1, Bytes: 5}},
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
	if got := shown("ssh://mac", hookcall.Placed{Machine: "ssh://mac", Reason: "first listed"}, hookcall.Building{}); got != "" {
		t.Errorf("told again what the reply said:\n%s", got)
	}
	got := shown("ssh://mac", hookcall.Placed{Machine: "ssh://mac", Reason: ""}, hookcall.Placed{Machine: "ssh://b", Reason: "ssh://mac went down"})
	if !strings.Contains(got, "building '/nix/store/d.drv' on 'ssh://b': ssh://mac went down") {
		t.Errorf("a move was not told:\n%s", got)
	}
}

func TestEveryActivityIsStopped(t *testing.T) {
	up := &hookcall.Transfer{Path: "p", Paths: 3, PathBytes: 1}
	all := []hookcall.Message{
		hookcall.Queued{Reason: "a"}, hookcall.Queued{Reason: "b"}, hookcall.Placed{Machine: "m", Reason: ""}, hookcall.Copying{Transfer: up}, hookcall.Fetching{Transfer: up}, hookcall.Copying{Transfer: nil},
		hookcall.Placed{Machine: "n", Reason: ""}, hookcall.Fetching{Transfer: up}, hookcall.Queued{Reason: "c"}, hookcall.Copying{Transfer: &hookcall.Transfer{Paths: 1}}, hookcall.Building{}, nil,
	}
	for n := range len(all) + 1 {
		got := shown("x", all[:n]...)
		if starts, stops := strings.Count(got, `"start"`), strings.Count(got, `"stop"`); starts != stops {
			t.Errorf("after %d events: %d started, %d stopped:\n%s", n, starts, stops, got)
		}
	}
}
