package daemon

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
)

// reads calls Log, Attach and History for a build, and tells what came of each.
func (s *site) reads(t *testing.T, id uint64, by caller) (log, attach error, errorText string) {
	t.Helper()
	stream := streamOf[dispatchv1.LogResponse](t, by)
	log = (&server{d: s.d}).Log(&dispatchv1.LogRequest{BuildId: id}, stream)
	text := ""
	for _, m := range stream.sent {
		text += string(m.GetData())
	}
	if log == nil && !strings.Contains(text, "the secret") {
		t.Errorf("%v read the log, which has %q", by, text)
	}
	f, attach := s.d.dispatcher.joinByID(scheduler.BuildID(id), by)
	if attach == nil {
		f.leave(errCancelled)
	}
	rows := streamOf[dispatchv1.FinishedBuild](t, by)
	if err := (&server{d: s.d}).History(&dispatchv1.HistoryRequest{}, rows); err != nil {
		t.Fatal(err)
	}
	for _, r := range rows.sent {
		if r.GetId() == id {
			errorText = r.GetError()
		}
	}
	return log, attach, errorText
}

// All who asked for a build may read its log, attach to it and see why it failed: while
// it runs, when it has ended, and by the next daemon. Others may not, though root, who
// has not asked for it, watches.
func TestSharedBuildIsEverybodysWhoAsked(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh-ng")
	open := make(chan struct{})
	m.build = m.gated(open)
	s := newSite(t, m)
	bad := s.drv("bad", drvConfig{})
	bad.log = []string{"the secret"}
	bad.fail = &nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "builder failed;\nlast 1 log lines:\n> the secret"}
	alice, bob, carol, root := caller{uid: 1001}, caller{uid: 1002}, caller{uid: 1003}, caller{uid: 0}
	ended := make(chan error, 3)
	ask := func(by caller) (leave context.CancelFunc) {
		stream := streamOf[dispatchv1.BuildResponse](t, by)
		stream.ctx, leave = context.WithCancel(stream.ctx)
		go func() {
			ended <- (&server{d: s.d}).Build(&dispatchv1.BuildRequest{Derivations: []string{string(bad.path)}}, stream)
		}()
		return leave
	}
	callers := func() uint32 {
		for _, b := range s.status().GetBuilds() {
			return b.GetCallers()
		}
		return 0
	}
	leave := ask(alice)
	s.eventually("it is being built", func() bool { return m.building() == 1 })
	ask(bob)
	s.eventually("bob shares it", func() bool { return callers() == 2 })
	id := s.status().GetBuilds()[0].GetId()
	watcher, err := s.d.dispatcher.joinByID(scheduler.BuildID(id), root)
	if err != nil {
		t.Fatal(err)
	}
	b := s.findBuild("bad")
	for _, tt := range []struct {
		name string
		by   caller
		may  bool
	}{{"alice", alice, true}, {"bob", bob, true}, {"carol", carol, false}, {"root", root, true}} {
		if tt.may != tt.by.mayRead(s.d.dispatcher.ownersOf(b)) {
			t.Errorf("%s may read it: %v", tt.name, !tt.may)
		}
		f, err := s.d.dispatcher.joinByID(scheduler.BuildID(id), tt.by)
		if (err == nil) != tt.may || err != nil && !errors.Is(err, errNotYours) {
			t.Errorf("%s attaches: %v", tt.name, err)
		}
		if err == nil {
			f.leave(errCancelled)
		}
	}
	// Who has left does not end it for the other, who may.
	leave()
	watcher.leave(errCancelled)
	s.eventually("alice has left", func() bool { return callers() == 1 })
	if _, err := s.d.cancel(scheduler.BuildID(id), alice); !errors.Is(err, errNotYours) {
		t.Errorf("alice cancels what bob waits for: %v", err)
	}
	s.d.dispatcher.mu.Lock()
	if !b.onlyForLocked(bob.uid) {
		t.Error("bob may not cancel what only he waits for")
	}
	s.d.dispatcher.mu.Unlock()
	close(open)
	s.idle()
	for range 2 {
		<-ended
	}
	for _, when := range []string{"ended", "by the next daemon"} {
		for name, by := range map[string]caller{"alice": alice, "bob": bob, "carol": carol, "root": root} {
			log, _, text := s.reads(t, id, by)
			may := name != "carol"
			if (log == nil) != may || !may && status.Code(log) != codes.PermissionDenied {
				t.Errorf("%s, %s reads the log: %v", when, name, log)
			}
			if strings.Contains(text, "the secret") != may {
				t.Errorf("%s, %s sees %q in the history", when, name, text)
			}
		}
		if when == "ended" {
			s.restart()
		}
	}
}

func TestOwners(t *testing.T) {
	t.Parallel()
	o := owners{5}
	first := o
	for uid := range uint32(2 * maxOwners) {
		o = o.with(uid).with(uid)
	}
	if len(o) != maxOwners || o[0] != 5 || o[1] != 0 || len(first) != 1 {
		t.Errorf("owners %v, at first %v", o, first)
	}
	l := keptLog{id: 1<<64 - 1}
	for range maxOwners {
		l.of = append(l.of, 1<<32-1)
	}
	if name := l.name() + ".part"; len(name) > 255 {
		t.Errorf("the name of a log's file has %d bytes", len(name))
	}
	if got, ok := parseKeptLog(l.name()); !ok || got.id != l.id || !slices.Equal(got.of, l.of) {
		t.Errorf("%s is read as %+v, %v", l.name(), got, ok)
	}
	for name, want := range map[string]owners{
		"7-1000": {1000}, "7-1000-0": {1000, 0}, // as earlier versions wrote it, and as this one does
		"7": nil, "7-": nil, "7--1": nil, "07-1": nil, "7-01": nil, "7-1.part": nil, "7-4294967296": nil, "x-1": nil,
		l.name() + "-1": nil,
	} {
		if got, ok := parseKeptLog(name); ok != (want != nil) || ok && !slices.Equal(got.of, want) {
			t.Errorf("%q is read as %+v, %v", name, got, ok)
		}
	}
}
