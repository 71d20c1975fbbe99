// Package hookcall is the hook's end of DispatchService.Hook: a gRPC client for
// exactly one call over a unix socket, with the call's messages.
//
// A hook process is started for every build, and Nix's whole client waits for
// it, so what it links and starts counts: with grpc-go and generated messages a
// hook took four times the processor time of this one, before and after its
// reply, for it brings net/http, reflection and half a dozen goroutines to send
// and receive five messages. Here is one blocking caller and nothing else. The
// wire is gRPC's all the same (HTTP/2 of RFC 9113, header compression of
// golang.org/x/net/http2/hpack, the framing of grpc/doc/PROTOCOL-HTTP2.md), and
// the messages are those of proto/dispatch/v1/dispatch.proto: tests compare both
// with grpc-go and with the generated code.
package hookcall
