package main

import (
	"context"
	"flag"
	"fmt"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// streams holds hook calls open: each asks for a derivation that no machine can
// build, and says no more. It prints "held" when all have their replies, and "lost"
// with the reason for each that is ended by the daemon. It ends when it is killed.
func streams(args []string) error {
	flags := flag.NewFlagSet("streams", flag.ExitOnError)
	socket := flags.String("socket", "/run/nix-dispatch/socket", "")
	drv := flags.String("drv", "", "")
	connections := flags.Int("connections", 1, "")
	calls := flags.Int("calls", 1, "of each connection")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var waiting sync.WaitGroup
	for range *connections {
		conn, err := grpc.NewClient("unix:"+*socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		client := dispatchv1.NewDispatchServiceClient(conn)
		for range *calls {
			replied := make(chan struct{})
			go func() {
				err := hold(client, *drv, replied)
				fmt.Println("lost:", err)
			}()
			waiting.Go(func() { <-replied })
		}
	}
	waiting.Wait()
	fmt.Println("held:", *connections**calls)
	select {}
}

// hold makes one call, closes replied at the reply, and returns when the call ends.
func hold(client dispatchv1.DispatchServiceClient, drv string, replied chan<- struct{}) error {
	stream, err := client.Hook(context.Background())
	if err != nil {
		return err
	}
	for _, r := range []*dispatchv1.HookRequest{
		{Message: &dispatchv1.HookRequest_Hello{Hello: &dispatchv1.Hello{Builders: "@/etc/nix/machines"}}},
		{Message: &dispatchv1.HookRequest_Try{Try: &dispatchv1.Try{DrvPath: drv, System: "m68k-linux"}}},
	} {
		_ = stream.Send(r) // Recv tells why not
	}
	m, err := stream.Recv()
	if err != nil {
		return err
	}
	if m.GetReply().GetAction() != dispatchv1.Reply_ACTION_DECLINE {
		return fmt.Errorf("the reply is %v", m)
	}
	close(replied)
	m, err = stream.Recv()
	return fmt.Errorf("after the reply: %v, %w", m, err)
}
