package buildhook

import (
	"os"
	"testing"
	"time"

	"google.golang.org/grpc"

	"nixdispatch/proto/dispatch/dispatchtest"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// patience bounds every wait of a test: the host may be busy.
const patience = 2 * time.Minute

// With these in its environment the test binary is a hook process, as Nix would
// start one.
const (
	asHookEnv       = "NIX_DISPATCH_TEST_AS_HOOK"
	hookPatienceEnv = "NIX_DISPATCH_TEST_PATIENCE"
	hookAnswerEnv   = "NIX_DISPATCH_TEST_ANSWER_TIMEOUT"
	hookAskAgainEnv = "NIX_DISPATCH_TEST_ASK_AGAIN"
)

func TestMain(m *testing.M) {
	if os.Getenv(asHookEnv) != "" {
		os.Exit(hookMain())
	}
	os.Exit(m.Run())
}

func hookMain() int {
	if os.Getenv(hookPatienceEnv) == "" && os.Getenv(hookAnswerEnv) == "" {
		return Main(os.Args[1:])
	}
	opts := newHookOptions()
	for name, set := range map[string]func(time.Duration){
		hookPatienceEnv: func(d time.Duration) { opts.patience = d },
		hookAnswerEnv:   func(d time.Duration) { opts.answerTimeout = d },
		hookAskAgainEnv: func(d time.Duration) { opts.askAgain, opts.askAgainTimeout = d, patience },
	} {
		if d, err := time.ParseDuration(os.Getenv(name)); err == nil {
			set(d)
		}
	}
	return run(os.Args[len(os.Args)-1], opts)
}

// A fakeDaemon answers hooks as a test says.
type fakeDaemon struct {
	dispatchv1.UnimplementedDispatchServiceServer
	hook func(hookStream) error

	socket string
	server *grpc.Server
}

type hookStream = grpc.BidiStreamingServer[dispatchv1.HookRequest, dispatchv1.HookResponse]

func (d *fakeDaemon) Hook(s hookStream) error { return d.hook(s) }

// start serves d on a socket until the test ends.
func (d *fakeDaemon) start(t testing.TB) *fakeDaemon {
	t.Helper()
	d.socket, d.server = dispatchtest.Serve(t, d)
	return d
}
