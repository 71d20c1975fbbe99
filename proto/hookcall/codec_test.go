package hookcall

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func TestRequestsAreThoseOfTheGeneratedCode(t *testing.T) {
	for _, tt := range []struct {
		name string
		got  fields
		want *dispatchv1.HookRequest
	}{
		{"hello", (&Hello{
			Builders: "ssh://mac ; ssh://b\n", BuildersUseSubstitutes: true, Store: "auto",
			LocalSystems: []string{"x86_64-linux", "", "i686-linux"}, LocalFeatures: []string{"kvm"},
			MaxJobs: 1 << 63, Timeout: 90*time.Second + 5, MaxSilentTime: time.Millisecond, MaxLogSize: 300, KeepFailed: true,
			Environment: []string{"NIX_STORE_DIR=/x", "NIX_CONF_DIR=/y"}, Client: &Client{UID: 1000, UIDKnown: true, PID: 4711, SSHPeer: "10.0.0.7"},
		}).encode(), &dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Hello{Hello: &dispatchv1.Hello{
			Builders: "ssh://mac ; ssh://b\n", BuildersUseSubstitutes: true, Store: "auto",
			LocalSystems: []string{"x86_64-linux", "", "i686-linux"}, LocalFeatures: []string{"kvm"}, MaxJobs: 1 << 63,
			Limits: &dispatchv1.Limits{
				Timeout: durationpb.New(90*time.Second + 5), MaxSilentTime: durationpb.New(time.Millisecond), MaxLogSize: 300,
			}, KeepFailed: true, Environment: []string{"NIX_STORE_DIR=/x", "NIX_CONF_DIR=/y"},
			Client: &dispatchv1.Client{Uid: proto.Uint32(1000), Pid: 4711, SshPeer: "10.0.0.7"},
		}}}},
		{"client without a user", (&Hello{Client: &Client{PID: 1}}).encode(), &dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Hello{
			Hello: &dispatchv1.Hello{Limits: &dispatchv1.Limits{}, Client: &dispatchv1.Client{Pid: 1}}}}},
		{"client root", (&Hello{Client: &Client{UIDKnown: true}}).encode(), &dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Hello{
			Hello: &dispatchv1.Hello{Limits: &dispatchv1.Limits{}, Client: &dispatchv1.Client{Uid: proto.Uint32(0)}}}}},
		{"nothing set", (&Hello{}).encode(), &dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Hello{
			Hello: &dispatchv1.Hello{Limits: &dispatchv1.Limits{}}}}},
		{"try", (&Try{AmWilling: true, System: "builtin", DrvPath: "/nix/store/x.drv", RequiredFeatures: []string{"a", "b"}, Taken: true}).encode(),
			&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Try{Try: &dispatchv1.Try{
				AmWilling: true, System: "builtin", DrvPath: "/nix/store/x.drv", RequiredFeatures: []string{"a", "b"}, Taken: true}}}},
		{"start", (&Start{Inputs: []string{"/nix/store/a", "/nix/store/b"}, WantedOutputs: []string{"out"}}).encode(),
			&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Start{Start: &dispatchv1.Start{
				Inputs: []string{"/nix/store/a", "/nix/store/b"}, WantedOutputs: []string{"out"}}}}},
		{"handed over", encodeHandedOver(), &dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_HandedOver{
			HandedOver: &dispatchv1.HandedOver{}}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := new(dispatchv1.HookRequest)
			if err := proto.Unmarshal(tt.got, got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, protocmp.Transform()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func event(e *dispatchv1.BuildEvent) *dispatchv1.HookResponse {
	e.BuildId, e.DrvPath = 7, "/nix/store/x.drv"
	return &dispatchv1.HookResponse{Message: &dispatchv1.HookResponse_Event{Event: e}}
}

// responses are all that a daemon may say, with what is to be made of it.
var responses = []struct {
	sent *dispatchv1.HookResponse
	want Message
}{
	{&dispatchv1.HookResponse{Message: &dispatchv1.HookResponse_Reply{Reply: &dispatchv1.Reply{
		Action: dispatchv1.Reply_ACTION_POSTPONE, MachineName: "ssh://mac", Reason: "full", Warn: true, BuildId: 3,
	}}}, Reply{Action: Postpone, MachineName: "ssh://mac", Reason: "full", Warn: true}},
	{&dispatchv1.HookResponse{Message: &dispatchv1.HookResponse_HandOver{HandOver: &dispatchv1.HandOver{
		Paths: []string{"/nix/store/a", "/nix/store/b"},
	}}}, HandOver{Paths: []string{"/nix/store/a", "/nix/store/b"}}},
	{event(&dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Queued{Queued: &dispatchv1.Queued{Reason: "no slot"}}}), Queued{"no slot"}},
	{event(&dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Placed{Placed: &dispatchv1.Placed{Machine: "m", Reason: "r"}}}), Placed{"m", "r"}},
	{event(&dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Building{Building: &dispatchv1.Building{}}}), Building{}},
	{event(&dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Log{Log: &dispatchv1.Log{Data: []byte("\x00\xff")}}}), Log{[]byte("\x00\xff")}},
	{event(&dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Copying{Copying: &dispatchv1.Copying{}}}), Copying{}},
	{event(&dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Copying{Copying: &dispatchv1.Copying{Transfer: &dispatchv1.Transfer{
		Path: "p", PathBytesDone: 1, PathBytes: 2, PathsDone: 3, Paths: 4, BytesDone: 5, Bytes: 1 << 40,
	}}}}), Copying{&Transfer{Path: "p", PathBytesDone: 1, PathBytes: 2, PathsDone: 3, Paths: 4, BytesDone: 5, Bytes: 1 << 40}}},
	{event(&dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Fetching{Fetching: &dispatchv1.Fetching{Transfer: &dispatchv1.Transfer{
		Paths: 4}}}}), Fetching{&Transfer{Paths: 4}}},
	{event(&dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Finished{Finished: &dispatchv1.Finished{
		Status: dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT, Error: "e", Machine: "m", BuildDuration: durationpb.New(time.Hour),
	}}}), Finished{Status: TimedOut, Error: "e", Machine: "m"}},
}

