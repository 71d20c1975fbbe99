package sshpool

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	xknownhosts "golang.org/x/crypto/ssh/knownhosts"

	"nixdispatch/sshpool/sshtest"
)

func TestStrictHostKeyCheckingWithSSHD(t *testing.T) {
	t.Parallel()
	d := sshtest.StartSSHD(t)
	other := keyLine(sshtest.NewKey().PublicKey())
	name := fmt.Sprintf("[%s]:%d", d.Host, d.Port)
	known, changed := strings.TrimSuffix(d.KnownHosts(0), " test")+"\n", "# comment\n"+name+" "+other+"\n"
	revoked := "@revoked * " + d.HostKeys()[0] + "\n@revoked * " + d.HostKeys()[1] + "\n"
	tests := []struct {
		value, file string
		cause       Cause // "" if it connects
		added       bool
		warning     string
	}{
		{"yes", known, "", false, ""},
		{"yes", "", CauseHostKeyUnknown, false, ""},
		{"yes", changed, CauseHostKeyChanged, false, ""},
		{"ask", "", CauseHostKeyUnknown, false, ""},
		{"ask", changed, CauseHostKeyChanged, false, ""},
		{"accept-new", known, "", false, ""},
		{"accept-new", "", "", true, "unknown host key is taken and remembered"},
		{"accept-new", changed, CauseHostKeyChanged, false, ""},
		{"accept-new", revoked, CauseHostKeyRevoked, false, ""},
		{"no", known, "", false, ""},
		{"no", "", "", true, "unknown host key is taken and remembered"},
		{"no", changed, "", false, "host key has changed, and is taken all the same"},
		{"no", revoked, CauseHostKeyRevoked, false, ""},
	}
	for i, tt := range tests {
		t.Run(fmt.Sprintf("%s %d", tt.value, i), func(t *testing.T) {
			file := filepath.Join(t.TempDir(), ".ssh", "known_hosts")
			if tt.file != "" {
				if err := os.Mkdir(filepath.Dir(file), 0o700); err != nil {
					t.Fatal(err)
				}
				writeFile(t, file, tt.file)
			}
			cfg := configured(t, hostBlock(t, "mac", d, "StrictHostKeyChecking "+tt.value, "UserKnownHostsFile "+file))
			log := new(logBuffer)
			if tt.cause != "" {
				before := d.Log()
				e := failure(t, log.options(), cfg)
				if e.Step != StepHostKey || e.Cause != tt.cause || e.Fix == "" || !strings.Contains(e.Error(), file) {
					t.Errorf("error %q: step %q, cause %q, want %q and the file's name", e, e.Step, e.Cause, tt.cause)
				}
				if tt.cause == CauseHostKeyChanged && !strings.Contains(e.Error(), file+":2") {
					t.Errorf("error %q does not name the line", e)
				}
				if strings.Contains(strings.TrimPrefix(d.Log(), before), "Accepted publickey") {
					t.Error("it has logged in all the same")
				}
			} else {
				mustRun(t, log.options(), cfg)
			}
			text, _ := os.ReadFile(file)
			if tt.cause != CauseHostKeyRevoked || tt.value != "no" { // there only we refuse
				sshAgrees(t, cfg, tt.cause == "")
			}
			if tt.added && string(text) != tt.file+known || !tt.added && string(text) != tt.file {
				t.Errorf("known_hosts is %q", text)
			}
			if warned := strings.Contains(log.String(), "host key"); tt.cause == "" && warned != (tt.warning != "") ||
				!strings.Contains(log.String(), tt.warning) {
				t.Errorf("log:\n%s\nwant %q", log, tt.warning)
			}
			if tt.added { // what was written is what ssh would find again
				out, err := exec.Command("ssh-keygen", "-F", name, "-f", file).CombinedOutput()
				if err != nil || !strings.Contains(string(out), known) {
					t.Errorf("ssh-keygen -F: %v\n%s", err, out)
				}
			}
		})
	}
}

func TestRememberedKeysWithSSHD(t *testing.T) {
	t.Parallel()
	d := sshtest.StartSSHD(t)
	file := filepath.Join(t.TempDir(), "known_hosts")
	writeFile(t, file, "pc "+d.HostKeys()[0]) // no newline at its end
	cfg := configured(t, hostBlock(t, "mac", d, "StrictHostKeyChecking accept-new", "HashKnownHosts yes",
		"HostKeyAlias big", "UserKnownHostsFile "+file))
	mustRun(t, Options{}, cfg)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(string(text), "\n"); len(lines) != 3 || !strings.HasPrefix(lines[1], "|1|") {
		t.Fatalf("known_hosts is %q", text)
	}
	if out, err := exec.Command("ssh-keygen", "-F", "big", "-f", file).CombinedOutput(); err != nil {
		t.Errorf("ssh-keygen -F: %v\n%s", err, out)
	}
	log := new(logBuffer)
	mustRun(t, log.options(), cfg)
	if strings.Contains(log.String(), "taken") {
		t.Errorf("the key remembered was not found again:\n%s", log)
	}
	// No file to write into, and none that can be.
	for file, want := range map[string]string{"none": "not remembered", "/dev/null": "remembered", "/no/such/dir/known": "cannot be remembered"} {
		log := new(logBuffer)
		mustRun(t, log.options(), configured(t, hostBlock(t, "mac", d, "StrictHostKeyChecking accept-new", "UserKnownHostsFile "+file)))
		if !strings.Contains(log.String(), want) {
			t.Errorf("%s: log has no %q:\n%s", file, want, log)
		}
	}
}

