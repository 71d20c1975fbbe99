package hookcall

import "time"

// The messages of both sides are those of dispatch.proto by the same names; what
// they mean is said there.

// Hello opens the conversation.
type Hello struct {
	Builders               string
	BuildersUseSubstitutes bool
	Store                  string
	LocalSystems           []string
	LocalFeatures          []string
	MaxJobs                uint64
	Timeout, MaxSilentTime time.Duration
	MaxLogSize             uint64
	KeepFailed             bool
	Environment            []string
	Client                 *Client // nil if it is no Nix daemon that asks
}

// A Client is whose connection the asking Nix daemon serves.
type Client struct {
	UID      uint32
	UIDKnown bool
	PID      uint32
	SSHPeer  string // the address of the host that sent the build here; "" for none
}

// Try asks whether the daemon will build a derivation.
type Try struct {
	AmWilling        bool
	System           string
	DrvPath          string
	RequiredFeatures []string
	Taken            bool
}

// Start goes on after acceptance.
type Start struct {
	Inputs        []string
	WantedOutputs []string
}

// A Message is what the daemon says: one of Reply, HandOver, and the events
// Queued, Placed, Copying, Building, Log, Fetching and Finished.
type Message interface{ message() }

// An Action is what a Reply says to do; the values are those of Reply.Action.
type Action int

// The actions.
const (
	Unspecified Action = iota
	Accept
	Decline
	DeclinePermanently
	Postpone
	Stock
)

// Reply answers Try.
type Reply struct {
	Action      Action
	MachineName string
	Reason      string
	Warn        bool
}

// HandOver names the output paths whose locks the hook shall free.
type HandOver struct{ Paths []string }

// Queued: the build waits for a machine.
type Queued struct{ Reason string }

// Placed: a machine was chosen.
type Placed struct{ Machine, Reason string }

// Copying: inputs travel to the machine. A nil Transfer tells nothing more.
type Copying struct{ Transfer *Transfer }

// Building: the machine builds.
type Building struct{}

// Log holds bytes of the builder's log. They are valid until the next call of
// Next.
type Log struct{ Data []byte }

// Fetching: outputs travel back.
type Fetching struct{ Transfer *Transfer }

// A Transfer is the progress of a copy.
type Transfer struct {
	Path                     string
	PathBytesDone, PathBytes uint64
	PathsDone, Paths         uint64
	BytesDone, Bytes         uint64
}

// Finished: the build ended.
type Finished struct {
	Status  BuildStatus
	Error   string
	Machine string
}

// unknown is a message of a newer daemon that this hook need not understand.
type unknown struct{}

func (Reply) message()    {}
func (HandOver) message() {}
func (Queued) message()   {}
func (Placed) message()   {}
func (Copying) message()  {}
func (Building) message() {}
func (Log) message()      {}
func (Fetching) message() {}
func (Finished) message() {}
func (unknown) message()  {}

// A BuildStatus is how a build ended; the values are those of BuildStatus in
// dispatch.proto.
type BuildStatus int

// The statuses.
const (
	StatusUnspecified BuildStatus = iota
	Built
	Substituted
	AlreadyValid
	PermanentFailure
	InputRejected
	OutputRejected
	TransientFailure
	CachedFailure
	TimedOut
	MiscFailure
	DependencyFailed
	LogLimitExceeded
	NotDeterministic
	ResolvesToAlreadyValid
	NoSubstituters
	Cancelled
)

var statusNames = [...]string{
	"unspecified", "built", "substituted", "already valid", "permanent failure",
	"input rejected", "output rejected", "transient failure", "cached failure",
	"timed out", "misc failure", "dependency failed", "log limit exceeded",
	"not deterministic", "resolves to already valid", "no substituters", "cancelled",
}

// String is the status in words, such as "permanent failure".
func (s BuildStatus) String() string {
	if s < 0 || int(s) >= len(statusNames) {
		return "unknown status"
	}
	return statusNames[s]
}

// Succeeded tells whether the outputs are valid after a build of this status.
func (s BuildStatus) Succeeded() bool {
	switch s {
	case Built, Substituted, AlreadyValid, ResolvesToAlreadyValid:
		return true
	default:
		return false
	}
}

// A Code is gRPC's code of a call's end.
type Code uint32

// The codes that a hook tells apart (grpc/doc/statuscodes.md).
const (
	OK               Code = 0
	PermissionDenied Code = 7
	Internal         Code = 13
	Unavailable      Code = 14
)