func TestResponsesAreThoseOfTheGeneratedCode(t *testing.T) {
	for _, tt := range responses {
		data, err := proto.Marshal(tt.sent)
		if err != nil {
			t.Fatal(err)
		}
		// What a newer daemon might add is passed over.
		data = append(data, "\xa0\x06\x01\xa9\x06abcdefgh\xa2\x06\x02hi\xa5\x06wxyz"...)
		got, err := decode(data)
		if err != nil {
			t.Errorf("%v: %v", tt.sent, err)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%v (-want +got):\n%s", tt.sent, diff)
		}
	}
	if got, err := decode([]byte("\xa2\x06\x02hi")); err != nil || got != (unknown{}) {
		t.Errorf("an unknown message is read as %v, %v", got, err)
	}
}

// TestNoFieldIsForgotten fails when dispatch.proto gets a field of which nobody
// has thought here.
func TestNoFieldIsForgotten(t *testing.T) {
	known := map[protoreflect.Name]string{
		"HookRequest":  "hello try start handed_over ",
		"Hello":        "builders builders_use_substitutes store local_systems local_features max_jobs limits keep_failed environment client ",
		"Limits":       "timeout max_silent_time max_log_size ",
		"Client":       "uid pid ssh_peer ",
		"Try":          "am_willing system drv_path required_features taken ",
		"Start":        "inputs wanted_outputs ",
		"HandedOver":   "",
		"HookResponse": "reply event hand_over ",
		"Reply":        "action machine_name reason warn build_id ",
		"HandOver":     "paths ",
		"BuildEvent":   "build_id drv_path queued placed copying building log fetching finished ",
		"Queued":       "reason ",
		"Placed":       "machine reason ",
		"Copying":      "transfer ",
		"Building":     "",
		"Log":          "data ",
		"Fetching":     "transfer ",
		"Transfer":     "path path_bytes_done path_bytes paths_done paths bytes_done bytes ",
		"Finished":     "status error machine build_duration ",
	}
	messages := dispatchv1.File_dispatch_v1_dispatch_proto.Messages()
	for name, want := range known {
		got := ""
		fields := messages.ByName(name).Fields()
		for i := range fields.Len() {
			got += string(fields.Get(i).Name()) + " "
		}
		if got != want {
			t.Errorf("message %s has the fields %q, known are %q", name, got, want)
		}
	}
}

func TestEnumsAreThoseOfTheGeneratedCode(t *testing.T) {
	for n := range dispatchv1.BuildStatus_name {
		if got, want := BuildStatus(n).Succeeded(), dispatchv1.BuildStatus(n).Succeeded(); got != want {
			t.Errorf("%v: Succeeded = %v, want %v", dispatchv1.BuildStatus(n), got, want)
		}
	}
	if got, want := len(statusNames), len(dispatchv1.BuildStatus_name); got != want {
		t.Errorf("%d statuses, want %d", got, want)
	}
	for got, want := range map[BuildStatus]dispatchv1.BuildStatus{
		PermanentFailure: dispatchv1.BuildStatus_BUILD_STATUS_PERMANENT_FAILURE,
		TimedOut:         dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT,
		NotDeterministic: dispatchv1.BuildStatus_BUILD_STATUS_NOT_DETERMINISTIC,
		Cancelled:        dispatchv1.BuildStatus_BUILD_STATUS_CANCELLED,
	} {
		if int(got) != int(want) {
			t.Errorf("%v is %d, want %d", got, got, want)
		}
	}
	for got, want := range map[Action]dispatchv1.Reply_Action{
		Accept: dispatchv1.Reply_ACTION_ACCEPT, Decline: dispatchv1.Reply_ACTION_DECLINE,
		DeclinePermanently: dispatchv1.Reply_ACTION_DECLINE_PERMANENTLY, Postpone: dispatchv1.Reply_ACTION_POSTPONE,
		Stock: dispatchv1.Reply_ACTION_STOCK,
	} {
		if int(got) != int(want) {
			t.Errorf("action %v is %d", want, got)
		}
	}
}

// FuzzDecode checks that what the generated code takes for a message is read as
// the same, and that nothing else does harm.
func FuzzDecode(f *testing.F) {
	for _, r := range responses {
		data, err := proto.Marshal(r.sent)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := decode(data)
		want := new(dispatchv1.HookResponse)
		if proto.Unmarshal(data, want) != nil || err != nil {
			return
		}
		if m, ok := got.(Log); ok && len(want.ProtoReflect().GetUnknown()) == 0 {
			if e := want.GetEvent().GetLog(); e != nil && string(e.GetData()) != string(m.Data) {
				t.Errorf("log %q, want %q", m.Data, e.GetData())
			}
		}
	})
}
