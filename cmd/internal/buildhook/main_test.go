package buildhook

import (
	"os"
	"testing"
	"time"

	"google.golang.org/grpc"

	"nixdispatch/cmd/internal/daemonsocket"
	"nixdispatch/proto/dispatch/dispatchtest"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// With these in its environment the test binary is a hook process, as Nix would
// start one.
const (
	asHookEnv       = "NIX_DISPATCH_TEST_AS_HOOK"
	hookPatienceEnv = "NIX_DISPATCH_TEST_PATIENCE"
	hookAnswerEnv   = "NIX_DISPATCH_TEST_ANSWER_TIMEOUT"
)

func TestMain(m *testing.M) {
	if os.Getenv(asHookEnv) != "" {
		os.Exit(hookMain())
	}
	os.Exit(m.Run())
}

func hookMain() int {
	patience, err := time.ParseDuration(os.Getenv(hookPatienceEnv))
	if err != nil {
		return Main(os.Args[1:])
	}
	answer, err := time.ParseDuration(os.Getenv(hookAnswerEnv))
	if err != nil {
		answer = time.Second
	}
	return run(os.Args[len(os.Args)-1],
		hookOptions{socket: daemonsocket.Path(), answerTimeout: answer, patience: patience})
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