func TestKnownHostsOfConfigWithSSHD(t *testing.T) {
	t.Parallel()
	d := sshtest.StartSSHD(t)
	name := fmt.Sprintf("[%s]:%d", d.Host, d.Port)
	file := func(text string) string {
		name := filepath.Join(t.TempDir(), "file")
		writeFile(t, name, text+"\n")
		return name
	}
	bothKeys := d.HostKeys()[0] + "\n" + d.HostKeys()[1]
	hashed := file(xknownhosts.HashHostname(name) + " " + d.HostKeys()[1])
	for _, tt := range []struct {
		name    string
		options []string
		cause   Cause
	}{
		{"hashed", []string{"UserKnownHostsFile " + hashed}, ""},
		{"global", []string{"UserKnownHostsFile none", "GlobalKnownHostsFile " + hashed}, ""},
		{"alias", []string{"HostKeyAlias big", "UserKnownHostsFile " + file("big "+d.HostKeys()[0])}, ""},
		{"alias in other case", []string{"HostKeyAlias Big", "UserKnownHostsFile " + file("bIg "+d.HostKeys()[0])}, ""},
		{"no such alias", []string{"HostKeyAlias big"}, CauseHostKeyUnknown},
		{"revoked", []string{"RevokedHostKeys " + file(d.HostKeys()[0])}, CauseHostKeyRevoked},
		{"revoked in a list", []string{"RevokedHostKeys " + revoking(t, d.HostKeys()[0])}, CauseHostKeyRevoked},
		{"others revoked in a list", []string{"RevokedHostKeys " + revoking(t, keyLine(sshtest.NewKey().PublicKey()))}, ""},
		{"other revoked", []string{"RevokedHostKeys " + file(keyLine(sshtest.NewKey().PublicKey()))}, ""},
		{"list of revoked keys missing", []string{"RevokedHostKeys /no/such/file"}, CauseHostKeyFiles},
		{"localhost", []string{"UserKnownHostsFile none", "NoHostAuthenticationForLocalhost yes"}, ""},
		{"localhost, revoked", []string{"UserKnownHostsFile none", "NoHostAuthenticationForLocalhost yes",
			"RevokedHostKeys " + file(bothKeys)}, CauseHostKeyRevoked},
		{"localhost, revoked in a list", []string{"UserKnownHostsFile none", "NoHostAuthenticationForLocalhost yes",
			"RevokedHostKeys " + revoking(t, bothKeys)}, CauseHostKeyRevoked},
		{"localhost, @revoked", []string{"UserKnownHostsFile " + file("@revoked * "+d.HostKeys()[0]+"\n@revoked * "+d.HostKeys()[1]),
			"NoHostAuthenticationForLocalhost yes"}, CauseHostKeyRevoked},
		{"only the other algorithm", []string{"HostKeyAlgorithms ecdsa-sha2-nistp256"}, CauseHostKeyChanged},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := configured(t, hostBlock(t, "mac", d, tt.options...))
			if tt.name != "localhost, @revoked" { // which ssh lets pass
				sshAgrees(t, cfg, tt.cause == "")
			}
			if tt.cause != "" {
				mustFail(t, cfg, StepHostKey, tt.cause)
				return
			}
			mustRun(t, Options{}, cfg)
		})
	}
}

// revoking has ssh-keygen make one with a key in it.
func revoking(t *testing.T, key string) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "key"), key+"\n")
	(&krlBench{t, dir}).keygen("-q", "-k", "-f", "list", "key")
	return filepath.Join(dir, "list")
}

// KnownHostsCommand prints lines of a known_hosts file.
func TestKnownHostsCommandWithSSHD(t *testing.T) {
	t.Parallel()
	d := sshtest.StartSSHD(t)
	dir := t.TempDir()
	asked := filepath.Join(dir, "asked")
	script := func(name, text string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		return "KnownHostsCommand " + name + " %I \"%H\" %t %n"
	}
	other := keyLine(sshtest.NewKey().PublicKey())
	for _, tt := range []struct {
		name, command string
		cause         Cause
	}{
		{"knows it", script("knows", `echo "$@" >>`+asked+`; echo "$2 `+d.HostKeys()[1]+`"`), ""},
		{"knows another", script("another", `echo "$2 `+other+`"`), CauseHostKeyChanged},
		{"knows nothing", script("nothing", "true"), CauseHostKeyUnknown},
		{"revokes it", script("revokes", `echo "$2 `+d.HostKeys()[0]+`"; echo "@revoked * `+d.HostKeys()[0]+`"`), CauseHostKeyRevoked},
		{"fails", script("fails", "echo no >&2; exit 3"), CauseHostKeyFiles},
		{"is not there", "KnownHostsCommand /no/such/command", CauseHostKeyFiles},
		{"has an unknown token", "KnownHostsCommand /bin/true %Z", CauseHostKeyFiles},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := configured(t, hostBlock(t, "mac", d, "UserKnownHostsFile none", tt.command))
			if tt.name != "is not there" { // which ssh takes for no answer
				sshAgrees(t, cfg, tt.cause == "")
			}
			if err := os.Remove(asked); err != nil && tt.cause == "" {
				t.Error(err)
			}
			if tt.cause != "" {
				mustFail(t, cfg, StepHostKey, tt.cause)
				return
			}
			mustRun(t, Options{}, cfg)
			text, err := os.ReadFile(asked)
			name := fmt.Sprintf("[%s]:%d", d.Host, d.Port)
			want := "ORDER " + name + " NONE mac\nHOSTNAME " + name + " ecdsa-sha2-nistp256 mac\n"
			if err != nil || string(text) != want {
				t.Errorf("it was run with %q (%v), want %q", text, err, want)
			}
		})
	}
}
