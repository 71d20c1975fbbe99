package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// These are single requests that are awkward by what they say.

// sometime is a context that ends at a random moment.
func sometime(ctx context.Context, most time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, rand.N(most))
}

// names has paths opened that should not be.
func (a *attacker) names(ctx context.Context) {
	names := append(a.paths, "/proc/self/fd/0", "/proc/self/fd/3", "/dev/zero", "/dev/stdin", "/nix/store/../../dev/zero",
		"/nix/store/"+strings.Repeat("../", 1000)+"dev/zero", "/nix/store/\x00.drv", "/nix/store/"+strings.Repeat("a", 1<<20)+".drv", "")
	a.crowd(ctx, 32, func(ctx context.Context, c dispatchv1.DispatchServiceClient, n int) error {
		ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
		name := names[n/4%len(names)]
		switch n % 4 {
		case 0:
			_, err := c.Explain(ctx, &dispatchv1.ExplainRequest{DrvPath: name})
			return err
		case 1:
			stream, err := c.Build(ctx, &dispatchv1.BuildRequest{Derivations: []string{name}})
			return drain(stream, err)
		case 2:
			stream, err := c.Log(ctx, &dispatchv1.LogRequest{DrvPath: name, Follow: true})
			return drain(stream, err)
		default:
			return a.hook(ctx, c, hello(), try(name))
		}
	})
}

// A stream is what the daemon sends.
type stream[M any] interface{ Recv() (M, error) }

// drain reads a stream to its end; err is that of the call.
func drain[M any](s stream[M], err error) error {
	for err == nil {
		_, err = s.Recv()
	}
	if err == io.EOF {
		return nil
	}
	return err
}

func hello() *dispatchv1.HookRequest {
	return &dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Hello{Hello: &dispatchv1.Hello{Builders: "@/etc/nix/machines"}}}
}

func try(drv string) *dispatchv1.HookRequest {
	return &dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Try{Try: &dispatchv1.Try{DrvPath: drv, System: "x86_64-linux"}}}
}

func start() *dispatchv1.HookRequest {
	return &dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Start{Start: &dispatchv1.Start{WantedOutputs: []string{"out"}}}}
}

// hook says all it has to say at once, and reads until the call or ctx ends.
func (a *attacker) hook(ctx context.Context, c dispatchv1.DispatchServiceClient, says ...*dispatchv1.HookRequest) error {
	s, err := c.Hook(ctx)
	if err != nil {
		return err
	}
	for _, m := range says {
		_ = s.Send(m) // Recv tells why not
	}
	return drain(s, nil)
}

// repeats names one large derivation 100,000 times in a request, and leaves.
func (a *attacker) repeats(ctx context.Context) {
	a.crowd(ctx, 2, func(ctx context.Context, c dispatchv1.DispatchServiceClient, n int) error {
		ctx, cancel := sometime(ctx, 2*time.Second)
		defer cancel()
		name := a.big
		if n%4 > 1 {
			name += "!out"
		}
		s, err := c.Build(ctx, &dispatchv1.BuildRequest{Derivations: slices.Repeat([]string{name}, 100_000), KeepGoing: n%2 == 0})
		return drain(s, err)
	})
}

// huge sends messages that are as large as they may be, and larger.
func (a *attacker) huge(ctx context.Context) {
	const most = 7 << 20
	long := strings.Repeat("x ", most/2)
	many := slices.Repeat([]string{"feature"}, most/9)
	machines := strings.Repeat("ssh://root@nowhere x86_64-linux - 1\n", most/36)
	var paths []string
	for n := range most / 50 {
		paths = append(paths, fmt.Sprintf("/nix/store/%032d-x.drv", n))
	}
	a.crowd(ctx, 4, func(ctx context.Context, c dispatchv1.DispatchServiceClient, n int) error {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		build := &dispatchv1.BuildRequest{Derivations: a.graph[:1]}
		switch n % 10 {
		case 0:
			build.Builders = &machines
		case 1:
			build.Builders, build.Detach = &machines, true
		case 2:
			build.Store = long
		case 3:
			build.Environment = strings.Fields(long)
		case 4:
			build.Derivations = paths
		case 5:
			build.Derivations = []string{a.graph[0] + "!" + strings.ReplaceAll(long, " ", ",")}
		case 6:
			_, err := c.Explain(ctx, &dispatchv1.ExplainRequest{System: "x86_64-linux", Features: many})
			return err
		case 7:
			m := hello()
			m.GetHello().Builders, m.GetHello().LocalFeatures = machines, []string{"x"}
			return a.hook(ctx, c, m, try(a.graph[0]))
		case 8:
			m := try(a.graph[0])
			m.GetTry().RequiredFeatures = many
			return a.hook(ctx, c, hello(), m)
		case 9:
			s, err := c.Log(ctx, &dispatchv1.LogRequest{DrvPath: long + long})
			return drain(s, err)
		}
		s, err := c.Build(ctx, build)
		return drain(s, err)
	})
}

