package wiretest

import (
	"bytes"
	"io"
	"testing"
)

func TestPipeCarriesBytesInOrderAndEnds(t *testing.T) {
	a, b := Pipe(7)
	sent := bytes.Repeat([]byte("0123456789"), 1000)
	go func() {
		for rest := sent; len(rest) > 0; {
			n := min(len(rest), 13)
			a.Write(rest[:n])
			rest = rest[n:]
		}
		a.CloseWrite()
	}()
	got, err := io.ReadAll(b)
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	if _, err := b.Write([]byte("x")); err != nil {
		t.Errorf("write against a half-closed pipe: %v", err)
	}
	a.Close()
	if _, err := a.Read(make([]byte, 1)); err != io.ErrClosedPipe {
		t.Errorf("read after Close: %v", err)
	}
	if _, err := b.Write([]byte("x")); err != io.ErrClosedPipe {
		t.Errorf("write after the other end's Close: %v", err)
	}
}
