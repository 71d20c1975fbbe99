package daemon

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// family starts a shell that stands for sshd, with descendants: it prints their
// process ids. The processes that it has left are killed with the test.
func family(t *testing.T, script string, want int) (sshd int, pids []int) {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // most have ended
		_ = cmd.Wait()
	})
	buf := make([]byte, 1000)
	text := ""
	for len(strings.Fields(text)) < want || !strings.HasSuffix(text, "\n") {
		n, err := out.Read(buf)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		text += string(buf[:n])
	}
	for word := range strings.FieldsSeq(text) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return cmd.Process.Pid, pids
}

// lives tells whether a process runs: a zombie does not.
func lives(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(after, "Z")
}

// TestEndScriptEndsWhatASshdProcessLeft has what a cut-off connection leaves: a
// remote process with a builder below it, one whose parent has ended, and one that
// ignores SIGTERM.
func TestEndScriptEndsWhatASshdProcessLeft(t *testing.T) {
	t.Parallel()
	for _, shell := range shells(t) {
		t.Run(shell[0], func(t *testing.T) {
			t.Parallel()
			stubborn := shell[0] == shells(t)[0][0] // one does: it takes ten seconds
			script, n := `sh -c 'echo $$; sh -c "echo \$\$; exec sleep 1000" & exec sleep 1000' &`, 2
			if stubborn {
				script, n = script+`sh -c 'trap "" TERM; echo $$; while :; do sleep 1; done' &`, 3
			}
			sshd, pids := family(t, script+" wait", n)
			_, others := family(t, `echo $$; exec sleep 1000`, 1)
			start := time.Now()
			said := runScript(t, shell, endInput(processOf(t, sshd)))
			if said != endGreeting+"\ngone\n" {
				t.Errorf("it said %q", said)
			}
			for _, pid := range append(pids, sshd) {
				if lives(pid) {
					t.Errorf("process %d of %v lives", pid, pids)
				}
			}
			if !lives(others[0]) {
				t.Error("a process of nobody's is ended")
			}
			if took := time.Since(start); stubborn && took < 5*time.Second {
				t.Errorf("SIGKILL came after %v", took)
			}
		})
	}
}

// TestEndScriptEndsNothingElse has a process with the number of a sshd process that
// is no more.
func TestEndScriptEndsNothingElse(t *testing.T) {
	t.Parallel()
	for _, shell := range shells(t) {
		t.Run(shell[0], func(t *testing.T) {
			t.Parallel()
			sshd, pids := family(t, `sh -c 'echo $$; exec sleep 1000' & wait`, 1)
			known := processOf(t, sshd)
			for name, p := range map[string]process{
				"the machine was rebooted": {boot: "another", pid: known.pid, start: known.start},
				"another process":          {boot: known.boot, pid: known.pid, start: known.start + "0"},
				"no process":               {boot: known.boot, pid: "999999999", start: known.start},
			} {
				if said := runScript(t, shell, endInput(p)); said != endGreeting+"\ngone\n" {
					t.Errorf("%s: it said %q", name, said)
				}
				if !lives(sshd) || !lives(pids[0]) {
					t.Fatalf("%s: a process was ended", name)
				}
			}
		})
	}
}