// detached has megabytes kept for builds that nobody waits for, and cancels them at the
// end.
func (a *attacker) detached(ctx context.Context) {
	most := 8 * a.scale
	environment := slices.Repeat([]string{"NIX_STATE_DIR=" + strings.Repeat("x", 1<<20)}, 7)
	store := strings.Repeat("/", 7<<20)
	ids := make(chan uint64, 10_000)
	a.crowd(ctx, min(most, 16), func(ctx context.Context, c dispatchv1.DispatchServiceClient, n int) error {
		request := &dispatchv1.BuildRequest{Derivations: a.graph[:1+n%len(a.graph)], Detach: true}
		switch n % 4 {
		case 0, 1:
			request.Environment = environment
		case 2:
			request.Store = store
		default:
			request.Environment = []string{"HOME=" + store}
		}
		if n%8 == 7 { // one that is honest but for its number
			request.Environment = nil
		}
		if n > 1000 {
			pause(ctx, 100*time.Millisecond)
		}
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		s, err := c.Build(ctx, request)
		for err == nil {
			var m *dispatchv1.BuildResponse
			if m, err = s.Recv(); m.GetDetached() != nil {
				select {
				case ids <- m.GetDetached().GetBuildId():
				default:
				}
			}
		}
		if err == io.EOF {
			return nil
		}
		return err
	})
	conn, client := a.dial()
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	for len(ids) > 0 {
		_, _ = client.Cancel(ctx, &dispatchv1.CancelRequest{BuildId: <-ids}) // it may have ended
	}
}

// questions has very many ask what there is to know.
func (a *attacker) questions(ctx context.Context) {
	a.crowd(ctx, 200, func(ctx context.Context, c dispatchv1.DispatchServiceClient, n int) error {
		switch n % 8 {
		case 0:
			_, err := c.Machines(ctx, &dispatchv1.MachinesRequest{})
			return err
		case 1:
			_, err := c.Explain(ctx, &dispatchv1.ExplainRequest{DrvPath: a.graph[n%len(a.graph)]})
			return err
		case 2:
			s, err := c.History(ctx, &dispatchv1.HistoryRequest{})
			return drain(s, err)
		case 3:
			_, err := c.Cancel(ctx, &dispatchv1.CancelRequest{BuildId: rand.Uint64N(1000)})
			return err
		case 4:
			ctx, cancel := sometime(ctx, time.Second)
			defer cancel()
			s, err := c.Attach(ctx, &dispatchv1.AttachRequest{BuildId: rand.Uint64N(1000)})
			return drain(s, err)
		default:
			_, err := c.Status(ctx, &dispatchv1.StatusRequest{})
			return err
		}
	})
}

// pings has machines connected to.
func (a *attacker) pings(ctx context.Context) {
	a.crowd(ctx, 20, func(ctx context.Context, c dispatchv1.DispatchServiceClient, n int) error {
		if n%2 == 0 {
			var cancel context.CancelFunc
			ctx, cancel = sometime(ctx, time.Second)
			defer cancel()
		}
		s, err := c.Ping(ctx, &dispatchv1.PingRequest{Machine: a.machine, Claims: n%4 == 1})
		return drain(s, err)
	})
}
