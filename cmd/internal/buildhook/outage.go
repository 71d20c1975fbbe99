package buildhook

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nixdispatch/proto/hookcall"
	"nixdispatch/proto/nix/hook"
)

// An outage is what is known of a daemon out of reach.
type outage struct {
	began time.Time // zero while there is none
	asked time.Time // last
	// heard is set when it is known from an earlier hook process only.
	heard bool
	// stockTold is set once the user knows that the stock hook builds.
	stockTold bool
}

const (
	hookStateEnv = "NIX_DISPATCH_HOOK_STATE"
	// rootHookState is the directory for root's hooks, unless the environment
	// names another one.
	rootHookState = "/run/nix-dispatch-hook"
	// outageMemoryAge is how long an outage that nobody asked about is believed in.
	outageMemoryAge = 10 * time.Minute
)

// An outageMemory is a file by which the hook processes of one Nix tell each
// other of an outage. Nix starts another hook for every build that one took:
// without it each would wait, and complain, from the beginning. Having none is
// no error.
type outageMemory struct {
	dir  string // "" for none
	file string // see name
	used bool   // the file may be there
}

// newOutageMemory is the memory of the Nix that started this process.
func newOutageMemory() outageMemory {
	dir := os.Getenv(hookStateEnv)
	if dir == "" && os.Geteuid() == 0 {
		dir = rootHookState
	} else if dir == "" && os.Getenv("XDG_RUNTIME_DIR") != "" {
		dir = filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "nix-dispatch-hook")
	}
	return outageMemory{dir: dir}
}

// name is the file's path. It takes some reading in /proc, so that it is asked for
// only where there may be such a file.
func (m *outageMemory) name() string {
	if m.file == "" {
		parent := os.Getppid()
		m.file = filepath.Join(m.dir, fmt.Sprintf("outage-%d-%s", parent, startOf(parent)))
	}
	return m.file
}

// startOf is when a process was started, in the kernel's clock ticks: the id
// alone comes back. It is "" if there is no such process.
func startOf(pid int) string {
	stat, _ := readFile(fmt.Sprintf("/proc/%d/stat", pid), 4<<10)
	// The command's name, in parentheses, may hold anything.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 {
		return ""
	}
	return fields[19]
}

// recall is the outage that an earlier hook process met; zero if none did.
func (m *outageMemory) recall() outage {
	if m.dir == "" || unix.Access(m.dir, unix.F_OK) != nil {
		return outage{}
	}
	text, err := readFile(m.name(), 4<<10)
	if err != nil {
		return outage{}
	}
	m.used = true
	st, err := os.Stat(m.name())
	if err != nil || time.Since(st.ModTime()) > outageMemoryAge {
		return outage{}
	}
	began, told, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
	nanoseconds, err1 := strconv.ParseInt(began, 10, 64)
	stockTold, err2 := strconv.ParseBool(told)
	if err1 != nil || err2 != nil {
		return outage{}
	}
	return outage{began: time.Unix(0, nanoseconds), asked: st.ModTime(), heard: true, stockTold: stockTold}
}

// keep tells the hook processes to come.
func (m *outageMemory) keep(o outage) {
	if m.dir == "" {
		return
	}
	if !m.used {
		if err := os.MkdirAll(m.dir, 0o700); err != nil {
			return
		}
		dropOutages(m.dir)
	}
	m.used = true
	part := fmt.Sprintf("%s.%d", m.name(), os.Getpid())
	if err := os.WriteFile(part, fmt.Appendln(nil, o.began.UnixNano(), o.stockTold), 0o600); err != nil {
		return
	}
	if err := os.Rename(part, m.name()); err != nil {
		_ = os.Remove(part) // the next one may succeed
	}
}

// dropOutages removes what is left in dir of processes that have ended.
func dropOutages(dir string) {
	files, _ := filepath.Glob(filepath.Join(dir, "outage-*"))
	for _, file := range files {
		process := strings.Split(filepath.Base(file), "-")
		pid, err := strconv.Atoi(process[1])
		if err != nil || len(process) != 3 || startOf(pid) != strings.SplitN(process[2], ".", 2)[0] {
			_ = os.Remove(file)
		}
	}
}

// forget is for when the daemon has answered.
func (m *outageMemory) forget() {
	if m.used {
		_ = os.Remove(m.name())
		m.used = false
	}
}

// notAsked decides about a build without asking the daemon again so soon.
func (o *outage) notAsked(local bool, askAgain time.Duration) bool {
	return !o.began.IsZero() && (local && !o.heard || time.Since(o.asked) < askAgain)
}

// missed notes that the daemon could not be asked, now, for the given reason.
func (h *hookProcess) missed(reason string) {
	now := time.Now()
	if h.outage.began.IsZero() {
		h.outage.began = now
		h.warn(fmt.Sprintf("nix-dispatch: the daemon at %s is out of reach: %s; building what can be built locally", h.opts.socket, reason))
	}
	h.outage.asked, h.outage.heard = now, false
	h.memory.keep(h.outage)
}

// withoutDaemon decides during an outage.
func (h *hookProcess) withoutDaemon(try *hook.Try) decision {
	switch {
	case h.settings.CouldBuildLocally(try):
		return decision{action: hookcall.Decline}
	case time.Since(h.outage.began) < h.opts.patience:
		return decision{
			action: hookcall.Postpone,
			reason: fmt.Sprintf("nix-dispatch: '%s' waits for the daemon", try.DrvPath),
		}
	}
	told := h.outage.stockTold
	if !told {
		h.outage.stockTold = true
		h.memory.keep(h.outage)
	}
	return decision{
		action: hookcall.Stock, warn: !told,
		reason: fmt.Sprintf("nix-dispatch: the daemon has been out of reach for %v; using Nix's own build hook",
			time.Since(h.outage.began).Round(time.Second)),
	}
}
