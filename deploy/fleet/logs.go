package fleet

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// CopyLogs copies the logs of all hosts that are on into an existing directory of
// this machine: for each host HOST.console.log, HOST.sshd.log and
// HOST.nix-daemon.log, as far as the host has them. Call it before Close, which
// removes the logs with the hosts.
func (f *Fleet) CopyLogs(dir string) error {
	var errs []error
	for _, h := range f.Hosts() {
		console, err := os.ReadFile(h.console())
		errs = append(errs, copyLog(filepath.Join(dir, h.name+".console.log"), console, err))
		for kind, name := range map[string]string{"sshd": sshdLog, "nix-daemon": daemonLog} {
			text, err := h.ReadFile(name)
			errs = append(errs, copyLog(filepath.Join(dir, h.name+"."+kind+".log"), text, err))
		}
	}
	return errors.Join(errs...)
}

// copyLog writes a log that was read with an error err.
func copyLog(to string, text []byte, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrOff) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.WriteFile(to, text, 0o644)
}
