package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func TestStatusOfUsers(t *testing.T) {
	d := (&fakeDaemon{status: &dispatchv1.StatusResponse{
		Users:      []*dispatchv1.UserUsage{{User: "al\x1bice", Connections: 3, Calls: 4, RequestBytes: 1 << 20, LogBytes: 2 << 30}},
		UserBounds: &dispatchv1.UserUsage{Connections: 256, LogBytes: 4 << 30},
	}}).start(t)
	code, stdout, _ := runCommand(t.Context(), d.socket, "status", "--users")
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	var rows [][]string
	for _, line := range lines {
		rows = append(rows, strings.Fields(line))
	}
	want := [][]string{
		{"USER", "CONNECTIONS", "CALLS", "STREAMS", "REQUESTS", "DERIVATIONS", "HOOKS", "BUILDS", "PINGS", "DETACHED", "LOGS"},
		{"alce", "3", "4", "0", "1.0", "MiB", "0.0", "KiB", "0", "0", "0", "0", "2.0", "GiB"},
		{"(at", "most)", "256", "-", "-", "-", "-", "-", "-", "-", "-", "4.0", "GiB"},
	}
	if diff := cmp.Diff(want, rows); code != exitOK || diff != "" {
		t.Errorf("status %d (-want +got):\n%s", code, diff)
	}
	_, stdout, _ = runCommand(t.Context(), d.socket, "status", "--users", "--json")
	var got struct {
		Users      []map[string]any
		UserBounds map[string]any
	}
	if err := json.Unmarshal([]byte(stdout), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Users) != 1 || got.Users[0]["calls"] != 4.0 || got.UserBounds["connections"] != 256.0 {
		t.Errorf("JSON has %+v", got)
	}
}

func TestStatus(t *testing.T) {
	now := time.Now()
	d := (&fakeDaemon{status: &dispatchv1.StatusResponse{
		Machines: []*dispatchv1.MachineStatus{
			{Uri: "ssh://mac", State: dispatchv1.MachineState_MACHINE_STATE_PARKED, Slots: 8, Running: 1, Parked: "disk", Load: &dispatchv1.MachineLoad{
				Time: timestamppb.New(time.Unix(0, 0)), StoreFreeBytes: proto.Uint64(3 << 29), BuildDirFreeBytes: proto.Uint64(5 << 30),
				Load1: proto.Float64(0.5), Cores: proto.Uint32(8), CpuPressure: proto.Float64(0.25),
			}},
			{Uri: "ssh://poochie", State: dispatchv1.MachineState_MACHINE_STATE_DOWN, Slots: 1, Reason: "no\nroute\x1b[2J", Drained: true,
				LoadUnknown: "it is down"},
		},
		Unplaceable: 1,
		Reload: &dispatchv1.ReloadStatus{
			Time: timestamppb.New(now), Errors: []*dispatchv1.MachineError{{File: "machines", Line: 3, Message: "machines:3: bad\x1b"}}},
		Builds: []*dispatchv1.BuildInfo{
			{Id: 7, DrvPath: helloDrv, Phase: dispatchv1.Phase_PHASE_BUILDING, Machine: "ssh://mac", Since: timestamppb.New(now.Add(-time.Minute)), User: "al\x1bice", Priority: -3},
			{Id: 8, DrvPath: otherDrv, Phase: dispatchv1.Phase_PHASE_QUEUED, Reason: "all slots are taken"},
		},
	}}).start(t)

	code, stdout, _ := runCommand(t.Context(), d.socket, "status")
	want := []string{"ssh://mac", "parked", "1 of 8", "1.5 GiB", "0.50 of 8", "not known", "ssh://poochie", "down", "no route", "7", "building", "1m0s", "alce", "queued", "all slots are taken",
		"was not read anew at", "machines:3: bad", "can ever run: 1"}
	for _, word := range want {
		if code != exitOK || !strings.Contains(stdout, word) || strings.ContainsRune(stdout, 0x1b) {
			t.Errorf("status %d, want %q in:\n%s", code, word, stdout)
		}
	}

	_, stdout, _ = runCommand(t.Context(), d.socket, "status", "--json")
	var got struct {
		Machines, Builds []map[string]any
		Unplaceable      int
		Reload           map[string]any
	}
	if err := json.Unmarshal([]byte(stdout), &got); err != nil {
		t.Fatal(err)
	}
	if s, ok := got.Builds[0]["seconds"].(float64); !ok || s < 60 || s > 600 {
		t.Errorf("seconds = %v, want about 60", got.Builds[0]["seconds"])
	}
	delete(got.Builds[0], "seconds")
	if diff := cmp.Diff([]map[string]any{
		{"uri": "ssh://mac", "state": "parked", "slots": 8.0, "running": 1.0, "reason": "", "drained": false, "removed": false,
			"parked": "disk", "loadUnknown": "", "load": map[string]any{
				"time": "1970-01-01T00:00:00Z", "storeFreeBytes": 3.0 * (1 << 29), "storeSizeBytes": nil,
				"buildDirFreeBytes": 5.0 * (1 << 30), "buildDirSizeBytes": nil,
				"load1": 0.5, "load5": nil, "load15": nil, "cores": 8.0, "memoryAvailableBytes": nil, "memorySizeBytes": nil,
				"cpuPressure": 0.25, "memoryPressure": nil, "ioPressure": nil,
			}},
		{"uri": "ssh://poochie", "state": "down", "slots": 1.0, "running": 0.0, "reason": "no\nroute\x1b[2J", "drained": true, "removed": false,
			"parked": "", "load": nil, "loadUnknown": "it is down"},
	}, got.Machines); diff != "" {
		t.Errorf("machines (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]map[string]any{
		{"id": 7.0, "drvPath": helloDrv, "phase": "building", "machine": "ssh://mac", "reason": "", "user": "al\x1bice", "priority": -3.0},
		{"id": 8.0, "drvPath": otherDrv, "phase": "queued", "machine": "", "seconds": 0.0, "reason": "all slots are taken", "user": "", "priority": 0.0},
	}, got.Builds); diff != "" {
		t.Errorf("builds (-want +got):\n%s", diff)
	}
	if got.Unplaceable != 1 || got.Reload["success"] != false || got.Reload["errors"].([]any)[0] != "machines:3: bad\x1b" {
		t.Errorf("unplaceable %d, reload %v", got.Unplaceable, got.Reload)
	}
}

func TestStatusOfNothingIsEmptyLists(t *testing.T) {
	d := (&fakeDaemon{status: &dispatchv1.StatusResponse{}}).start(t)
	_, stdout, _ := runCommand(t.Context(), d.socket, "status", "--json")
	if want := "{\n  \"machines\": [],\n  \"builds\": [],\n  \"unplaceable\": 0,\n  \"detached\": [],\n  \"reload\": null\n}\n"; stdout != want {
		t.Errorf("output %q, want %q", stdout, want)
	}
}

func TestCancel(t *testing.T) {
	var got []uint64
	d := (&fakeDaemon{cancel: func(id uint64) error {
		got = append(got, id)
		if id == 2 {
			return status.Error(codes.NotFound, "no build 2 is in progress")
		}
		return nil
	}}).start(t)
	code, _, stderr := runCommand(t.Context(), d.socket, "cancel", "1", "2", "3")
	if code != exitFailed || !strings.Contains(stderr, "no build 2 is in progress") {
		t.Errorf("status %d, said %q", code, stderr)
	}
	if diff := cmp.Diff([]uint64{1, 2, 3}, got); diff != "" {
		t.Errorf("cancelled (-want +got):\n%s", diff)
	}
}
