package hookcall

import (
	"testing"

	"google.golang.org/protobuf/proto"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// BenchmarkCodec encodes what a hook says of a build with 100 inputs and decodes
// what it hears, here and with the generated code.
func BenchmarkCodec(b *testing.B) {
	hello := &Hello{Builders: "@/etc/nix/machines", Store: "auto", LocalSystems: []string{"x86_64-linux"}, MaxJobs: 4}
	try := &Try{System: "x86_64-linux", DrvPath: "/nix/store/s66mzxpvicwk07gjbjfw9izjfa797vsw-hello.drv"}
	start := &Start{WantedOutputs: []string{"out"}}
	for range 100 {
		start.Inputs = append(start.Inputs, "/nix/store/0c0qmlv2ixdxvsazmkg3aj2jh4ajx4m7-some-input-1.2.3")
	}
	reply, err := proto.Marshal(&dispatchv1.HookResponse{Message: &dispatchv1.HookResponse_Reply{Reply: &dispatchv1.Reply{
		Action: dispatchv1.Reply_ACTION_ACCEPT, MachineName: "ssh://mac", BuildId: 4711,
	}}})
	if err != nil {
		b.Fatal(err)
	}
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _, _ = hello.encode(), try.encode(), start.encode()
			if _, err := decode(reply); err != nil {
				b.Fatal(err)
			}
		}
	})
	requests := make([]*dispatchv1.HookRequest, 3)
	for n, f := range []fields{hello.encode(), try.encode(), start.encode()} {
		requests[n] = new(dispatchv1.HookRequest)
		if err := proto.Unmarshal(f, requests[n]); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("generated", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			for _, r := range requests {
				if _, err := proto.Marshal(r); err != nil {
					b.Fatal(err)
				}
			}
			if err := proto.Unmarshal(reply, new(dispatchv1.HookResponse)); err != nil {
				b.Fatal(err)
			}
		}
	})
}
