package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"nixdispatch/proto/nix"
)

// A work is derivations nobody has, most of which can be built. Those that can
// copy an input into their output; the others fail, which is their own fault.
type work struct {
	name   string // in the names of all it makes
	good   int
	bad    int
	script string // what a builder does before it writes
	size   int    // of an input
	chain  int    // so many depend each on the one before; 0 for none
}

// A piece is one derivation of a work.
type piece struct {
	drv, out nix.StorePath
	want     []byte // contents of out
	fails    bool
}

// The files by which builders tell how far they are, on the host they run on, are
// called one of these, the name of their work and a number.
const (
	began = "/var/tmp/began-" // the builder runs
	ended = "/var/tmp/ended-" // its output is complete
)

// honest is what a builder that fails says.
const honest = "exit code 7"

// source is the input of a piece, which no other piece has.
func (w work) source(n int) []byte {
	line := fmt.Appendf(nil, "%s, piece %d\n", w.name, n)
	return bytes.Repeat(line, max(w.size, 100)/len(line)+1)
}

// instantiate puts the derivations into the client's store, which asks for much
// of them at once.
func (s *site) make(w work) []piece {
	s.t.Helper()
	var set, list strings.Builder
	dir := "/srv/chaos/" + w.name
	for n := range w.good + w.bad {
		source := fmt.Sprintf("%s/source-%s-%d", dir, w.name, n)
		s.write(source, string(w.source(n)))
		script, dep := w.script+"\ncat $src > $out", ""
		if n >= w.good {
			script = "echo this one cannot be built; exit 7"
		}
		if w.chain > 0 && n%w.chain > 0 {
			dep, script = fmt.Sprintf("before = p%d;", n-1), "test -s $before\n"+script
		}
		fmt.Fprintf(&list, "p%d ", n)
		fmt.Fprintf(&set, `p%[2]d = derivation {
			name = "%[1]s-%[2]d"; system = "x86_64-linux"; builder = "/bin/sh"; PATH = "/usr/bin:/bin"; src = %[3]s; %[4]s
			args = [ "-c" ''set -e
				: > %[5]s$name-$$
				%[6]s
				: > %[7]s$name-$$'' ];
		};
		`, w.name, n, source, dep, began, script, ended)
	}
	file := dir + "/default.nix"
	s.write(file, "with rec {\n"+set.String()+"};\n[ "+list.String()+"]")
	out, err := s.client.Run(s.t.Context(), "nix-instantiate", "--indirect", "--add-root", dir+"/drv", file)
	if err != nil {
		s.t.Fatalf("nix-instantiate: %v", err)
	}
	var drvs []string
	for root := range strings.FieldsSeq(out.Stdout) {
		drv, err := os.Readlink(s.client.Root() + root)
		if err != nil {
			s.t.Fatal(err)
		}
		drvs = append(drvs, drv)
	}
	if len(drvs) != w.good+w.bad {
		s.t.Fatalf("%d derivations, want %d", len(drvs), w.good+w.bad)
	}
	pieces := make([]piece, len(drvs))
	for n, drv := range drvs {
		pieces[n] = s.pieceOf(drv)
		pieces[n].want, pieces[n].fails = w.source(n), n >= w.good
	}
	return pieces
}

func (s *site) pieceOf(drvPath string) piece {
	s.t.Helper()
	text, err := s.client.ReadFile(drvPath)
	if err != nil {
		s.t.Fatal(err)
	}
	drv, err := nix.ParseDerivation(text)
	if err != nil {
		s.t.Fatalf("%s: %v", drvPath, err)
	}
	return piece{drv: nix.StorePath(drvPath), out: drv.OutputPaths()["out"]}
}

// A commission is a caller with what it asked for.
type commission struct {
	*launched
	pieces []piece
	began  time.Time
}

// paths are the derivations of pieces.
func paths(pieces []piece) []string {
	drvs := make([]string, len(pieces))
	for n, p := range pieces {
		drvs[n] = string(p.drv)
	}
	return drvs
}

// askNix has plain Nix build pieces, as user, all it can, and keep the outputs.
func (s *site) askNix(user string, pieces []piece, args ...string) *commission {
	s.t.Helper()
	root := fmt.Sprintf("%s/chaos-%p", home(user), &pieces[0])
	argv := append([]string{"nix-store", "--realise", "--keep-going", "--indirect", "--add-root", root}, args...)
	cmd, out := s.capture(context.WithoutCancel(s.t.Context()), user, append(argv, paths(pieces)...)...)
	return &commission{s.launchCommand("nix-store --realise as "+user, cmd, out), pieces, time.Now()}
}

