package hookcall

import (
	"encoding/binary"
	"errors"
	"time"
)

// The wire types of protocol buffers that the messages use or may meet
// (protobuf.dev/programming-guides/encoding).
const (
	wireVarint  = 0
	wireFixed64 = 1
	wireBytes   = 2
	wireFixed32 = 5
)

var errMessage = errors.New("malformed message")

// A fields writes the fields of a message. Zero values are left out, as in
// proto3.
type fields []byte

func (f *fields) tag(number, wireType int) {
	*f = binary.AppendUvarint(*f, uint64(number<<3|wireType)) //nolint:gosec // a small constant
}

func (f *fields) uint(number int, v uint64) {
	if v != 0 {
		f.tag(number, wireVarint)
		*f = binary.AppendUvarint(*f, v)
	}
}

func (f *fields) bool(number int, v bool) {
	if v {
		f.uint(number, 1)
	}
}

func (f *fields) string(number int, v string) {
	if v != "" {
		f.strings(number, []string{v})
	}
}

func (f *fields) strings(number int, list []string) {
	for _, v := range list {
		f.tag(number, wireBytes)
		*f = append(binary.AppendUvarint(*f, uint64(len(v))), v...)
	}
}

func (f *fields) sub(number int, v fields) {
	f.tag(number, wireBytes)
	*f = append(binary.AppendUvarint(*f, uint64(len(v))), v...)
}

func (f *fields) duration(number int, d time.Duration) {
	if d <= 0 {
		return
	}
	var v fields
	v.uint(1, uint64(d/time.Second))
	v.uint(2, uint64(d%time.Second))
	f.sub(number, v)
}

func (h *Hello) encode() fields {
	var limits, m fields
	limits.duration(1, h.Timeout)
	limits.duration(2, h.MaxSilentTime)
	limits.uint(3, h.MaxLogSize)
	m.string(1, h.Builders)
	m.bool(2, h.BuildersUseSubstitutes)
	m.string(3, h.Store)
	m.strings(4, h.LocalSystems)
	m.strings(5, h.LocalFeatures)
	m.uint(6, h.MaxJobs)
	m.sub(7, limits)
	m.bool(8, h.KeepFailed)
	m.strings(9, h.Environment)
	if h.Client != nil {
		m.sub(10, h.Client.encode())
	}
	return request(1, m)
}

func (c *Client) encode() fields {
	var m fields
	if c.UIDKnown { // also if it is 0
		m.tag(1, wireVarint)
		m = binary.AppendUvarint(m, uint64(c.UID))
	}
	m.uint(2, uint64(c.PID))
	m.string(3, c.SSHPeer)
	return m
}

func (t *Try) encode() fields {
	var m fields
	m.bool(1, t.AmWilling)
	m.string(2, t.System)
	m.string(3, t.DrvPath)
	m.strings(4, t.RequiredFeatures)
	m.bool(5, t.Taken)
	return request(2, m)
}

func (s *Start) encode() fields {
	size := 0
	for _, p := range s.Inputs { // there may be thousands
		size += len(p) + 4
	}
	m := make(fields, 0, size+64)
	m.strings(1, s.Inputs)
	m.strings(2, s.WantedOutputs)
	return request(3, m)
}

func encodeHandedOver() fields { return request(4, nil) }

// request is a HookRequest with one of its messages.
func request(number int, m fields) fields {
	r := make(fields, 0, len(m)+16)
	r.sub(number, m)
	return r
}

// A field is one field as it was read: number with either an integer or bytes.
type field struct {
	number int
	n      uint64
	bytes  []byte
}

func (f field) string() string { return string(f.bytes) }

