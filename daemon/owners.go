package daemon

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// maxOwners bounds how many users a build remembers as those who asked for it. Their
// numbers are in the name of its log's file, which has 255 bytes at most.
const maxOwners = 16

// owners are the user ids of those who asked for a build, the first one first: all of
// them may read what it prints. It is never changed in place.
type owners []uint32

// with adds a user, unless there are too many.
func (o owners) with(uid uint32) owners {
	if len(o) >= maxOwners || slices.Contains(o, uid) {
		return o
	}
	return append(slices.Clip(o), uid)
}

// String is the form in names of files, "1000-1001".
func (o owners) String() string {
	var b strings.Builder
	for n, uid := range o {
		if n > 0 {
			b.WriteByte('-')
		}
		b.WriteString(strconv.FormatUint(uint64(uid), 10))
	}
	return b.String()
}

// parseOwners reads what String writes.
func parseOwners(text string) (owners, error) {
	var o owners
	for word := range strings.SplitSeq(text, "-") {
		uid, err := strconv.ParseUint(word, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("%.100q is no list of users: %w", text, err)
		}
		if len(o) == maxOwners {
			return nil, fmt.Errorf("%.100q has more than %d users", text, maxOwners)
		}
		o = append(o, uint32(uid))
	}
	return o, nil
}

// mayRead tells whether the caller may read what a build has printed: one's own, and
// what root asked for. That is also what goes through nix-daemon, which shows its logs
// to everybody on the host.
func (c caller) mayRead(of owners) bool {
	return c.commands() || slices.Contains(of, c.uid) || slices.Contains(of, 0)
}
