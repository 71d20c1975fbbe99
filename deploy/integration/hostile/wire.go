package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// These speak HTTP/2 without a library that keeps to its rules.

const preface = http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00"

// A wire is a connection on which anything can be said.
type wire struct {
	net.Conn
	framer *http2.Framer
	hpack  *hpack.Encoder
	header bytes.Buffer
}

// wire makes one; nil if the daemon does not let it. What the daemon says goes to sink; if
// that is nil it is not read at all.
func (a *attacker) wire(sink io.Writer) *wire {
	c, err := net.Dial("unix", a.socket)
	if err == nil {
		_, err = io.WriteString(c, preface)
	}
	if err != nil {
		a.did(err)
		return nil
	}
	w := &wire{Conn: c, framer: http2.NewFramer(c, c)}
	w.framer.AllowIllegalWrites = true
	w.hpack = hpack.NewEncoder(&w.header)
	if sink != nil {
		go func() { _, _ = io.Copy(sink, c) }() // until it is closed
	}
	return w
}

// frame is a message as gRPC sends it.
func frame(m proto.Message) []byte {
	var data []byte
	if m != nil {
		data, _ = proto.Marshal(m) // of valid strings
	}
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(data))), data...)
}

// call begins a call and sends data, and ends the request if that is all of it.
func (w *wire) call(id uint32, method string, data []byte) error {
	_ = w.SetWriteDeadline(time.Now().Add(time.Second)) // the daemon need not read
	if err := w.begin(id, method); err != nil {
		return err
	}
	return w.data(id, data, true)
}

func (w *wire) begin(id uint32, method string) error {
	w.header.Reset()
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/nixdispatch.v1.DispatchService/" + method},
		{":authority", "localhost"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		_ = w.hpack.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}) // into memory
	}
	return w.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: w.header.Bytes(), EndHeaders: true})
}

func (w *wire) data(id uint32, data []byte, end bool) error {
	for {
		n := min(len(data), 16<<10)
		if err := w.framer.WriteData(id, end && n == len(data), data[:n]); err != nil {
			return err
		}
		if data = data[n:]; len(data) == 0 {
			return nil
		}
	}
}

// half sends most of large messages, on many streams, and holds them.
func (a *attacker) half(ctx context.Context) {
	whole := frame(&dispatchv1.BuildRequest{Derivations: []string{string(bytes.Repeat([]byte("x"), 15<<20))}})
	var held sync.WaitGroup
	defer held.Wait()
	for range 8 * a.scale {
		held.Go(func() {
			w := a.wire(io.Discard)
			if w == nil {
				return
			}
			defer w.Close()
			for n := range 10 {
				id, method := uint32(2*n+1), []string{"Build", "Status", "Hook", "Explain"}[n%4]
				// The daemon gives more than its window to a message that has begun. What goes
				// beyond is its to refuse.
				_ = w.SetWriteDeadline(time.Now().Add(5 * time.Second))
				err := w.begin(id, method)
				for sent := 0; err == nil && sent < len(whole)-1 && ctx.Err() == nil; sent += 512 << 10 {
					err = w.data(id, whole[sent:min(sent+512<<10, len(whole)-1)], false)
					pause(ctx, 5*time.Millisecond) // for the daemon to give more
				}
				a.did(err)
				if err != nil || ctx.Err() != nil {
					break
				}
			}
			<-ctx.Done()
		})
	}
}

// drips sends most of a message in frames of a byte each.
func (a *attacker) drips(ctx context.Context) {
	whole := frame(&dispatchv1.BuildRequest{Derivations: []string{string(bytes.Repeat([]byte("x"), 15<<20))}})
	var frames bytes.Buffer
	framer := http2.NewFramer(&frames, nil)
	for range 1000 {
		_ = framer.WriteData(1, false, []byte("x")) // into memory
	}
	var held sync.WaitGroup
	defer held.Wait()
	for range 8 * a.scale {
		held.Go(func() {
			w := a.wire(io.Discard)
			if w == nil {
				return
			}
			defer w.Close()
			err := w.begin(1, "Build")
			if err == nil {
				err = w.data(1, whole[:5], false)
			}
			for n := 0; err == nil && n < 15_000 && ctx.Err() == nil; n++ {
				_ = w.SetWriteDeadline(time.Now().Add(5 * time.Second))
				if _, err = w.Write(frames.Bytes()); n == 100 {
					a.did(err) // the daemon holds 100,000 frames
				}
			}
			if err != nil {
				a.did(err)
			}
			<-ctx.Done()
		})
	}
}