// each calls fn for each field of a message. Fields of wire types that the
// messages do not use are passed over.
func each(data []byte, fn func(field) error) error {
	for len(data) > 0 {
		tag, n := binary.Uvarint(data)
		if n <= 0 || tag>>3 == 0 || tag>>3 > 1<<29-1 {
			return errMessage
		}
		data = data[n:]
		f := field{number: int(tag >> 3)} //nolint:gosec // bounded above
		var size uint64
		switch tag & 7 {
		case wireVarint:
			if f.n, n = binary.Uvarint(data); n <= 0 {
				return errMessage
			}
			size = uint64(n)
		case wireBytes:
			length, n := binary.Uvarint(data)
			if n <= 0 || length > uint64(len(data)-n) {
				return errMessage
			}
			data = data[n:]
			f.bytes, size = data[:length:length], length
		case wireFixed64:
			f.number, size = 0, 8
		case wireFixed32:
			f.number, size = 0, 4
		default:
			return errMessage
		}
		if size > uint64(len(data)) {
			return errMessage
		}
		data = data[size:]
		if f.number == 0 {
			continue
		}
		if err := fn(f); err != nil {
			return err
		}
	}
	return nil
}

// decode reads a HookResponse. Log data is not copied.
func decode(data []byte) (m Message, err error) {
	m = unknown{}
	err = each(data, func(f field) (err error) {
		switch f.number {
		case 1:
			m, err = decodeReply(f.bytes)
		case 2:
			m, err = decodeEvent(f.bytes)
		case 3:
			m, err = decodeHandOver(f.bytes)
		}
		return err
	})
	return m, err
}

func decodeReply(data []byte) (Message, error) {
	var r Reply
	err := each(data, func(f field) error {
		switch f.number {
		case 1:
			r.Action = Action(f.n) //nolint:gosec // an unknown one is treated as such
		case 2:
			r.MachineName = f.string()
		case 3:
			r.Reason = f.string()
		case 4:
			r.Warn = f.n != 0
		}
		return nil
	})
	return r, err
}

func decodeHandOver(data []byte) (Message, error) {
	var h HandOver
	err := each(data, func(f field) error {
		if f.number == 1 {
			h.Paths = append(h.Paths, f.string())
		}
		return nil
	})
	return h, err
}

// decodeEvent reads a BuildEvent.
func decodeEvent(data []byte) (m Message, err error) {
	m = unknown{}
	err = each(data, func(f field) (err error) {
		switch f.number {
		case 3:
			var texts [2]string
			texts, err = decodeTexts(f.bytes)
			m = Queued{Reason: texts[0]}
		case 4:
			var texts [2]string
			texts, err = decodeTexts(f.bytes)
			m = Placed{Machine: texts[0], Reason: texts[1]}
		case 5:
			var t *Transfer
			t, err = decodeCopy(f.bytes)
			m = Copying{t}
		case 6:
			m = Building{}
		case 7:
			m, err = decodeLog(f.bytes)
		case 8:
			var t *Transfer
			t, err = decodeCopy(f.bytes)
			m = Fetching{t}
		case 9:
			m, err = decodeFinished(f.bytes)
		}
		return err
	})
	return m, err
}

// decodeTexts reads a message of up to two strings.
func decodeTexts(data []byte) (texts [2]string, err error) {
	err = each(data, func(f field) error {
		if f.number <= len(texts) {
			texts[f.number-1] = f.string()
		}
		return nil
	})
	return texts, err
}

func decodeLog(data []byte) (Message, error) {
	var l Log
	err := each(data, func(f field) error {
		if f.number == 1 {
			l.Data = f.bytes
		}
		return nil
	})
	return l, err
}

func decodeFinished(data []byte) (Message, error) {
	var d Finished
	err := each(data, func(f field) error {
		switch f.number {
		case 1:
			d.Status = BuildStatus(f.n) //nolint:gosec // an unknown one is treated as such
		case 2:
			d.Error = f.string()
		case 3:
			d.Machine = f.string()
		}
		return nil
	})
	return d, err
}

// decodeCopy reads Copying or Fetching.
func decodeCopy(data []byte) (t *Transfer, err error) {
	err = each(data, func(f field) error {
		if f.number != 1 {
			return nil
		}
		t = new(Transfer)
		return each(f.bytes, t.set)
	})
	return t, err
}

func (t *Transfer) set(f field) error {
	switch f.number {
	case 1:
		t.Path = f.string()
	case 2:
		t.PathBytesDone = f.n
	case 3:
		t.PathBytes = f.n
	case 4:
		t.PathsDone = f.n
	case 5:
		t.Paths = f.n
	case 6:
		t.BytesDone = f.n
	case 7:
		t.Bytes = f.n
	}
	return nil
}
