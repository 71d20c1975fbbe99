// Package sshtest has SSH servers for tests: [Server], in memory and with faults
// on demand, and [SSHD], OpenSSH's own.
package sshtest

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// ServerOptions say what a [Server] is like. The zero value is a server with one
// Ed25519 host key that lets everyone in.
type ServerOptions struct {
	HostKeys    []ssh.Signer
	Authorized  []ssh.PublicKey // empty: everyone with any key
	MaxSessions int             // on one connection; 0 means 10
	Linger      time.Duration   // how long a session counts after its command's end

	// Run runs a command in place of those that Server knows, and returns its exit
	// status. ctx ends when the session is closed or the command is sent a signal.
	Run func(ctx context.Context, command string, stdin io.Reader, stdout, stderr io.Writer) int
}

// A Server is an SSH server that is reached through [Server.Dial] only. It may be
// used inside a testing/synctest bubble. Of the shell it knows these commands: true,
// cat, "exit N", "sleep N", "echo WORDS", "echo WORDS >&2", "kill -NAME $$" and
// "head -c N /dev/zero".
type Server struct {
	opts ServerOptions
	wg   sync.WaitGroup

	mu         sync.Mutex // protects following fields
	hostKeys   []ssh.Signer
	dialErr    error
	hangDials  chan struct{} // nil, or closed when they need not hang any more
	muteDials  bool
	muteOpens  bool
	refuseExec bool
	muteAsks   bool
	reject     *ssh.OpenChannelError
	conns      map[*pipeEnd]*serverConn
	handshakes int
	dials      []time.Time
	commands   []string
	signals    []string
}

type serverConn struct {
	mu       sync.Mutex // protects following fields
	sessions int
}

// NewServer returns a server. The caller must Close it.
func NewServer(opts ServerOptions) *Server {
	if len(opts.HostKeys) == 0 {
		opts.HostKeys = []ssh.Signer{NewKey()}
	}
	if opts.MaxSessions == 0 {
		opts.MaxSessions = 10
	}
	return &Server{opts: opts, hostKeys: opts.HostKeys, conns: make(map[*pipeEnd]*serverConn)}
}

// NewKey returns a new Ed25519 key.
func NewKey() ssh.Signer {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		panic(err)
	}
	return signer
}

// WriteKey writes a new key to a file and returns the file's name and the key.
func WriteKey(t testing.TB, dir string) (string, ssh.Signer) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "test")
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, "id_ed25519")
	if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return name, signer
}

// HostKey returns the line that column 8 of a machines file would have.
func (s *Server) HostKey() []byte { return ssh.MarshalAuthorizedKey(s.opts.HostKeys[0].PublicKey()) }

// Dial connects to the server, whatever the address.
func (s *Server) Dial(ctx context.Context, _, _ string) (net.Conn, error) {
	s.mu.Lock()
	s.dials = append(s.dials, time.Now())
	hang := s.hangDials
	s.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	s.mu.Lock()
	err, mute := s.dialErr, s.muteDials
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	client, server := newPipe()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[server] = new(serverConn)
	if !mute {
		sc := s.conns[server]
		s.wg.Go(func() { s.serve(server, sc) })
	}
	return client, nil
}

// Close ends all connections and waits for what served them.
func (s *Server) Close() {
	s.Cut()
	s.wg.Wait()
}

// Cut ends all connections without a word.
func (s *Server) Cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.Close()
		delete(s.conns, c)
	}
}

// Freeze stops all bytes on the connections there are, or lets them go on.
func (s *Server) Freeze(frozen bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.freeze(frozen)
	}
}

func (s *Server) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// FailDials makes Dial fail with err until it is called with nil.
func (s *Server) FailDials(err error) { s.set(func() { s.dialErr = err }) }

// HangDials makes Dial wait for its context's end, or until this is called with
// false.
func (s *Server) HangDials(on bool) {
	s.set(func() {
		switch {
		case on && s.hangDials == nil:
			s.hangDials = make(chan struct{})
		case !on && s.hangDials != nil:
			close(s.hangDials)
			s.hangDials = nil
		}
	})
}

// MuteDials makes new connections succeed but never say anything.
func (s *Server) MuteDials(on bool) { s.set(func() { s.muteDials = on }) }

// MuteOpens makes the server ignore requests for sessions.
func (s *Server) MuteOpens(on bool) { s.set(func() { s.muteOpens = on }) }

// MuteRequests makes new connections ignore requests that belong to no session,
// such as keepalives.
func (s *Server) MuteRequests(on bool) { s.set(func() { s.muteAsks = on }) }

// RefuseExec makes the server refuse to run commands.
func (s *Server) RefuseExec(on bool) { s.set(func() { s.refuseExec = on }) }

// Reject makes the server refuse sessions with err until called with nil.
func (s *Server) Reject(err *ssh.OpenChannelError) { s.set(func() { s.reject = err }) }

// SetHostKey changes the host key of connections yet to come.
func (s *Server) SetHostKey(key ssh.Signer) { s.set(func() { s.hostKeys = []ssh.Signer{key} }) }

// Handshakes returns how many connections were authenticated.
func (s *Server) Handshakes() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.handshakes
}

