package sshpool

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// wholeConfig is a file as somebody may have it, with all options that decide how
// a machine is reached, spread over an Include, Match blocks and patterns.
// INCLUDED is the name of the included file.
const wholeConfig = `
Include INCLUDED
Host mac m?c !macbook
  HostName 10.0.0.7
  HostKeyAlias big-mac
  IdentityFile ~/.ssh/builders
  CertificateFile /etc/ssh/builders-cert.pub
  IdentitiesOnly yes
  IdentityAgent /run/agent.sock
  BindAddress 127.0.0.1
Match host 10.0.0.7 user builder exec "test -d /"
  ProxyJump gate@jump.example.org:2022,inner
  UserKnownHostsFile /etc/ssh/known_builders /etc/ssh/known_more
  StrictHostKeyChecking accept-new
Match originalhost mac
  ConnectTimeout 7
  ServerAliveInterval 11
  ServerAliveCountMax 4
  AddressFamily inet
Match all
  Ciphers aes256-ctr,aes128-ctr
  KexAlgorithms curve25519-sha256,ecdh-sha2-nistp256
  MACs hmac-sha2-512,hmac-sha2-256
  HostKeyAlgorithms ssh-ed25519,ecdsa-sha2-nistp256
  PubkeyAcceptedAlgorithms ssh-ed25519,rsa-sha2-512
  CASignatureAlgorithms ssh-ed25519
  GlobalKnownHostsFile /etc/ssh/known_all
  RevokedHostKeys /etc/ssh/revoked
  KnownHostsCommand /usr/bin/known
  HashKnownHosts yes
  NoHostAuthenticationForLocalhost yes
  RequiredRSASize 2048
  SetEnv A=b
Host *
  User nobody
  Port 1
  Ciphers aes192-ctr
  StrictHostKeyChecking no
`

// TestWholeConfigFile compares what comes of one file of all options with what ssh
// says that it means: each of our values, written as ssh -G writes it.
func TestWholeConfigFile(t *testing.T) {
	t.Parallel()
	included := filepath.Join(t.TempDir(), "included")
	if err := os.WriteFile(included, []byte("Host mac\n  User builder\n  Port 2222\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := configured(t, strings.ReplaceAll(wholeConfig, "INCLUDED", included))
	target, err := Resolve(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	me := testUser(t)
	yes := func(b bool) string { return map[bool]string{true: "yes", false: "no"}[b] }
	number := func(d time.Duration) string { return strconv.Itoa(int(d / time.Second)) }
	list := func(l []string) string { return strings.Join(l, ",") }
	names := func(l []string) string { return strings.Join(l, " ") }
	ours := map[string]string{
		"hostname": target.Host, "user": target.User, "port": strconv.Itoa(target.Port),
		"addressfamily": target.AddressFamily, "bindaddress": target.BindAddress,
		"identityfile":    strings.Replace(names(target.IdentityFiles), me.home, "~", 1),
		"certificatefile": names(target.Certificates), "identitiesonly": yes(target.IdentitiesOnly), "identityagent": target.AgentSocket,
		"proxyjump":          target.ProxyJump,
		"userknownhostsfile": names(target.UserKnownHosts), "globalknownhostsfile": names(target.OtherKnownHosts),
		"hostkeyalias": target.HostKeyAlias, "stricthostkeychecking": target.Strict.String(), "hashknownhosts": yes(target.HashKnownHosts),
		"revokedhostkeys": names(target.RevokedHostKeys), "knownhostscommand": target.KnownHostsCommand,
		"nohostauthenticationforlocalhost": yes(target.TrustLocalhost),
		"connecttimeout":                   number(target.ConnectTimeout), "serveraliveinterval": number(target.ServerAliveInterval),
		"serveralivecountmax": strconv.Itoa(target.ServerAliveCountMax),
		"ciphers":             list(target.Ciphers), "kexalgorithms": list(target.KexAlgorithms), "macs": list(target.MACs),
		"hostkeyalgorithms": list(target.HostKeyAlgorithms), "pubkeyacceptedalgorithms": list(target.PublicKeyAccepted),
		"casignaturealgorithms": list(target.CASignatures), "requiredrsasize": fmt.Sprint(target.RequiredRSASize), "setenv": names(target.Env),
	}
	defaults := cfg
	defaults.SSHOptions = []string{"-F", "/dev/null"}
	all, unset := sshSaysAll(t, cfg), sshSaysAll(t, defaults)
	for option, got := range ours {
		says := all[option]
		if want := strings.Join(says, " "); sshBool(got) != sshBool(want) {
			t.Errorf("%s is %q here, and ssh says %q", option, got, want)
		}
		if slices.Equal(says, unset[option]) {
			t.Errorf("%s: the file does not change it", option)
		}
	}
	if len(target.Warnings) > 0 {
		t.Errorf("warnings %q", target.Warnings)
	}
}

// sshBool is a value that ssh -G writes as "yes" or, in other versions, as "true".
func sshBool(s string) string {
	switch s {
	case "true":
		return "yes"
	case "false":
		return "no"
	default:
		return s
	}
}
