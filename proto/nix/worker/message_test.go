package worker_test

import (
	"testing"

	"nixdispatch/proto/nix/worker"
)

func TestRemoteErrorIsQuotedWithoutColours(t *testing.T) {
	e := &worker.RemoteError{Message: "cannot add path '\x1b[35;1m/nix/store/x\x1b[0m'\nbecause\x1b[2J"}
	const want = `nix-daemon said: "cannot add path '/nix/store/x'\nbecause\x1b[2J"`
	if got := e.Error(); got != want {
		t.Errorf("Error() = %s, want %s", got, want)
	}
}
