package daemon

import (
	"context"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // the codec that ours extends
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// A statusShare answers Status to many callers at once with one snapshot, made and encoded
// once: a snapshot holds the dispatcher's lock and takes time for each build. Nobody gets
// one that was begun before they asked. Safe for concurrent use.
type statusShare struct {
	take func(maxQueued int) *dispatchv1.StatusResponse

	working sync.Mutex // held while a snapshot is made: there is one at a time
	mu      sync.Mutex
	next    map[int]*sharedStatus // not begun yet, by maxQueued
	asked   int                   // how many answers were asked for
	taken   int                   // how many were made
}

// A sharedStatus is an answer that all have who asked before it was begun.
type sharedStatus struct {
	done chan struct{}
	text []byte
	err  error
}

func newStatusShare(take func(int) *dispatchv1.StatusResponse) *statusShare {
	return &statusShare{take: take, next: make(map[int]*sharedStatus)}
}

// encoded returns the answer as bytes that are shared and must not be changed.
func (s *statusShare) encoded(ctx context.Context, maxQueued int) ([]byte, error) {
	s.mu.Lock()
	s.asked++
	answer := s.next[maxQueued]
	if answer == nil {
		answer = &sharedStatus{done: make(chan struct{})}
		s.next[maxQueued] = answer
		go s.make(maxQueued, answer) // ends when the snapshots before it are made
	}
	s.mu.Unlock()
	select {
	case <-answer.done:
		return answer.text, answer.err
	case <-ctx.Done():
		return nil, toStatus(context.Cause(ctx))
	}
}

func (s *statusShare) make(maxQueued int, answer *sharedStatus) {
	s.working.Lock()
	defer s.working.Unlock()
	s.mu.Lock()
	delete(s.next, maxQueued) // who comes now gets the next one
	s.taken++
	s.mu.Unlock()
	answer.text, answer.err = proto.Marshal(s.take(maxQueued))
	close(answer.done)
}

// unary is for the callers that have bounds: root's and the hooks' calls do not wait for
// the snapshots of others.
func (s *statusShare) unary(bounds func(caller) bool) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		asked, ok := req.(*dispatchv1.StatusRequest)
		if c, _ := callerFrom(ctx); !ok || asked.GetUsers() || !bounds(c) {
			return next(ctx, req)
		}
		text, err := s.encoded(ctx, int(asked.GetMaxQueued()))
		if err != nil {
			return nil, err
		}
		return encodedMessage(text), nil
	}
}

// An encodedMessage is an answer that needs no encoding any more.
type encodedMessage []byte

// A codec is gRPC's own, which passes encoded messages on as they are.
type codec struct{ encoding.CodecV2 }

func newCodec() encoding.CodecV2 { return codec{encoding.GetCodecV2("proto")} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(encodedMessage); ok {
		return mem.BufferSlice{mem.SliceBuffer(m)}, nil
	}
	return c.CodecV2.Marshal(v)
}
