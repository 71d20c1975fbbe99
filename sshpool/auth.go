package sshpool

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// identities are the keys to authenticate with, in the order to offer them.
type identities struct {
	signers []ssh.Signer
	offered []string // what each signer is, for messages
	unused  []string // what could not be used, and why
	agent   net.Conn // nil if there is none
}

// loadIdentities reads the host's identities from files and agent. What cannot
// be read is left out and told if it should be missed. The caller must close the
// result after authentication; the agent gets no longer than until deadline.
//
// As in OpenSSH, the agent stands in for a file it holds the key of, which is how
// a key with a passphrase is used, and what else it holds comes after the files
// that were asked for.
func loadIdentities(cfg Config, deadline time.Time) *identities {
	ids := new(identities)
	keys := ids.askAgent(cfg.AgentSocket, deadline)
	files, explicit := cfg.IdentityFiles, true
	if len(files) == 0 {
		files, explicit = defaultIdentityFiles(), false
		ids.addAgentKeys(keys)
	}
	for _, name := range files {
		ids.addFile(name, explicit, keys)
	}
	if explicit {
		ids.addAgentKeys(keys)
	}
	return ids
}

func (ids *identities) close() {
	if ids.agent != nil {
		ids.agent.Close()
	}
}

// An agentKey is a key held by the agent.
type agentKey struct {
	signer ssh.Signer
	name   string
}

func (ids *identities) askAgent(socket string, deadline time.Time) []agentKey {
	if socket == "" {
		socket = os.Getenv("SSH_AUTH_SOCK")
	}
	if socket == "" || socket == "none" {
		return nil
	}
	var err error
	if ids.agent, err = net.DialTimeout("unix", socket, time.Until(deadline)); err != nil {
		ids.unused = append(ids.unused, fmt.Sprintf("agent: %v", err))
		return nil
	}
	ids.agent.SetDeadline(deadline)
	client := agent.NewClient(ids.agent)
	signers, err := client.Signers()
	if err != nil {
		ids.unused = append(ids.unused, fmt.Sprintf("agent %s: %v", socket, err))
		return nil
	}
	keys := make([]agentKey, len(signers))
	for i, s := range signers {
		name := "agent key"
		if k, ok := s.PublicKey().(*agent.Key); ok && k.Comment != "" {
			name = fmt.Sprintf("agent key %q", k.Comment)
		}
		keys[i] = agentKey{s, name}
	}
	return keys
}

func (ids *identities) addAgentKeys(keys []agentKey) {
	for _, k := range keys {
		ids.add(k.signer, k.name)
	}
}

// add adds a signer unless its key is there already.
func (ids *identities) add(s ssh.Signer, name string) {
	blob := s.PublicKey().Marshal()
	for _, other := range ids.signers {
		if bytes.Equal(other.PublicKey().Marshal(), blob) {
			return
		}
	}
	ids.signers = append(ids.signers, s)
	ids.offered = append(ids.offered, fmt.Sprintf("%s (%s)", name, ssh.FingerprintSHA256(s.PublicKey())))
}

func (ids *identities) addFile(name string, explicit bool, keys []agentKey) {
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) && !explicit {
		return
	}
	var signer ssh.Signer
	if err == nil {
		signer, err = ssh.ParsePrivateKey(text)
	}
	if err == nil {
		ids.add(signer, name)
		return
	}
	public := publicKeyOf(name, err)
	for _, k := range keys {
		if public != nil && bytes.Equal(k.signer.PublicKey().Marshal(), public.Marshal()) {
			ids.add(k.signer, name+" from the agent")
			return
		}
	}
	if _, ok := errors.AsType[*ssh.PassphraseMissingError](err); ok {
		err = fmt.Errorf("has a passphrase: load it into an agent (ssh-add %s)", name)
	} else if public != nil && strings.HasPrefix(public.Type(), "sk-") {
		err = fmt.Errorf("is on a hardware token: load it into an agent (ssh-add %s)", name)
	}
	ids.unused = append(ids.unused, fmt.Sprintf("%s: %v", name, err))
}

// publicKeyOf returns the public half of a private key file that could not be
// used, or nil: from the file itself, or from the .pub file beside it.
func publicKeyOf(name string, err error) ssh.PublicKey {
	if missing, ok := errors.AsType[*ssh.PassphraseMissingError](err); ok && missing.PublicKey != nil {
		return missing.PublicKey
	}
	text, err := os.ReadFile(name + ".pub")
	if err != nil {
		return nil
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		return nil
	}
	return key
}

// explain adds to a failure to authenticate what was tried.
func (ids *identities) explain(user string, err error) error {
	var b strings.Builder
	fmt.Fprintf(&b, "as user %q: ", user)
	if len(ids.offered) > 0 {
		fmt.Fprintf(&b, "offered %s; ", strings.Join(ids.offered, ", "))
	} else {
		b.WriteString("no identity to offer; ")
	}
	if len(ids.unused) > 0 {
		fmt.Fprintf(&b, "not usable: %s; ", strings.Join(ids.unused, ", "))
	}
	return fmt.Errorf("%s%w", b.String(), err)
}

func defaultIdentityFiles() []string {
	_, home, err := currentUser()
	if err != nil {
		return nil
	}
	dir := filepath.Join(home, ".ssh")
	return []string{
		filepath.Join(dir, "id_ed25519"),
		filepath.Join(dir, "id_ecdsa"),
		filepath.Join(dir, "id_rsa"),
	}
}

// user returns the name to log in with.
func (cfg Config) user() (string, error) {
	if cfg.User != "" {
		return cfg.User, nil
	}
	name, _, err := currentUser()
	return name, err
}

// currentUser returns the name and home directory of the user this process runs
// as. Like ssh it asks the user database: a daemon often has no $HOME.
func currentUser() (name, home string, err error) {
	u, err := user.Current()
	if err != nil {
		return "", "", fmt.Errorf("find the current user: %w", err)
	}
	return u.Username, u.HomeDir, nil
}
