package hookcall

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"nixdispatch/proto/dispatch/dispatchtest"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

type hookStream = grpc.BidiStreamingServer[dispatchv1.HookRequest, dispatchv1.HookResponse]

// A daemon serves Hook calls with grpc-go.
type daemon struct {
	dispatchv1.UnimplementedDispatchServiceServer
	hook func(hookStream) error
}

func (d *daemon) Hook(s hookStream) error { return d.hook(s) }

func soon() time.Time { return time.Now().Add(2 * time.Minute) }

// call starts a call to a daemon that serves it with hook.
func call(t *testing.T, hook func(hookStream) error) (*Call, *grpc.Server) {
	t.Helper()
	socket, server := dispatchtest.Serve(t, &daemon{hook: hook})
	c, err := Dial(socket, soon())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	if err := c.Hello(&Hello{Builders: "@x"}, soon()); err != nil {
		t.Fatal(err)
	}
	return c, server
}

func sendReply(s hookStream) error {
	return s.Send(&dispatchv1.HookResponse{Message: &dispatchv1.HookResponse_Reply{
		Reply: &dispatchv1.Reply{Action: dispatchv1.Reply_ACTION_ACCEPT, MachineName: "ssh://mac"}}})
}

func TestCallHoldsAConversation(t *testing.T) {
	var asked []*dispatchv1.HookRequest
	c, _ := call(t, func(s hookStream) error {
		for {
			req, err := s.Recv()
			if err != nil {
				return err
			}
			asked = append(asked, req)
			switch {
			case req.GetTry() != nil:
				err = sendReply(s)
			case req.GetStart() != nil:
				for _, r := range responses {
					if r.sent.GetReply() == nil {
						err = errors.Join(err, s.Send(r.sent))
					}
				}
			}
			if err != nil {
				return err
			}
		}
	})
	reply, err := c.Try(&Try{DrvPath: "/nix/store/x.drv"}, soon())
	if err != nil || *reply != (Reply{Action: Accept, MachineName: "ssh://mac"}) {
		t.Fatalf("reply = %+v, %v", reply, err)
	}
	if err := c.Start(&Start{Inputs: []string{"/nix/store/in"}}); err != nil {
		t.Fatal(err)
	}
	for _, r := range responses {
		if r.sent.GetReply() != nil {
			continue
		}
		got, err := c.Next()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(r.want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	if c.Ready() {
		t.Error("ready though nothing more was said")
	}
}

// TestCallBeyondTheWindows sends and receives more than may be on its way at
// once.
func TestCallBeyondTheWindows(t *testing.T) {
	const chunks = 100
	inputs := make([]string, 40000)
	for i := range inputs {
		inputs[i] = fmt.Sprintf("/nix/store/%0150d", i)
	}
	c, _ := call(t, func(s hookStream) error {
		for {
			req, err := s.Recv()
			if err != nil {
				return err
			}
			if req.GetTry() != nil {
				if err := sendReply(s); err != nil {
					return err
				}
			}
			if start := req.GetStart(); start != nil {
				if !slices.Equal(start.GetInputs(), inputs) {
					return status.Error(codes.InvalidArgument, "other inputs came")
				}
				for i := range chunks {
					data := bytes.Repeat([]byte{byte(i)}, 64<<10)
					err = errors.Join(err, s.Send(event(&dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Log{Log: &dispatchv1.Log{Data: data}}})))
				}
				return err
			}
		}
	})
	if err := c.Hello(&Hello{Builders: strings.Repeat("x", 3<<20)}, soon()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Try(&Try{}, soon()); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(&Start{Inputs: inputs}); err != nil {
		t.Fatal(err)
	}
	for i := range chunks {
		m, err := c.Next()
		if err != nil {
			t.Fatal(err)
		}
		if log, ok := m.(Log); !ok || !bytes.Equal(log.Data, bytes.Repeat([]byte{byte(i)}, 64<<10)) {
			t.Fatalf("message %d is %T, not what was sent", i, m)
		}
	}
	if _, err := c.Next(); statusOf(err).Code != OK {
		t.Errorf("error at the end = %v, want that of an ended call", err)
	}
}

func statusOf(err error) StatusError {
	if e, ok := errors.AsType[*StatusError](err); ok {
		return *e
	}
	return StatusError{Code: 99}
}

func TestCallTellsWhyTheDaemonEndedIt(t *testing.T) {
	for code, want := range map[codes.Code]Code{
		codes.PermissionDenied: PermissionDenied, codes.Unavailable: Unavailable, codes.Internal: Internal, codes.InvalidArgument: 3,
	} {
		text := "why: 100% \"ü\"\nand more" + strings.Repeat(".", 5000)
		c, _ := call(t, func(s hookStream) error {
			s.Recv()
			return status.Error(code, text)
		})
		_, err := c.Try(&Try{}, soon())
		if got := statusOf(err); got != (StatusError{want, text}) {
			t.Errorf("error = %+v, want code %d and the daemon's words", got, want)
		}
	}
}

func TestCallWhenTheDaemonStops(t *testing.T) {
	for name, stop := range map[string]func(*grpc.Server){
		"at once":    (*grpc.Server).Stop,
		"gracefully": func(s *grpc.Server) { go s.GracefulStop() },
	} {
		t.Run(name, func(t *testing.T) {
			stopped := make(chan struct{})
			c, server := call(t, func(s hookStream) error {
				for range 2 {
					s.Recv()
				}
				if err := sendReply(s); err != nil {
					return err
				}
				<-stopped
				return status.Error(codes.Unavailable, "shutting down")
			})
			if _, err := c.Try(&Try{}, soon()); err != nil {
				t.Fatal(err)
			}
			go close(stopped)
			stop(server)
			if _, err := c.Next(); statusOf(err).Code != Unavailable {
				t.Errorf("error = %v, want code Unavailable", err)
			}
		})
	}
}

func TestCallOfNobody(t *testing.T) {
	_, err := Dial(filepath.Join(t.TempDir(), "none"), soon())
	if pathErr, ok := errors.AsType[*os.PathError](err); !ok || !errors.Is(err, os.ErrNotExist) || !strings.Contains(pathErr.Path, "none") {
		t.Errorf("error = %v, want that the socket is not there", err)
	}
}

func TestCallOfASilentDaemon(t *testing.T) {
	socket, _ := dispatchtest.Silent(t)
	c, err := Dial(socket, soon())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Try(&Try{}, time.Now().Add(20*time.Millisecond)); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("Try = %v, want ErrNoAnswer", err)
	}
	c.idle, c.pong = 10*time.Millisecond, 10*time.Millisecond
	if _, err := c.Next(); statusOf(err).Code != Unavailable {
		t.Errorf("Next = %v, want code Unavailable", err)
	}
	// More than the socket and the windows hold.
	if err := c.Hello(&Hello{Builders: strings.Repeat("x", 8<<20)}, time.Now().Add(20*time.Millisecond)); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("Hello = %v, want ErrNoAnswer", err)
	}
}

