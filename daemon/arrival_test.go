package daemon

import (
	"bytes"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"nixdispatch/daemon/usage"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// A halfCaller begins a call of a method and sends as much of a message as is said.
type halfCaller struct {
	conn   net.Conn
	framer *http2.Framer
}

func halfCall(t *testing.T, s *site, method string) *halfCaller {
	t.Helper()
	conn, err := net.Dial("unix", s.d.opts.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	h := &halfCaller{conn, http2.NewFramer(conn, conn)}
	var header bytes.Buffer
	enc := hpack.NewEncoder(&header)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/nixdispatch.v1.DispatchService/" + method},
		{":authority", "localhost"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		if err := enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := conn.Write([]byte(clientPreface)); err != nil {
		t.Fatal(err)
	}
	if err := h.framer.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	if err := h.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: header.Bytes(), EndHeaders: true}); err != nil {
		t.Fatal(err)
	}
	// Of 8 MiB.
	if err := h.framer.WriteData(1, false, []byte{0, 0, 0x80, 0, 0}); err != nil {
		t.Fatal(err)
	}
	return h
}

// send sends frames, until the daemon ends the connection.
func (h *halfCaller) send(frames, size int) (ended bool) {
	for range frames {
		if err := h.framer.WriteData(1, false, make([]byte, size)); err != nil {
			return true
		}
	}
	return false
}

// TestSecurityHalfRequests has a member send parts of large requests, in large frames and
// in small ones, and hold them: what the daemon holds of that is bounded, it is counted until
// it is gone, and whole requests are not counted for it.
func TestSecurityHalfRequests(t *testing.T) {
	t.Parallel()
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{oneMachine("ssh")},
		prepare:  func(s *site) { s.guest(usage.Amounts{usage.ArrivingBytes: 1 << 20}) },
	})
	me := usage.User{UID: uint32(os.Geteuid())}
	arriving := func() int64 { return s.d.usage.Of(me, usage.ArrivingBytes) }
	first := halfCall(t, s, "Build")
	if first.send(60, 10_000) {
		t.Fatal("600 kB of a request are refused")
	}
	s.eventually("they are counted", func() bool { return arriving() > 600_000 })
	for _, method := range []string{"Build", "Status", "Hook"} {
		h := halfCall(t, s, method)
		s.eventually(method+": more is refused", func() bool { return h.send(100, 10_000) })
	}
	small := halfCall(t, s, "Status")
	s.eventually("frames count for more than the bytes in them", func() bool { return small.send(10_000, 1) })
	s.eventually("what was refused is gone", func() bool { return arriving() < 700_000 })
	first.conn.Close()
	s.eventually("nothing is left", func() bool { return arriving() == 0 })

	h := s.hook()
	for range 40 {
		if err := h.stream.Send(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Try{Try: &dispatchv1.Try{
			DrvPath: "/nix/store/" + strings.Repeat("x", 100_000), System: "x86_64-linux"}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := h.stream.Recv(); err != nil {
			t.Fatalf("after whole requests: %v", err)
		}
	}
	if n := arriving(); n > 200_000 {
		t.Errorf("%d bytes are counted, though all requests are complete", n)
	}
	h.leave()
	s.eventually("nothing is left of the hook's", func() bool { return arriving() == 0 })
}

// TestFrameMeter reads a connection in pieces of any size.
func TestFrameMeter(t *testing.T) {
	t.Parallel()
	var all bytes.Buffer
	all.WriteString(clientPreface)
	f := http2.NewFramer(&all, nil)
	for _, err := range []error{
		f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1}),
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: make([]byte, 100)}),
		f.WriteData(1, false, make([]byte, 1000)),
		f.WritePing(false, [8]byte{}),
		f.WriteData(1, false, nil),
		f.WriteData(3, true, make([]byte, 16000)),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	const want = 1000 + 16000 + 3*frameCost
	for size := 1; size <= all.Len(); size += 1 + size/3 {
		m := frameMeter{left: len(clientPreface)}
		var got int64
		for b := all.Bytes(); len(b) > 0; b = b[min(size, len(b)):] {
			got += m.data(b[:min(size, len(b))])
		}
		if got != want {
			t.Errorf("in pieces of %d bytes: %d, want %d", size, got, want)
		}
	}
}