// resets begins calls and takes them back at once, with all or part of the request said.
func (a *attacker) resets(ctx context.Context) {
	requests := map[string][]byte{
		"Status":  frame(nil),
		"Build":   frame(&dispatchv1.BuildRequest{Derivations: a.graph[:min(20, len(a.graph))]}),
		"Hook":    append(frame(hello()), frame(try(a.graph[0]))...),
		"History": frame(&dispatchv1.HistoryRequest{}),
		"Log":     frame(&dispatchv1.LogRequest{DrvPath: a.graph[0], Follow: true}),
		"Explain": frame(&dispatchv1.ExplainRequest{DrvPath: a.graph[0]}),
	}
	var all sync.WaitGroup
	defer all.Wait()
	for range 4 {
		all.Go(func() {
			for ctx.Err() == nil {
				w := a.wire(io.Discard)
				if w == nil {
					pause(ctx, 10*time.Millisecond)
					continue
				}
				for id := uint32(1); id < 2000 && ctx.Err() == nil; id += 2 {
					var err error
					for method, data := range requests { // in any order
						_ = w.SetWriteDeadline(time.Now().Add(time.Second))
						if err = w.begin(id, method); err == nil {
							err = w.data(id, data[:rand.N(len(data)+1)], rand.N(2) == 0)
						}
						if rand.N(4) == 0 {
							pause(ctx, rand.N(5*time.Millisecond))
						}
						break
					}
					if err == nil {
						err = w.framer.WriteRSTStream(id, http2.ErrCodeCancel)
					}
					if a.did(err); err != nil {
						break
					}
				}
				w.Close()
			}
		})
	}
}

// floods sends frames that cost the daemon something and mean nothing.
func (a *attacker) floods(ctx context.Context) {
	var all sync.WaitGroup
	defer all.Wait()
	for worker := range 4 {
		all.Go(func() {
			for kind := worker; ctx.Err() == nil; kind++ {
				sink := io.Writer(io.Discard)
				if kind%2 == 0 {
					sink = nil // the daemon cannot get rid of its answers
				}
				w := a.wire(sink)
				if w == nil {
					pause(ctx, 10*time.Millisecond)
					continue
				}
				a.flood(ctx, w, kind/2%6)
				w.Close()
			}
		})
	}
}

// flood sends one kind of frame until the daemon takes no more.
func (a *attacker) flood(ctx context.Context, w *wire, kind int) {
	if kind == 3 {
		a.did(w.begin(1, "Status"))
	}
	for n := range 5000 {
		_ = w.SetWriteDeadline(time.Now().Add(time.Second))
		var err error
		switch kind {
		case 0:
			err = w.framer.WritePing(false, [8]byte{byte(n)})
		case 1:
			err = w.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(n)})
		case 2: // a header that does not end
			if n == 0 {
				err = w.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x83}})
				break
			}
			err = w.framer.WriteContinuation(1, false, bytes.Repeat([]byte{0x40, 1, 'a', 1, 'b'}, 3000))
		case 3:
			err = w.framer.WriteData(1, false, nil)
		case 4:
			err = w.framer.WriteWindowUpdate(0, 1)
		default:
			var junk [64]byte
			for i := range junk {
				junk[i] = byte(rand.Uint32())
			}
			_, err = w.Write(junk[:])
		}
		if a.did(err); err != nil || ctx.Err() != nil {
			return
		}
	}
}
