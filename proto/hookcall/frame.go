package hookcall

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/net/http2/hpack"
)

// Frame types, flags and settings of HTTP/2 (RFC 9113, section 6).
const (
	frameData         = 0x0
	frameHeaders      = 0x1
	frameRSTStream    = 0x3
	frameSettings     = 0x4
	framePushPromise  = 0x5
	framePing         = 0x6
	frameGoAway       = 0x7
	frameWindowUpdate = 0x8
	frameContinuation = 0x9

	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20

	settingEnablePush        = 0x2
	settingInitialWindowSize = 0x4

	frameHeaderSize = 9
	// maxFrame is the largest payload that a peer may send and must take, unless
	// told otherwise, which it is not.
	maxFrame = 16384
	// defaultWindow is how much may be sent before the peer says anything.
	defaultWindow = 65535
	maxWindow     = 1<<31 - 1

	preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

	// streamID is the one stream of a connection.
	streamID = 1
	// method is the path of the one method called.
	method = "/nixdispatch.v1.DispatchService/Hook"
)

// appendFrame appends a frame with a copy of its payload.
func appendFrame(b []byte, kind, flags byte, stream uint32, payload []byte) []byte {
	n := len(payload)
	b = append(b, byte(n>>16), byte(n>>8), byte(n), kind, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(b, payload...)
}

func appendWindowUpdate(b []byte, stream, n uint32) []byte {
	return appendFrame(b, frameWindowUpdate, 0, stream, binary.BigEndian.AppendUint32(nil, n))
}

// appendOpening appends what opens the connection and the call: the preface, our
// windows, and the request's headers.
func appendOpening(b []byte) []byte {
	b = append(b, preface...)
	settings := binary.BigEndian.AppendUint16(nil, settingEnablePush)
	settings = binary.BigEndian.AppendUint32(settings, 0)
	settings = binary.BigEndian.AppendUint16(settings, settingInitialWindowSize)
	settings = binary.BigEndian.AppendUint32(settings, window)
	b = appendFrame(b, frameSettings, 0, 0, settings)
	b = appendWindowUpdate(b, 0, window-defaultWindow)
	return appendFrame(b, frameHeaders, flagEndHeaders, streamID, requestHeaders())
}

// requestHeaders are the request's headers: literals that are not indexed, whose
// names are those of the static table but for the last (RFC 7541, section 6.2.2
// and appendix A).
func requestHeaders() []byte {
	const (
		authority, methodPOST, path, schemeHTTP = 1, 3, 4, 6
		contentType                             = 31
		indexed, literalIndexMax                = 0x80, 15
	)
	value := func(b []byte, s string) []byte { return append(append(b, byte(len(s))), s...) }
	b := []byte{indexed | methodPOST, indexed | schemeHTTP}
	b = value(append(b, path), method)
	b = value(append(b, authority), "localhost")
	b = value(append(b, literalIndexMax, contentType-literalIndexMax), "application/grpc")
	b = value(value(append(b, 0), "te"), "trailers")
	return b
}

// A frame is one that was read; its payload is valid until the next is.
type frame struct {
	kind, flags byte
	stream      uint32
	payload     []byte
}

// unpad takes the padding of a DATA or HEADERS frame off, and of the latter the
// priority.
func (f *frame) unpad() error {
	p := f.payload
	pad := 0
	if f.flags&flagPadded != 0 {
		if len(p) == 0 {
			return errFrame
		}
		pad, p = int(p[0]), p[1:]
	}
	if f.kind == frameHeaders && f.flags&flagPriority != 0 {
		if len(p) < 5 {
			return errFrame
		}
		p = p[5:]
	}
	if pad > len(p) {
		return errFrame
	}
	f.payload = p[:len(p)-pad]
	return nil
}

// parseSettings returns the initial window size that a SETTINGS frame sets, or
// -1. Nothing else in it concerns us: what we send is below every limit.
func parseSettings(payload []byte) (int64, error) {
	if len(payload)%6 != 0 {
		return 0, errFrame
	}
	size := int64(-1)
	for ; len(payload) > 0; payload = payload[6:] {
		if binary.BigEndian.Uint16(payload) == settingInitialWindowSize {
			size = int64(binary.BigEndian.Uint32(payload[2:]))
		}
	}
	if size > maxWindow {
		return 0, errFrame
	}
	return size, nil
}

// maxHeaders and maxHeaderBlocks bound the response's headers and trailers,
// encoded.
const (
	maxHeaders      = 64 << 10
	maxHeaderBlocks = 4
)

// decodeHeaders reads the response's header blocks, in their order.
func decodeHeaders(blocks [][]byte) (map[string]string, error) {
	headers := make(map[string]string)
	d := hpack.NewDecoder(4096, func(f hpack.HeaderField) { headers[f.Name] = f.Value })
	d.SetMaxStringLength(maxHeaders)
	for _, block := range blocks {
		if _, err := d.Write(block); err != nil {
			return nil, fmt.Errorf("response headers: %w", err)
		}
		if err := d.Close(); err != nil {
			return nil, fmt.Errorf("response headers: %w", err)
		}
	}
	return headers, nil
}
