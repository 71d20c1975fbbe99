// Command mallory does what a program should not: the integration tests have it
// talk to nix-dispatchd as a build hook that lies, or as a thousand that stay, and
// look into the memory of processes.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func main() {
	run := hook
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "memory":
			run = memory
		case "streams":
			run = streams
		}
	}
	if err := run(os.Args[2:]); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

// hook offers a derivation as a hook does and prints what comes of it: "reply:" and
// "finished:" with what was said.
func hook(args []string) error {
	flags := flag.NewFlagSet("hook", flag.ExitOnError)
	socket := flags.String("socket", "/run/nix-dispatch/socket", "")
	drv := flags.String("drv", "", "")
	builders := flags.String("builders", "@/etc/nix/machines", "")
	store := flags.String("store", "", "")
	env := flags.String("env", "", "")
	inputs := flags.String("inputs", "", "claimed, with commas between them")
	taken := flags.Bool("taken", false, "")
	huge := flags.Int("huge", 0, "bytes of a setting")
	if err := flags.Parse(args); err != nil {
		return err
	}
	conn, err := grpc.NewClient("unix:"+*socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stream, err := dispatchv1.NewDispatchServiceClient(conn).Hook(ctx)
	if err != nil {
		return err
	}
	say := func(r *dispatchv1.HookRequest) {
		_ = stream.Send(r) // Recv tells why not
	}
	hello := &dispatchv1.Hello{Builders: *builders + strings.Repeat(" ", *huge), Store: *store}
	if *env != "" {
		hello.Environment = strings.Split(*env, ",")
	}
	say(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Hello{Hello: hello}})
	say(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Try{Try: &dispatchv1.Try{DrvPath: *drv, System: "x86_64-linux", Taken: *taken}}})
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch {
		case m.GetReply() != nil:
			fmt.Println("reply:", m.GetReply().GetAction(), m.GetReply().GetReason())
			if m.GetReply().GetAction() != dispatchv1.Reply_ACTION_ACCEPT {
				return nil
			}
			start := &dispatchv1.Start{}
			if *inputs != "" {
				start.Inputs = strings.Split(*inputs, ",")
			}
			say(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Start{Start: start}})
		case m.GetHandOver() != nil:
			say(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_HandedOver{HandedOver: &dispatchv1.HandedOver{}}})
		case m.GetEvent().GetFinished() != nil:
			f := m.GetEvent().GetFinished()
			fmt.Println("finished:", f.GetStatus(), f.GetError())
			return nil
		}
	}
}

// memory prints those of words that are in the memory of a process.
func memory(args []string) error {
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return err
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return err
	}
	defer mem.Close()
	found := make(map[string]bool)
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil || mode[0] != 'r' {
			continue
		}
		buf := make([]byte, to-from)
		n, _ := mem.ReadAt(buf, from) // some of it cannot be read
		for _, word := range args[1:] {
			if bytes.Contains(buf[:n], []byte(word)) {
				found[word] = true
			}
		}
	}
	for _, word := range args[1:] {
		if found[word] {
			fmt.Println(word)
		}
	}
	return nil
}
