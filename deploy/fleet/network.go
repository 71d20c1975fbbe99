package fleet

import (
	"context"
	"fmt"
	"os/exec"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Every fleet has the same addresses: they exist only in its own network
// namespaces. The bridge is 10.211.0.1, hosts are 10.211.0.10 and up, names that
// lead through a proxy are 10.211.255.1 and up, on the bridge.
const (
	firstHost     = 10
	maxHosts      = 64
	maxFar        = 64
	bridgeAddr    = "10.211.0.1"
	bridgeMAC     = "02:00:0a:d3:00:01"
	prefixLength  = "/16"
	bridgeName    = "br0"
	hostInterface = "eth0"
)

func hostAddr(index int) string { return fmt.Sprintf("10.211.0.%d", index) }
func hostMAC(index int) string  { return fmt.Sprintf("02:00:0a:d3:00:%02x", index) }
func farAddr(index int) string  { return fmt.Sprintf("10.211.255.%d", index) }
func portName(index int) string { return fmt.Sprintf("p%d", index) }

// makeNetwork makes the fleet's network namespace, held by a process that does
// nothing, and the bridge in it.
func (f *Fleet) makeNetwork(ctx context.Context) error {
	var err error
	if f.network, err = f.starter.start(exec.Command("/bin/sleep", "infinity"), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("make the network namespace: %w", err)
	}
	var batch strings.Builder
	fmt.Fprintf(&batch, "link set lo up\nlink add %s address %s type bridge stp_state 0 forward_delay 0\n", bridgeName, bridgeMAC)
	fmt.Fprintf(&batch, "link set %s up\naddr add %s%s dev %[1]s\n", bridgeName, bridgeAddr, prefixLength)
	for i := firstHost; i < firstHost+maxHosts; i++ {
		fmt.Fprintf(&batch, "neigh replace %s lladdr %s dev %s nud permanent\n", hostAddr(i), hostMAC(i), bridgeName)
	}
	return f.ip(ctx, f.network, batch.String())
}

func killNetwork(ctx context.Context, network process) error {
	if err := network.signal(unix.SIGKILL); err != nil {
		return err
	}
	return network.waitGone(ctx)
}

// connect joins a host that just started to the bridge. Neighbours are fixed: a
// host that is cut off or off is silent, instead of "no route" from the kernel
// when nobody answers ARP.
func (f *Fleet) connect(ctx context.Context, h *Host, init process) error {
	port := portName(h.index)
	var batch strings.Builder
	fmt.Fprintf(&batch, "link add %s type veth peer name %s address %s netns %d\n", port, hostInterface, hostMAC(h.index), init.PID)
	fmt.Fprintf(&batch, "link set %s master %s up\n", port, bridgeName)
	if err := f.ip(ctx, f.network, batch.String()); err != nil {
		return err
	}
	batch.Reset()
	fmt.Fprintf(&batch, "link set lo up\nlink set %s up\naddr add %s%s dev %[1]s\n", hostInterface, hostAddr(h.index), prefixLength)
	neighbour := func(addr, mac string) {
		fmt.Fprintf(&batch, "neigh replace %s lladdr %s dev %s nud permanent\n", addr, mac, hostInterface)
	}
	neighbour(bridgeAddr, bridgeMAC)
	for i := firstHost; i < firstHost+maxHosts; i++ {
		if i != h.index {
			neighbour(hostAddr(i), hostMAC(i))
		}
	}
	for i := 1; i <= maxFar; i++ {
		neighbour(farAddr(i), bridgeMAC)
	}
	return f.ip(ctx, init, batch.String())
}

// disconnect removes the host's cable. It is no error if there is none.
func (f *Fleet) disconnect(ctx context.Context, h *Host) {
	f.ip(ctx, f.network, "link del "+portName(h.index)+"\n") //nolint:errcheck
}

// setPort lets packets pass a host's bridge port or drops them, both ways. The
// host sees its interface up all the time, and nobody gets a reset.
func (f *Fleet) setPort(ctx context.Context, h *Host, forward bool) error {
	state := 0 // disabled
	if forward {
		state = 3 // forwarding
	}
	return f.netTool(ctx, "bridge", f.network, fmt.Sprintf("link set dev %s state %d\n", portName(h.index), state))
}

// ip runs a batch of ip(8) commands in a process's network namespace.
func (f *Fleet) ip(ctx context.Context, in process, batch string) error {
	return f.netTool(ctx, "ip", in, batch)
}

func (f *Fleet) netTool(ctx context.Context, tool string, in process, batch string) error {
	nsenter, err := findTool("nsenter")
	if err != nil {
		return err
	}
	program, err := findTool(tool)
	if err != nil {
		return err
	}
	if !in.alive() {
		return fmt.Errorf("configure the network of process %d: it has ended", in.PID)
	}
	cmd := exec.CommandContext(ctx, nsenter, "-t", strconv.Itoa(in.PID), "-n", program, "-batch", "-")
	cmd.Stdin = strings.NewReader(batch)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", tool, err, tail(out, 500))
	}
	return nil
}

// inNetwork runs fn in the fleet's network namespace.
func (f *Fleet) inNetwork(fn func() error) error { return inNetworkOf(f.network, fn) }

// inNetworkOf runs fn on a thread that is in a process's network namespace. What
// fn opens on its own goroutine (sockets) is in that namespace for good.
func inNetworkOf(p process, fn func() error) error {
	if !p.alive() {
		return fmt.Errorf("enter the network of process %d: it has ended", p.PID)
	}
	ours, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open our network namespace: %w", err)
	}
	defer unix.Close(ours)
	theirs, err := unix.Open(fmt.Sprintf("/proc/%d/ns/net", p.PID), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the network namespace of process %d: %w", p.PID, err)
	}
	defer unix.Close(theirs)
	runtime.LockOSThread()
	if err := unix.Setns(theirs, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter the network namespace of process %d: %w", p.PID, err)
	}
	fnErr := fn()
	if err := unix.Setns(ours, unix.CLONE_NEWNET); err != nil {
		// The thread stays locked and so ends with its goroutine.
		return fmt.Errorf("leave the network namespace of process %d: %w", p.PID, err)
	}
	runtime.UnlockOSThread()
	return fnErr
}