// TestCallAsksForASignOfLife waits longer than a daemon may be silent.
func TestCallAsksForASignOfLife(t *testing.T) {
	goOn := make(chan struct{})
	c, _ := call(t, func(s hookStream) error {
		for range 2 {
			s.Recv()
		}
		err := sendReply(s)
		<-goOn
		return errors.Join(err, s.Send(responses[1].sent))
	})
	if _, err := c.Try(&Try{}, soon()); err != nil {
		t.Fatal(err)
	}
	c.idle, c.pong = 50*time.Millisecond, 2*time.Minute // the host may be busy
	time.AfterFunc(4*c.idle, func() { close(goOn) })
	if m, err := c.Next(); err != nil || !cmp.Equal(m, responses[1].want) {
		t.Errorf("Next = %v, %v", m, err)
	}
}

// conversation is what a daemon sends in a short call.
func conversation(tb testing.TB) []byte {
	tb.Helper()
	b := appendFrame(nil, frameSettings, 0, 0, []byte{0, settingInitialWindowSize, 0, 16, 0, 0})
	b = appendFrame(b, frameSettings, flagAck, 0, nil)
	b = appendFrame(b, frameHeaders, flagEndHeaders, streamID, []byte{0x88})
	b = appendFrame(b, framePing, 0, 0, make([]byte, 8))
	for _, r := range responses {
		data, err := proto.Marshal(r.sent)
		if err != nil {
			tb.Fatal(err)
		}
		message := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(data))), data...)
		half := len(message) / 2
		b = appendFrame(b, frameData, flagPadded, streamID, append(append([]byte{3}, message[:half]...), 0, 0, 0))
		b = appendFrame(b, frameData, 0, streamID, message[half:])
	}
	b = appendWindowUpdate(b, streamID, 5)
	b = appendFrame(b, frameHeaders, flagEndStream, streamID, []byte("\x00\x0bgrpc-status"))
	return appendFrame(b, frameContinuation, flagEndHeaders, streamID, []byte("\x0214"))
}

