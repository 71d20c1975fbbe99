package integration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// hostileAttacks are those of the program hostile.
var hostileAttacks = []string{"names", "listener", "graphs", "repeats", "detached", "joins", "hooks", "questions",
	"unread", "half", "drips", "huge", "resets", "connections", "floods", "pings"}

const (
	// What one member of the group can cost others, at the median.
	hostileBuild  = time.Second            // more for a build that takes no time
	hostileStatus = 100 * time.Millisecond // more for root's Status
	// hostileMemory is what nix-dispatchd may have used at its worst.
	hostileMemory = 400_000_000
)

// TestHostile has alice, a member of the group, do to the daemon everything a caller
// can do, one thing after the other, while bob builds on real machines: the daemon stays,
// bob's builds are neither lost nor slow, root gets answers, and nothing is left of it.
func TestHostile(t *testing.T) {
	eachClient(t, func(t *testing.T, suite string) {
		s := newSite(t, siteConfig{client: suite, machines: []machineConfig{
			{name: "mac", columns: "x86_64-linux - 8"},
			{name: "mini", scheme: "ssh-ng", columns: "x86_64-linux - 8"},
		}})
		s.admit("alice", "bob")
		h := s.prepareHostile()
		pid := s.run("pgrep", "-x", "nix-dispatchd")
		others := overcommitted(t)
		before := h.measure("before")
		l := s.openLedger()
		under := make([]siteSpeed, len(hostileAttacks))
		for n, attack := range hostileAttacks {
			under[n] = h.suffer(attack)
			if peak := s.peakMemory() << 10; peak > hostileMemory {
				t.Errorf("%s: nix-dispatchd used %d MB of memory, want %d at most", attack, peak/1_000_000, hostileMemory/1_000_000)
			} else {
				t.Logf("%s: nix-dispatchd used %d MB of memory", attack, peak/1_000_000)
			}
			s.run("sh", "-c", "echo 5 >/proc/"+pid+"/clear_refs") // the peak begins again
		}
		quiet := before.and(h.measure("after"))
		for n, attack := range hostileAttacks {
			under[n].check(t, attack, quiet, others)
		}
		s.allDone(h.asked)
		if now := s.run("pgrep", "-x", "nix-dispatchd"); now != pid {
			t.Errorf("nix-dispatchd is process %s, %s before", now, pid)
		}
		l.settle(ledgerWait)
	})
}

// A hostileSite is a site with what the attacks need, and honest work.
type hostileSite struct {
	*site
	args  []string // of hostile
	quick []piece  // take no time
	load  []piece
	asked []*commission // the load, so far
}

const (
	loadPieces = 6 // of each attack: two chains
	loadChain  = 3
)

func (s *site) prepareHostile() *hostileSite {
	s.t.Helper()
	h := &hostileSite{site: s}
	rounds := len(hostileAttacks) + 2
	h.quick = s.make(work{name: "quick", good: rounds * quickBuilds()})
	h.load = s.make(work{name: "load", good: rounds * loadPieces, chain: loadChain, size: 20_000, script: "sleep 1"})
	graph := s.derivations(fmt.Sprintf(`builtins.genList (n: derivation { name = "graph-${toString n}"; builder = "/bin/sh";
		system = if n == 10 * (n / 10) && n < 200 then "x86_64-linux" else "m68k-linux";
		args = [ "-c" "sleep 0.2; echo > $out" ]; PATH = "/bin:/usr/bin"; }) %d`, shortOr(300, 3000)))
	s.write("/srv/graph", strings.Join(graph, "\n"))
	others := s.derivations(`[ (derivation { name = "big"; system = "m68k-linux"; builder = "/bin/sh";
		text = builtins.concatStringsSep "" (builtins.genList (n: "0123456789abcdef") 100000); }) ` +
		shell("chatty", "seq 1000000; echo > $out", "") + "]")
	h.args = []string{"-graph", "/srv/graph", "-big", others[0], "-chatty", others[1], "-machine", "ssh://root@mac",
		"-names", strings.Join(s.linksInTheStore(graph[0]), ","), "-scale", fmt.Sprint(shortOr(1, 4)), "-for", "5m"}
	return h
}

// linksInTheStore are what nix-store --add of links to a derivation leaves there: links
// whose targets have become a pipe and a device.
func (s *site) linksInTheStore(drv string) []string {
	s.t.Helper()
	for name, put := range map[string]string{"pipe": "mkfifo", "device": "ln -s /dev/zero"} {
		s.run("sh", "-c", fmt.Sprintf(`cd /srv; cp %[1]s target-%[2]s; ln -s /srv/target-%[2]s %[2]s.drv
			nix-store --add %[2]s.drv; rm target-%[2]s; %[3]s target-%[2]s`, drv, name, put)) // Nix may refuse the link, and leaves it
	}
	links := strings.Fields(s.run("find", "/nix/store", "-maxdepth", "1", "-type", "l", "-name", "*.drv"))
	if len(links) == 0 {
		s.t.Fatal("nix-store --add left no link")
	}
	return links
}

