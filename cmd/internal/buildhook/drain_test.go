package buildhook

import (
	"bytes"
	"os"
	"testing"
	"time"
)

// What is written must have been read when awaitRead returns, whether or not the
// kernel can tell: it cannot while more than a page is in the pipe.
func TestAwaitRead(t *testing.T) {
	for name, size := range map[string]int{"a line": 100, "two pages": 2 * os.Getpagesize()} {
		t.Run(name, func(t *testing.T) {
			r, w := pipe(t)
			if _, err := w.Write(bytes.Repeat([]byte("x"), size)); err != nil {
				t.Fatal(err)
			}
			done := make(chan int)
			go func() {
				awaitRead(int(w.Fd()), time.Now().Add(time.Minute))
				done <- unread(int(w.Fd()))
			}()
			for left := size; left > 0; left-- {
				if left == 1 || left == size/2 { // it looks, and waits
					time.Sleep(30 * time.Millisecond)
				}
				select {
				case <-done:
					t.Fatalf("it returned with %d of %d bytes unread", left, size)
				default:
				}
				if _, err := r.Read(make([]byte, 1)); err != nil {
					t.Fatal(err)
				}
			}
			if n := <-done; n != 0 {
				t.Errorf("it returned with %d bytes unread", n)
			}
		})
	}
}

func TestAwaitReadEnds(t *testing.T) {
	write := func(t *testing.T) (r, w *os.File) {
		r, w = pipe(t)
		if _, err := w.WriteString("unread"); err != nil {
			t.Fatal(err)
		}
		return r, w
	}
	t.Run("in time", func(t *testing.T) {
		_, w := write(t)
		end := time.Now().Add(50 * time.Millisecond)
		awaitRead(int(w.Fd()), end)
		if time.Now().Before(end) {
			t.Error("it did not wait")
		}
	})
	t.Run("when nobody reads", func(t *testing.T) {
		r, w := write(t)
		time.AfterFunc(20*time.Millisecond, func() { r.Close() })
		awaitRead(int(w.Fd()), time.Now().Add(time.Minute))
	})
	t.Run("at once for a file", func(t *testing.T) {
		f, err := os.Create(t.TempDir() + "/file")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		awaitRead(int(f.Fd()), time.Now().Add(time.Minute))
	})
}
