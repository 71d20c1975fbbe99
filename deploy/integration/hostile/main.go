// Command hostile does to nix-dispatchd what no honest member of its group does: the
// integration tests run it as a user beside honest users.
//
//	hostile [options] ATTACK
//
// It prints "under way" once the attack has its strength, and at the end how many things
// it tried and how many the daemon refused. It ends at a signal or after -for, talks only
// to the daemon's socket and its metrics listener, and what it opens is bounded.
package main

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// An attack tries one kind of thing until ctx ends.
type attack struct {
	name     string
	strength int64 // how many things it has tried once it is under way
	run      func(*attacker, context.Context)
}

var attacks = []attack{
	{"names", 50, (*attacker).names},
	{"listener", 500, (*attacker).listener},
	{"graphs", 8, (*attacker).graphs},
	{"repeats", 2, (*attacker).repeats},
	{"detached", 8, (*attacker).detached},
	{"joins", 10, (*attacker).joins},
	{"hooks", 500, (*attacker).hooks},
	{"questions", 500, (*attacker).questions},
	{"unread", 100, (*attacker).unread},
	{"half", 8, (*attacker).half},
	{"drips", 8, (*attacker).drips},
	{"huge", 4, (*attacker).huge},
	{"resets", 500, (*attacker).resets},
	{"connections", 500, (*attacker).connections},
	{"floods", 500, (*attacker).floods},
	{"pings", 8, (*attacker).pings},
}

// An attacker is what all attacks share. Its fields are set by the command line.
type attacker struct {
	socket  string
	metrics string
	graph   []string // derivations; no machine can build them
	big     string   // a derivation of a megabyte; likewise
	chatty  string   // a derivation that prints much
	paths   []string // paths that are not derivations, though they may be called so
	machine string   // one of the daemon's
	scale   int      // how many times as much of everything that is held

	strength int64
	mu       sync.Mutex
	tried    int64
	refused  map[string]int // by gRPC code
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "hostile:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	a := &attacker{refused: make(map[string]int)}
	flags := flag.NewFlagSet("hostile", flag.ExitOnError)
	flags.StringVar(&a.socket, "socket", "/run/nix-dispatch/socket", "")
	flags.StringVar(&a.metrics, "metrics", "127.0.0.1:9747", "")
	flags.StringVar(&a.big, "big", "", "")
	flags.StringVar(&a.chatty, "chatty", "", "")
	flags.StringVar(&a.machine, "machine", "", "")
	flags.IntVar(&a.scale, "scale", 1, "")
	graph := flags.String("graph", "", "file with a derivation in each line")
	names := flags.String("names", "", "with commas between them")
	last := flags.Duration("for", time.Minute, "")
	if err := flags.Parse(args); err != nil {
		return err
	}
	text, err := os.ReadFile(*graph)
	if err != nil {
		return err
	}
	a.graph, a.paths = strings.Fields(string(text)), strings.Split(*names, ",")
	n := slices.IndexFunc(attacks, func(t attack) bool { return t.name == flags.Arg(0) })
	if n < 0 {
		return fmt.Errorf("no attack is called %q", flags.Arg(0))
	}
	a.strength = attacks[n].strength
	// What the attack itself takes of the processors says nothing about the daemon.
	if err := syscall.Setpriority(syscall.PRIO_PROCESS, 0, 10); err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	ctx, cancel = context.WithTimeout(ctx, min(*last, 10*time.Minute))
	defer cancel()
	attacks[n].run(a, ctx)
	<-ctx.Done()
	fmt.Println(a)
	return nil
}

// did counts something that was tried, and whether the daemon refused it.
func (a *attacker) did(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.refused[status.Code(err).String()]++
	}
	if a.tried++; a.tried == a.strength {
		fmt.Println("under way")
	}
}

func (a *attacker) String() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "ended: %d tried", a.tried)
	for _, code := range slices.Sorted(maps.Keys(a.refused)) {
		fmt.Fprintf(&b, ", %d %s", a.refused[code], code)
	}
	return b.String()
}

// dial makes a connection of its own.
func (a *attacker) dial() (*grpc.ClientConn, dispatchv1.DispatchServiceClient) {
	conn, err := grpc.NewClient("unix:"+a.socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30)))
	if err != nil {
		panic(err) // the address is a constant
	}
	return conn, dispatchv1.NewDispatchServiceClient(conn)
}

// crowd has so many do the same again and again, each on a connection that it replaces now
// and then, and waits for them. n counts all that is done.
func (a *attacker) crowd(ctx context.Context, workers int, do func(ctx context.Context, c dispatchv1.DispatchServiceClient, n int) error) {
	var crowd sync.WaitGroup
	for worker := range workers {
		crowd.Go(func() {
			for n := worker; ctx.Err() == nil; {
				conn, client := a.dial()
				for range 100 {
					if ctx.Err() != nil {
						break
					}
					err := do(ctx, client, n)
					a.did(err)
					if err != nil {
						pause(ctx, time.Millisecond)
					}
					n += workers
				}
				conn.Close()
			}
		})
	}
	crowd.Wait()
}

// pause waits, or returns when ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
