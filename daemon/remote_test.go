package daemon

import (
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestLastWordsAreWaitedFor has a process print why it ends, which arrives after the end
// of its output.
func TestLastWordsAreWaitedFor(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		src, process := io.Pipe()
		stderr := newStderrReader(src, func() {})
		go func() {
			time.Sleep(time.Second)
			_, _ = process.Write([]byte("error: No space left on device\n"))
			process.Close()
		}()
		if err := withStderr(io.ErrUnexpectedEOF, stderr); !strings.Contains(err.Error(), "No space left on device") {
			t.Errorf("the machine's fault is %q, without its last words", err)
		}
		// One that keeps its stderr open is not waited for without end.
		src, process = io.Pipe()
		defer process.Close()
		begin := time.Now()
		_ = withStderr(io.EOF, newStderrReader(src, func() {}))
		if waited := time.Since(begin); waited != endWait {
			t.Errorf("waited for %v, want %v", waited, endWait)
		}
	})
}
