package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Who belongs to a group, the kernel says of each caller. This file finds the number
// of a group by its name.

const (
	// groupLimit bounds a run of getent(1), which may ask a server.
	groupLimit = 5 * time.Second
	// groupInterval is how often getent is asked about groups that are not in
	// /etc/group.
	groupInterval = 5 * time.Minute
	// maxGroupLine bounds what getent may print: the line has all members in it.
	maxGroupLine = 1 << 20
	// groupUnknown is getent's exit status for a name that nobody knows.
	groupUnknown = 2
)

// A groupTable knows the numbers of groups. Those in /etc/group are looked up there
// each time. The program is static, so it cannot load the C library's modules for
// LDAP, SSSD and the like: about other groups it asks getent(1), at the start and
// every groupInterval. Safe for concurrent use.
type groupTable struct {
	names []string // of the groups that matter
	log   *slog.Logger

	mu    sync.Mutex
	asked map[string]uint32 // what getent said
	told  map[string]bool   // names that a warning was about
}

// newGroupTable makes one for the groups of these names; "" is no group.
func newGroupTable(log *slog.Logger, names ...string) *groupTable {
	t := &groupTable{log: log, asked: make(map[string]uint32), told: make(map[string]bool)}
	for _, name := range names {
		if name != "" {
			t.names = append(t.names, name)
		}
	}
	return t
}

// gid is the number of a group. It never waits for a server.
func (t *groupTable) gid(name string) (gid uint32, ok bool) {
	if gid, ok := groupInFile(name); ok {
		return gid, true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	gid, ok = t.asked[name]
	return gid, ok
}

// groupInFile looks a group up in /etc/group.
func groupInFile(name string) (gid uint32, ok bool) {
	group, err := user.LookupGroup(name)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(group.Gid, 10, 32)
	return uint32(n), err == nil
}

// refresh asks about the groups that are not in /etc/group. What was known stays
// where nobody answers.
func (t *groupTable) refresh(ctx context.Context) {
	for _, name := range t.names {
		if _, ok := groupInFile(name); ok {
			continue
		}
		gid, known, err := askGetent(ctx, name)
		if ctx.Err() != nil {
			return
		}
		t.learn(name, gid, known, err)
	}
}

func (t *groupTable) learn(name string, gid uint32, known bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case err != nil && !t.told[name]:
		t.told[name] = true
		t.log.Warn("cannot ask for a group that is not in /etc/group", "group", name, "err", err)
	case err != nil:
	case known:
		t.asked[name] = gid
		t.told[name] = false
	default:
		delete(t.asked, name)
	}
}

// watch refreshes until ctx ends, and calls changed after that.
func (t *groupTable) watch(ctx context.Context, changed func()) {
	for sleep(ctx, groupInterval) == nil {
		t.refresh(ctx)
		changed()
	}
}

// askGetent asks the C library's name services, as they are configured on this host.
func askGetent(ctx context.Context, name string) (gid uint32, known bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, groupLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "getent", "group", "--", name)
	cmd.WaitDelay = time.Second
	out := &boundedBuffer{limit: maxGroupLine}
	cmd.Stdout = out
	err = cmd.Run()
	exit, exited := errors.AsType[*exec.ExitError](err)
	switch {
	case ctx.Err() != nil:
		return 0, false, fmt.Errorf("getent has not answered within %v", groupLimit)
	case exited && exit.ExitCode() == groupUnknown:
		return 0, false, nil
	case err != nil:
		return 0, false, fmt.Errorf("getent: %w", err)
	}
	gid, err = parseGroupLine(out.String(), name)
	return gid, err == nil, err
}

// parseGroupLine reads "NAME:PASSWORD:GID:MEMBER,...".
func parseGroupLine(line, name string) (uint32, error) {
	fields := strings.SplitN(line, ":", 4)
	if len(fields) < 3 || fields[0] != name {
		return 0, fmt.Errorf("getent printed %.100q for the group %q", line, name)
	}
	gid, err := strconv.ParseUint(fields[2], 10, 32)
	if err != nil {
		return 0, fmt.Errorf("getent printed the number %.100q for the group %q", fields[2], name)
	}
	return uint32(gid), nil
}

// A boundedBuffer keeps the first bytes that are written to it.
type boundedBuffer struct {
	bytes.Buffer
	limit int
}

func (b *boundedBuffer) Write(p []byte) (int, error) {
	b.Buffer.Write(p[:min(len(p), b.limit-b.Len())])
	return len(p), nil
}