// home is a user's home directory on every host.
func home(user string) string {
	if user == "root" {
		return "/root"
	}
	return "/home/" + user
}

// askDispatch has nix-dispatch build pieces, all it can, and keep the outputs if
// that is all of them.
func (s *site) askDispatch(pieces []piece) *commission {
	s.t.Helper()
	root := fmt.Sprintf("/root/chaos-%p", &pieces[0])
	args := append([]string{"build", "--keep-going", "--out-link", root}, paths(pieces)...)
	return &commission{s.launchDispatch(args...), pieces, time.Now()}
}

// A tally is what became of pieces asked for.
type tally struct {
	asked, built, failed int
	lost                 []string // neither built nor failed by their own fault, each with what is wrong
	took                 time.Duration
	hung                 bool // the caller had to be killed
}

func (t tally) String() string {
	text := fmt.Sprintf("%d asked, %d built, %d failed honestly", t.asked, t.built, t.failed)
	if len(t.lost) > 0 {
		text += fmt.Sprintf(", %d LOST", len(t.lost))
	}
	if t.hung {
		return text + fmt.Sprintf(", HUNG (killed after %.0f s)", t.took.Seconds())
	}
	return text + fmt.Sprintf(", %.1f s", t.took.Seconds())
}

// plus adds up two callers that asked at the same time.
func (t tally) plus(u tally) tally {
	return tally{
		asked: t.asked + u.asked, built: t.built + u.built, failed: t.failed + u.failed,
		lost: append(t.lost, u.lost...), took: max(t.took, u.took), hung: t.hung || u.hung,
	}
}

// result waits for a caller, kills it when it takes longer than within, and
// counts. What it asked for is looked for in the store, not in what it says.
func (c *commission) result(within time.Duration) tally {
	s := c.s
	s.t.Helper()
	t := tally{asked: len(c.pieces)}
	select {
	case <-c.done:
	case <-time.After(within - time.Since(c.began)):
		t.hung = true
		_ = c.cmd.Cancel()
		<-c.done
	}
	t.took = time.Since(c.began)
	printed, valid := c.out().Stderr, s.validOf(c.pieces)
	honestly := true
	for _, p := range c.pieces {
		got, err := s.client.ReadFile(string(p.out))
		switch said := tellsOfFailure(printed, p.drv); {
		case p.fails && said:
			t.failed++
			honestly = false
		case p.fails:
			t.lost = append(t.lost, fmt.Sprintf("%s: its failure is not told", p.drv))
		case !valid[p.out]:
			t.lost = append(t.lost, fmt.Sprintf("%s: not built", p.drv))
		case err != nil || !bytes.Equal(got, p.want):
			t.lost = append(t.lost, fmt.Sprintf("%s: %d bytes, want %d (%v)", p.out, len(got), len(p.want), err))
		default:
			t.built++
		}
	}
	if ok := c.cmd.ProcessState.ExitCode() == 0; !t.hung && len(t.lost) == 0 && ok != honestly {
		t.lost = append(t.lost, fmt.Sprintf("%s: %v, with %d built of %d", c.what, c.err, t.built, t.asked))
	}
	return t
}

// tellsOfFailure tells whether a failure is told, and why, in what a caller
// printed. Nix words it in several ways, over several lines.
func tellsOfFailure(printed string, drv nix.StorePath) bool {
	for rest := printed; ; {
		_, after, found := strings.Cut(rest, string(drv)+"'")
		if !found {
			return false
		}
		if strings.Contains(after[:min(len(after), 1000)], honest) {
			return true
		}
		rest = after
	}
}

// validOf tells which outputs are valid in the client's store, and have the
// contents that it recorded.
func (s *site) validOf(pieces []piece) map[nix.StorePath]bool {
	s.t.Helper()
	argv := []string{"sh", "-c", `for p; do nix-store --verify-path "$p" 2>/dev/null && echo "$p"; done; :`, "sh"}
	for _, p := range pieces {
		argv = append(argv, string(p.out))
	}
	out, err := s.client.Run(s.t.Context(), argv...)
	if err != nil {
		s.t.Fatal(err)
	}
	valid := make(map[nix.StorePath]bool)
	for path := range strings.FieldsSeq(out.Stdout) {
		valid[nix.StorePath(path)] = true
	}
	return valid
}
