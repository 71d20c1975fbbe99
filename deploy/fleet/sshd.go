package fleet

import (
	"context"
	"fmt"
	"os"
	"strings"
)

const sshdLog = "/var/log/sshd.log"

func sshdConfig(suite string) string {
	text := `# The first value of a keyword wins; Match blocks of an included file end with it.
Include /etc/ssh/sshd_config.first
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
UseDNS no
MaxStartups 1000
LogLevel VERBOSE
PidFile /run/sshd.pid
Subsystem sftp internal-sftp
`
	if suite != Bookworm {
		// Since OpenSSH 9.8: a client that is killed often would be locked out.
		text += "PerSourcePenalties no\n"
	}
	return text
}

// SSHConnections is the number of SSH connections sshd has accepted since the
// host was made: completed handshakes with a key that lets in.
func (h *Host) SSHConnections() (int, error) {
	log, err := h.ReadFile(sshdLog)
	if err != nil {
		return 0, err
	}
	n := 0
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, "Accepted publickey for ") {
			n++
		}
	}
	return n, nil
}

// SSHLog is sshd's log since the host was made, LogLevel VERBOSE.
func (h *Host) SSHLog() (string, error) {
	log, err := h.ReadFile(sshdLog)
	return string(log), err
}

func (h *Host) waitSSHD(ctx context.Context, init process) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return poll(ctx, "sshd of "+h.name+" to listen", func() (bool, error) {
		if !init.alive() {
			return false, ErrOff
		}
		for _, table := range []string{"tcp", "tcp6"} {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", init.PID, table))
			if err == nil && listens(string(text), 22) {
				return true, nil
			}
		}
		return false, nil
	})
}

// listens looks for a listening socket (state 0A) on a port in /proc/net/tcp.
func listens(table string, port int) bool {
	for line := range strings.Lines(table) {
		words := strings.Fields(line)
		if len(words) > 3 && words[3] == "0A" && strings.HasSuffix(words[1], fmt.Sprintf(":%04X", port)) {
			return true
		}
	}
	return false
}
