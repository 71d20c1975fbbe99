package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// These hold what the daemon has only so much of.

// graphs asks for large graphs, on many calls; half of these leave at random and come back.
func (a *attacker) graphs(ctx context.Context) {
	a.crowd(ctx, 16*a.scale, func(ctx context.Context, c dispatchv1.DispatchServiceClient, n int) error {
		cancel := context.CancelFunc(func() {})
		if n%2 == 0 {
			ctx, cancel = sometime(ctx, 4*time.Second)
		}
		defer cancel()
		s, err := c.Build(ctx, &dispatchv1.BuildRequest{Derivations: a.graph, KeepGoing: true, HoldRoots: true})
		if err != nil {
			return err
		}
		if _, err = s.Recv(); err != nil { // the plan
			return err
		}
		if n%2 == 1 {
			a.did(nil)
		}
		return drain(s, nil)
	})
}

// joins joins every build there is as a hook, and never says HandedOver.
func (a *attacker) joins(ctx context.Context) {
	conn, client := a.dial()
	defer conn.Close()
	joined := make(map[uint64]bool)
	var joins sync.WaitGroup
	defer func() {
		joins.Wait()
		fmt.Println(len(joined), "joined")
	}()
	for ctx.Err() == nil {
		st, err := client.Status(ctx, &dispatchv1.StatusRequest{})
		a.did(err)
		for _, b := range st.GetBuilds() {
			if joined[b.GetId()] || len(joined) > 10_000 {
				continue
			}
			joined[b.GetId()] = true
			joins.Go(func() {
				a.did(a.hook(ctx, client, hello(), try(b.GetDrvPath()), start()))
			})
		}
		pause(ctx, 10*time.Millisecond)
	}
}

// hooks holds thousands of hook calls at several points of their conversation.
func (a *attacker) hooks(ctx context.Context) {
	var held sync.WaitGroup
	defer held.Wait()
	for range 25 * a.scale {
		conn, client := a.dial()
		defer conn.Close()
		for n := range 100 {
			var says []*dispatchv1.HookRequest
			switch n % 4 {
			case 1:
				says = append(says, hello())
			case 2:
				says = append(says, hello(), try(a.graph[n%len(a.graph)]))
			case 3:
				m := hello()
				m.GetHello().Environment = []string{"NIX_STORE_DIR=" + string(make([]byte, 10_000))}
				says = append(says, m)
			}
			held.Go(func() {
				s, err := client.Hook(ctx)
				for _, m := range says {
					if err == nil {
						err = s.Send(m)
					}
				}
				a.did(err)
				if err == nil {
					_ = drain(s, nil) // until it is refused, or ctx ends
				}
			})
		}
	}
}

// listener holds connections to the metrics listener that say nothing, half of something,
// or all and read nothing of the answer, and opens and closes others.
func (a *attacker) listener(ctx context.Context) {
	says := []string{"", "G", "GET /metrics HTTP/1.1\r\nHost: ", "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\nx", "\x16\x03\x01"}
	var held []net.Conn
	defer func() {
		for _, c := range held {
			c.Close()
		}
	}()
	for n := 0; ctx.Err() == nil; n++ {
		c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", a.metrics)
		a.did(err)
		if err != nil {
			pause(ctx, 10*time.Millisecond)
			continue
		}
		_, _ = io.WriteString(c, says[rand.N(len(says))]) // it may be closed already
		if held = append(held, c); n%3 == 0 || len(held) > 2000*a.scale {
			held[0].Close()
			held = held[1:]
		}
	}
}

// connections opens and closes connections to the socket, says the first bytes of a call
// on some, and holds some.
func (a *attacker) connections(ctx context.Context) {
	var held []net.Conn
	defer func() {
		for _, c := range held {
			c.Close()
		}
	}()
	for n := 0; ctx.Err() == nil; n++ {
		c, err := new(net.Dialer).DialContext(ctx, "unix", a.socket)
		a.did(err)
		if err != nil {
			pause(ctx, 10*time.Millisecond)
			continue
		}
		if n%2 == 0 {
			_, _ = io.WriteString(c, preface[:rand.N(len(preface))])
		}
		if held = append(held, c); n%3 == 0 || len(held) > 500*a.scale {
			held[0].Close()
			held = held[1:]
		}
	}
}

// unread asks for much and reads nothing of it.
func (a *attacker) unread(ctx context.Context) {
	conn, client := a.dial()
	defer conn.Close()
	// Something that makes answers long.
	queue, err := client.Build(ctx, &dispatchv1.BuildRequest{Derivations: a.graph, KeepGoing: true})
	if err == nil {
		_, err = queue.Recv()
	}
	a.did(err)
	for range 20 {
		talks, silent := a.dial()
		defer talks.Close()
		for range 4 {
			_, err := silent.Build(ctx, &dispatchv1.BuildRequest{Derivations: []string{a.chatty}})
			a.did(err)
			_, err = silent.Log(ctx, &dispatchv1.LogRequest{DrvPath: a.chatty, Follow: true})
			a.did(err)
			_, err = silent.History(ctx, &dispatchv1.HistoryRequest{})
			a.did(err)
		}
	}
	if w := a.wire(nil); w != nil {
		defer w.Close()
		for n := range 100 {
			a.did(w.call(uint32(2*n+1), "Status", frame(nil)))
		}
	}
	<-ctx.Done()
}