// suffer has an attack made, and measures under it.
func (h *hostileSite) suffer(attack string) siteSpeed {
	h.t.Helper()
	cmd, out := h.capture(h.t.Context(), "alice", slices.Concat([]string{programs + "/hostile"}, h.args, []string{attack})...)
	run := h.launchCommand("hostile "+attack, cmd, out)
	h.eventually(time.Minute, attack+" is under way", func() bool {
		select {
		case <-run.done:
			h.t.Fatalf("hostile %s: %v\n%s%s", attack, run.err, out().Stdout, out().Stderr)
		default:
		}
		return strings.Contains(out().Stdout, "under way")
	})
	speed := h.measure(attack)
	run.signal(syscall.SIGTERM)
	if code := run.wait(patience); code != 0 {
		h.t.Errorf("hostile %s: exit %d\n%s%s", attack, code, out().Stdout, out().Stderr)
	}
	h.t.Logf("%s: %s", attack, strings.TrimSpace(strings.TrimPrefix(out().Stdout, "under way\n")))
	if strings.Contains(out().Stdout, "\n0 joined") {
		h.t.Errorf("%s: no build was joined", attack)
	}
	return speed
}

// A siteSpeed is how long things take.
type siteSpeed struct {
	build  []time.Duration // one that takes no time, by plain Nix
	status []time.Duration // root's Status, on a connection of its own
	exec   []time.Duration // a program of Nix that has nothing to do with the daemon
}

func quickBuilds() int { return shortOr(3, 9) }

// measure has bob begin some work and then measures beside it.
func (h *hostileSite) measure(what string) siteSpeed {
	h.t.Helper()
	load := h.load[:loadPieces]
	h.load = h.load[loadPieces:]
	h.asked = append(h.asked, h.askNix("bob", load))
	quick := h.quick[:quickBuilds()]
	h.quick = h.quick[quickBuilds():]
	var got siteSpeed
	ctx, cancel := context.WithCancel(h.t.Context())
	var status sync.WaitGroup
	status.Go(func() {
		for ctx.Err() == nil || len(got.status) == 0 {
			took, err := h.timeStatus()
			if err != nil {
				h.t.Errorf("%s: root's Status: %v", what, err)
				return
			}
			got.status = append(got.status, took)
			time.Sleep(20 * time.Millisecond)
		}
	})
	for _, p := range quick {
		got.exec = append(got.exec, h.timeAsBob("nix-store", "--check-validity", string(p.drv)))
		got.build = append(got.build, h.timeAsBob("nix-store", "--realise", string(p.drv)))
	}
	cancel()
	status.Wait()
	h.t.Logf("%s: %s", what, got)
	return got
}

func (h *hostileSite) timeAsBob(argv ...string) time.Duration {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), patience)
	defer cancel()
	start := time.Now()
	if out, err := h.client.RunAs(ctx, "bob", argv...); err != nil {
		h.t.Errorf("%s as bob: %v\n%s", strings.Join(argv, " "), err, clip(out.Stderr))
	}
	return time.Since(start)
}

// timeStatus makes root's call as nix-dispatch status does, without starting a program.
func (h *hostileSite) timeStatus() (time.Duration, error) {
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	dial := func(ctx context.Context, _ string) (conn net.Conn, err error) {
		for ctx.Err() == nil { // a full backlog is waited for, as by nix-dispatch
			if conn, err = new(net.Dialer).DialContext(ctx, "unix", h.client.Root()+socket); !errors.Is(err, syscall.EAGAIN) {
				break
			}
			time.Sleep(time.Millisecond)
		}
		return conn, err
	}
	start := time.Now()
	conn, err := grpc.NewClient("passthrough:///nix-dispatchd", grpc.WithContextDialer(dial), grpc.WithAuthority("localhost"),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30)))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	_, err = dispatchv1.NewDispatchServiceClient(conn).Status(ctx, &dispatchv1.StatusRequest{MaxQueued: 100})
	return time.Since(start), err
}

func (v siteSpeed) String() string {
	return fmt.Sprintf("a build %v, status %v, another program %v",
		median(v.build).Round(time.Millisecond), median(v.status).Round(time.Millisecond/10), median(v.exec).Round(time.Millisecond))
}

// and is both together.
func (v siteSpeed) and(u siteSpeed) siteSpeed {
	return siteSpeed{slices.Concat(v.build, u.build), slices.Concat(v.status, u.status), slices.Concat(v.exec, u.exec)}
}

// check compares what was measured under an attack with what was without. Whatever makes
// the whole computer slow, such as other tests beside this one, is not the daemon's doing.
func (v siteSpeed) check(t *testing.T, attack string, quiet siteSpeed, others float64) {
	t.Helper()
	if !nightly {
		return // other tests run beside this one, whose share of the processors nobody knows
	}
	slower := others * max(1, float64(median(v.exec))/float64(median(quiet.exec)))
	for _, c := range []struct {
		what         string
		got, without time.Duration
		more         time.Duration
	}{
		{"a build that takes no time", median(v.build), median(quiet.build), hostileBuild},
		{"root's Status", median(v.status), median(quiet.status), hostileStatus},
	} {
		if most := time.Duration(float64(c.without+c.more) * slower); c.got > most {
			t.Errorf("%s: %s takes %v at the median and %v without; the most is %v, with a computer that is %.1f times slower",
				attack, c.what, c.got, c.without, most, slower)
		}
	}
}

// overcommitted is how many times as much as the processors can do is going on already: a
// program that has had its share of them, such as a daemon under attack, waits so much
// longer for more. It is 4 at most, or nothing would be checked.
func overcommitted(t *testing.T) float64 {
	t.Helper()
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		t.Fatal(err)
	}
	var load float64
	if _, err := fmt.Sscan(string(text), &load); err != nil {
		t.Fatal(err)
	}
	return min(max(1, load/float64(runtime.NumCPU())), 4)
}

func median(all []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[len(sorted)/2]
}