// Dials returns when Dial was called.
func (s *Server) Dials() []time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]time.Time(nil), s.dials...)
}

// Commands returns the commands that were run.
func (s *Server) Commands() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.commands...)
}

// Signals returns the signals that clients asked to send.
func (s *Server) Signals() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.signals...)
}

// Sessions returns how many sessions are open now.
func (s *Server) Sessions() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, c := range s.conns {
		c.mu.Lock()
		n += c.sessions
		c.mu.Unlock()
	}
	return n
}

func (s *Server) serve(nc *pipeEnd, c *serverConn) {
	defer func() {
		nc.Close()
		s.set(func() { delete(s.conns, nc) })
	}()
	config := &ssh.ServerConfig{PublicKeyCallback: s.authorize}
	s.set(func() {
		for _, k := range s.hostKeys {
			config.AddHostKey(k)
		}
	})
	conn, chans, reqs, err := ssh.NewServerConn(nc, config)
	if err != nil {
		return
	}
	mute := false
	s.set(func() {
		s.handshakes++
		mute = s.muteAsks
	})
	s.wg.Go(func() {
		for req := range reqs {
			if !mute {
				req.Reply(false, nil)
			}
		}
	})
	for ch := range chans {
		s.open(c, ch)
	}
	conn.Wait()
}

func (s *Server) authorize(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
	for _, k := range s.opts.Authorized {
		if string(k.Marshal()) == string(key.Marshal()) {
			return nil, nil
		}
	}
	if len(s.opts.Authorized) == 0 {
		return nil, nil
	}
	return nil, fmt.Errorf("key not authorized")
}

// open answers a request for a session as OpenSSH does: one too many is refused
// with "open failed".
func (s *Server) open(c *serverConn, ch ssh.NewChannel) {
	s.mu.Lock()
	mute, reject, refuse := s.muteOpens, s.reject, s.refuseExec
	s.mu.Unlock()
	c.mu.Lock()
	full := c.sessions >= s.opts.MaxSessions
	if !mute && reject == nil && !full {
		c.sessions++
	}
	c.mu.Unlock()
	switch {
	case mute:
	case reject != nil:
		ch.Reject(reject.Reason, reject.Message)
	case full:
		ch.Reject(ssh.ConnectionFailed, "open failed")
	default:
		channel, reqs, err := ch.Accept()
		if err != nil {
			return
		}
		s.wg.Go(func() { s.session(c, channel, reqs, refuse) })
	}
}

func (s *Server) session(c *serverConn, ch ssh.Channel, reqs <-chan *ssh.Request, refuse bool) {
	ctx, cancel := context.WithCancel(context.Background())
	running := false
	var command sync.WaitGroup
	for req := range reqs {
		var arg struct{ Value string }
		ok := ssh.Unmarshal(req.Payload, &arg) == nil
		switch {
		case req.Type == "exec" && ok && !running && !refuse:
			running = true
			s.set(func() { s.commands = append(s.commands, arg.Value) })
			req.Reply(true, nil)
			command.Go(func() {
				if s.opts.Run != nil {
					finish(ch, s.opts.Run(ctx, arg.Value, ch, ch, ch.Stderr()), "")
					return
				}
				status, signal := run(ctx, ch, arg.Value)
				finish(ch, status, signal)
			})
		case req.Type == "signal" && ok:
			s.set(func() { s.signals = append(s.signals, arg.Value) })
			cancel()
		default:
			req.Reply(false, nil)
		}
	}
	cancel()
	command.Wait()
	ch.Close()
	if s.opts.Linger > 0 {
		time.Sleep(s.opts.Linger)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sessions--
}

// finish tells the client how the command ended, in OpenSSH's order.
func finish(ch ssh.Channel, status int, signal string) {
	ch.CloseWrite()
	if signal != "" {
		ch.SendRequest("exit-signal", false, ssh.Marshal(struct {
			Signal     string
			CoreDumped bool
			Message    string
			Language   string
		}{Signal: signal}))
	} else {
		ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{uint32(status)}))
	}
	ch.Close()
}

func run(ctx context.Context, ch ssh.Channel, command string) (status int, signal string) {
	words := strings.Fields(command)
	arg, number := "", 0
	if len(words) > 1 {
		arg = words[1]
		fmt.Sscan(arg, &number)
	}
	switch words[0] {
	case "true":
	case "cat":
		io.Copy(ch, ch)
	case "echo":
		if text, ok := strings.CutSuffix(command, " >&2"); ok {
			fmt.Fprintln(ch.Stderr(), strings.TrimPrefix(text, "echo "))
		} else {
			fmt.Fprintln(ch, strings.TrimPrefix(text, "echo "))
		}
	case "exit":
		return number, ""
	case "kill":
		return 0, strings.TrimPrefix(arg, "-")
	case "head":
		fmt.Sscan(words[2], &number)
		io.CopyN(ch, zeros{}, int64(number))
	case "sleep":
		timer := time.NewTimer(time.Duration(number) * time.Second)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return 0, "TERM"
		}
	default:
		fmt.Fprintf(ch.Stderr(), "%s: command not found\n", words[0])
		return 127, ""
	}
	return 0, ""
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