// socketPair is a connection, our end first.
func socketPair(t *testing.T) (socket, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		t.Fatal(err)
	}
	return socket(fds[0]), os.NewFile(uintptr(fds[1]), "daemon")
}

// converse has a call read all that a daemon sends, and returns what it was told
// and why that ended.
func converse(t *testing.T, data []byte) (told []Message, err error) {
	ours, theirs := socketPair(t)
	c := newCall(ours)
	defer c.Close()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		theirs.Write(data)
		unix.Shutdown(int(theirs.Fd()), unix.SHUT_WR)
		io.Copy(io.Discard, theirs)
		theirs.Close()
	}()
	defer func() {
		unix.Shutdown(int(ours), unix.SHUT_RDWR)
		<-sent
	}()
	for {
		m, err := c.Next()
		if err != nil {
			return told, err
		}
		if m == nil {
			t.Fatal("neither message nor error")
		}
		if log, ok := m.(Log); ok { // its bytes are valid until the next call
			m = Log{bytes.Clone(log.Data)}
		}
		told = append(told, m)
	}
}

func TestCallReadsPaddedAndSplitFrames(t *testing.T) {
	told, err := converse(t, conversation(t))
	if statusOf(err) != (StatusError{Unavailable, ""}) {
		t.Errorf("error at the end = %v, want code Unavailable", err)
	}
	for i, r := range responses {
		if i >= len(told) || !cmp.Equal(told[i], r.want) {
			t.Fatalf("told %v, want %v at %d", told, r.want, i)
		}
	}
}

func TestCallRefusesWhatIsNotHTTP2(t *testing.T) {
	for name, sent := range map[string][]byte{
		"HTTP/1.1":                []byte("HTTP/1.1 400 Bad Request\r\n\r\n"),
		"a frame too large":       {1, 0, 0, frameData, 0, 0, 0, 0, streamID},
		"another stream":          appendFrame(nil, frameData, 0, 3, []byte("x")),
		"more padding than frame": appendFrame(nil, frameData, flagPadded, streamID, []byte{200, 1}),
		"a message too large":     appendFrame(nil, frameData, 0, streamID, []byte{0, 0xff, 0xff, 0xff, 0xff}),
		"a compressed message":    appendFrame(nil, frameData, 0, streamID, []byte{1, 0, 0, 0, 1, 0}),
		"endless headers":         bytes.Repeat(appendFrame(nil, frameHeaders, flagEndHeaders, streamID, nil), 10),
		"a broken-off header":     append(appendFrame(nil, frameHeaders, 0, streamID, nil), appendFrame(nil, framePing, 0, 0, make([]byte, 8))...),
		"no header compression":   appendFrame(nil, frameHeaders, flagEndHeaders|flagEndStream, streamID, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}),
		"a window too large":      bytes.Repeat(appendWindowUpdate(nil, streamID, maxWindow), 2),
		"odd settings":            appendFrame(nil, frameSettings, 0, 0, []byte{1}),
		"a push":                  appendFrame(nil, framePushPromise, 0, streamID, nil),
	} {
		t.Run(name, func(t *testing.T) {
			told, err := converse(t, sent)
			if _, ended := errors.AsType[*StatusError](err); ended || len(told) > 0 {
				t.Errorf("told %v, error %v; want it refused", told, err)
			}
		})
	}
}

// FuzzCall feeds a call what a daemon might send.
func FuzzCall(f *testing.F) {
	f.Add(conversation(f))
	f.Add([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if told, err := converse(t, data); err == nil || len(told) > len(data) {
			t.Errorf("%d messages of %d bytes, error %v", len(told), len(data), err)
		}
	})
}
