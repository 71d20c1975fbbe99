package sshpool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nixdispatch/sshpool/sshtest"
)

// configured writes an ssh_config file and returns a Config that uses it.
func configured(t testing.TB, text string) Config {
	t.Helper()
	sshtest.RequireSSH(t)
	file := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Config{Name: "ssh://mac", Host: "mac", SSHConfig: true, SSHOptions: []string{"-F", file}}
}

// sshSays is what ssh -G prints for one option.
func sshSays(t *testing.T, cfg Config, option string) []string {
	t.Helper()
	return sshSaysAll(t, cfg)[option]
}

// sshSaysAll is what ssh -G prints, by option in lower case.
func sshSaysAll(t *testing.T, cfg Config) map[string][]string {
	t.Helper()
	out, err := exec.Command("ssh", sshArguments(cfg)...).Output()
	if err != nil {
		t.Fatalf("ssh -G: %v", err)
	}
	says := make(map[string][]string)
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		says[strings.ToLower(name)] = append(says[strings.ToLower(name)], value)
	}
	return says
}

// TestEffectiveOptions sets every option that is followed to something that is
// not its default, and compares with what ssh says itself.
func TestEffectiveOptions(t *testing.T) {
	me := testUser(t)
	uid := fmt.Sprint(me.uid)
	t.Setenv("MY_AGENT", "/run/my-agent")
	tests := []struct {
		config string // the lines for the host
		option string
		says   []string // what ssh -G prints
		got    func(*Target) any
		want   any
	}{
		{"HostName %h.example.org", "hostname", []string{"mac.example.org"},
			func(t *Target) any { return t.Host }, "mac.example.org"},
		{"User nix", "user", []string{"nix"}, func(t *Target) any { return t.User }, "nix"},
		{"Port 2222", "port", []string{"2222"}, func(t *Target) any { return t.Port }, 2222},
		{"AddressFamily inet6", "addressfamily", []string{"inet6"},
			func(t *Target) any { return t.AddressFamily }, "inet6"},
		{"BindAddress 127.0.0.1", "bindaddress", []string{"127.0.0.1"},
			func(t *Target) any { return t.BindAddress }, "127.0.0.1"},
		{"IdentityFile ~/%h_%n\nIdentityFile \"/k/%i %u\"", "identityfile", []string{"~/%h_%n", "/k/%i %u"},
			func(t *Target) any { return t.IdentityFiles }, []string{me.home + "/mac_mac", "/k/" + uid + " " + me.name}},
		{"IdentityFile none", "identityfile", []string{"none"},
			func(t *Target) any { return len(t.IdentityFiles) }, 0},
		{"CertificateFile %d/%r-%p%%-cert.pub\nUser nix", "certificatefile", []string{"%d/%r-%p%%-cert.pub"},
			func(t *Target) any { return t.Certificates }, []string{me.home + "/nix-22%-cert.pub"}},
		{"IdentitiesOnly yes", "identitiesonly", []string{"yes"},
			func(t *Target) any { return t.IdentitiesOnly }, true},
		{"IdentityAgent /run/agent", "identityagent", []string{"/run/agent"},
			func(t *Target) any { return t.AgentSocket }, "/run/agent"},
		{"IdentityAgent $MY_AGENT", "identityagent", []string{"$MY_AGENT"},
			func(t *Target) any { return t.AgentSocket }, "/run/my-agent"},
		{"IdentityAgent none", "identityagent", []string{"none"}, func(t *Target) any { return t.AgentSocket }, ""},
		{"ProxyJump nix@jump:23,[::1]:24", "proxyjump", []string{"nix@jump:23,[::1]:24"},
			func(t *Target) any { return t.ProxyJump }, "nix@jump:23,[::1]:24"},
		{"ProxyCommand nc -x 'a b' %h:%p %r %n %%\nUser nix", "proxycommand", []string{"nc -x 'a b' %h:%p %r %n %%"},
			func(t *Target) any { return t.ProxyCommand }, "nc -x 'a b' mac:22 nix mac %"},
		{"ProxyCommand nc %h\nProxyUseFdpass yes", "proxyusefdpass", []string{"yes"},
			func(t *Target) any { return t.ProxyUseFdpass }, true},
		{"UserKnownHostsFile ~/.ssh/one \"/with blank/two\"", "userknownhostsfile", []string{me.home + "/.ssh/one /with blank/two"},
			func(t *Target) any { return t.UserKnownHosts }, []string{me.home + "/.ssh/one", "/with blank/two"}},
		{"UserKnownHostsFile none", "userknownhostsfile", []string{"none"},
			func(t *Target) any { return len(t.UserKnownHosts) }, 0},
		{"GlobalKnownHostsFile /etc/one /etc/two", "globalknownhostsfile", []string{"/etc/one /etc/two"},
			func(t *Target) any { return t.OtherKnownHosts }, []string{"/etc/one", "/etc/two"}},
		{"HostKeyAlias Big", "hostkeyalias", nil, func(t *Target) any { return t.HostKeyAlias }, "big"},
		{"StrictHostKeyChecking yes", "stricthostkeychecking", nil, func(t *Target) any { return t.Strict }, StrictYes},
		{"StrictHostKeyChecking no", "stricthostkeychecking", nil, func(t *Target) any { return t.Strict }, StrictOff},
		{"StrictHostKeyChecking off", "stricthostkeychecking", nil, func(t *Target) any { return t.Strict }, StrictOff},
		{"StrictHostKeyChecking ask", "stricthostkeychecking", []string{"ask"}, func(t *Target) any { return t.Strict }, StrictAsk},
		{"StrictHostKeyChecking accept-new", "stricthostkeychecking", []string{"accept-new"},
			func(t *Target) any { return t.Strict }, StrictNew},
		{"HashKnownHosts yes", "hashknownhosts", []string{"yes"}, func(t *Target) any { return t.HashKnownHosts }, true},
		{"NoHostAuthenticationForLocalhost yes", "nohostauthenticationforlocalhost", []string{"yes"},
			func(t *Target) any { return t.TrustLocalhost }, true},
		{"RevokedHostKeys /etc/revoked", "revokedhostkeys", []string{"/etc/revoked"},
			func(t *Target) any { return t.RevokedHostKeys }, []string{"/etc/revoked"}},
		{"KnownHostsCommand /bin/echo %H %t", "knownhostscommand", []string{"/bin/echo %H %t"},
			func(t *Target) any { return t.KnownHostsCommand }, "/bin/echo %H %t"},
		{"ConnectTimeout 2m", "connecttimeout", []string{"120"},
			func(t *Target) any { return t.ConnectTimeout }, 2 * time.Minute},
		{"ServerAliveInterval 7\nServerAliveCountMax 5", "serveraliveinterval", []string{"7"},
			func(t *Target) any { return []any{t.ServerAliveInterval, t.ServerAliveCountMax} }, []any{7 * time.Second, 5}},
		{"Ciphers aes256-ctr,chacha20-poly1305@openssh.com", "ciphers", []string{"aes256-ctr,chacha20-poly1305@openssh.com"},
			func(t *Target) any { return t.Ciphers }, []string{"aes256-ctr", "chacha20-poly1305@openssh.com"}},
		{"KexAlgorithms sntrup761x25519-sha512@openssh.com,curve25519-sha256", "kexalgorithms",
			[]string{"sntrup761x25519-sha512@openssh.com,curve25519-sha256"},
			func(t *Target) any { return t.KexAlgorithms }, []string{"curve25519-sha256"}},
		{"MACs umac-64@openssh.com,hmac-sha2-512", "macs", []string{"umac-64@openssh.com,hmac-sha2-512"},
			func(t *Target) any { return t.MACs }, []string{"hmac-sha2-512"}},
		{"HostKeyAlgorithms ssh-ed25519,rsa-sha2-512", "hostkeyalgorithms", []string{"ssh-ed25519,rsa-sha2-512"},
			func(t *Target) any { return t.HostKeyAlgorithms }, []string{"ssh-ed25519", "rsa-sha2-512"}},
		{"PubkeyAcceptedAlgorithms ssh-ed25519", "pubkeyacceptedalgorithms", []string{"ssh-ed25519"},
			func(t *Target) any { return t.PublicKeyAccepted }, []string{"ssh-ed25519"}},
		{"CASignatureAlgorithms ssh-ed25519", "casignaturealgorithms", []string{"ssh-ed25519"},
			func(t *Target) any { return t.CASignatures }, []string{"ssh-ed25519"}},
		{"RequiredRSASize 3000", "requiredrsasize", []string{"3000"}, func(t *Target) any { return t.RequiredRSASize }, 3000},
		{"RekeyLimit 1G", "rekeylimit", []string{"1073741824 0"}, func(t *Target) any { return t.RekeyBytes }, uint64(1 << 30)},
		{"SetEnv A=b C=\"d e\"", "setenv", []string{"A=b", "C=d e"}, func(t *Target) any { return t.Env }, []string{"A=b", "C=d e"}},
		{"SendEnv MY_AG* MY_AGEN?\nSendEnv -MY_AGEN?\nSetEnv A=b", "sendenv", []string{"MY_AG*"}, func(t *Target) any { return t.Env }, []string{"MY_AGENT=/run/my-agent", "A=b"}},
		{"GSSAPIAuthentication yes", "gssapiauthentication", []string{"yes"}, func(t *Target) any { return t.Untried }, []string{"GSSAPIAuthentication"}},
		{"PubkeyAuthentication no", "pubkeyauthentication", nil,
			func(t *Target) any { return strings.Fields(t.NoPublicKeys)[0] }, "PubkeyAuthentication"},
		{"PreferredAuthentications password", "preferredauthentications", []string{"password"},
			func(t *Target) any { return t.NoPublicKeys }, "PreferredAuthentications password"},
		{"Include included", "user", []string{"from-include"}, func(t *Target) any { return t.User }, "from-include"},
	}
	plain, err := Resolve(t.Context(), configured(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	r := newResolver() // asks for ssh's defaults once
	for _, tt := range tests {
		t.Run(tt.config, func(t *testing.T) {
			included := filepath.Join(t.TempDir(), "included")
			if err := os.WriteFile(included, []byte("User from-include\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			cfg := configured(t, "Host mac\n"+strings.ReplaceAll(tt.config, "Include included", "Include "+included)+"\n")
			if says := sshSays(t, cfg, tt.option); tt.says != nil && !slices.Equal(says, tt.says) {
				t.Errorf("ssh -G says %q, want %q", says, tt.says)
			}
			target, err := r.resolve(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, tt.got(target)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if len(target.Warnings) > 0 {
				t.Errorf("warnings %q", target.Warnings)
			}
			if tt.option != "stricthostkeychecking" && cmp.Diff(tt.want, safely(tt.got, plain)) == "" &&
				tt.config != "IdentityAgent none" {
				t.Errorf("without the option it is %v as well", tt.want)
			}
		})
	}
}

// safely is got, for targets it was not made for.
func safely(got func(*Target) any, t *Target) (v any) {
	defer func() { _ = recover() }()
	return got(t)
}

// What is on ssh's command line wins over the file: NIX_SSHOPTS over the key and
// port of the machine, as in Nix.
func TestArgumentsWinOverTheFile(t *testing.T) {
	t.Parallel()
	cfg := configured(t, "Host mac\nPort 1\nUser file\nIdentityFile /from/file\n")
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.Port, cfg.User, cfg.IdentityFiles = 3, "given", []string{key}
	target, err := Resolve(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if target.Port != 3 || target.User != "given" {
		t.Errorf("target is %s", target)
	}
	if diff := cmp.Diff([]string{key, "/from/file"}, target.IdentityFiles); diff != "" || target.DefaultFiles {
		t.Errorf("identity files, default %v (-want +got):\n%s", target.DefaultFiles, diff)
	}
	cfg.SSHOptions = append(cfg.SSHOptions, "-p4", "-i", "/dev/null", "-oUserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no")
	if target, err = Resolve(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if target.Port != 4 || target.Strict != StrictOff || target.IdentityFiles[0] != "/dev/null" || target.UserKnownHosts[0] != "/dev/null" {
		t.Errorf("with more options: %+v", target)
	}
}

// ssh says nothing of a key it was given and cannot find.
func TestGivenKeyThatIsMissing(t *testing.T) {
	cfg := configured(t, "")
	cfg.IdentityFiles = []string{filepath.Join(t.TempDir(), "missing")}
	target, err := Resolve(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	target.AgentSocket = ""
	if _, unused := offersOf(target); !strings.Contains(unused, cfg.IdentityFiles[0]+": no such file") {
		t.Errorf("cannot use %q", unused)
	}
	if len(target.Warnings) != 1 || !strings.Contains(target.Warnings[0], cfg.IdentityFiles[0]) {
		t.Errorf("warnings %q, want one that names the key", target.Warnings)
	}
}

// Without any configuration the target is ssh's default, and nothing to warn of.
func TestNothingConfigured(t *testing.T) {
	t.Parallel()
	cfg := configured(t, "")
	got, err := Resolve(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	cfg.SSHConfig = false
	want, err := Resolve(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if !got.DefaultFiles || !slices.Contains(got.IdentityFiles, want.IdentityFiles[0]) ||
		!slices.Contains(got.UserKnownHosts, want.UserKnownHosts[0]) ||
		!slices.Contains(got.OtherKnownHosts, want.OtherKnownHosts[0]) {
		t.Errorf("files are %+v", got)
	}
	ignored := cmpopts.IgnoreFields(Target{}, "IdentityFiles", "UserKnownHosts", "OtherKnownHosts", "CASignatures",
		"SSHConfigFile", "RequiredRSASize")
	if diff := cmp.Diff(want, got, ignored, cmpopts.IgnoreUnexported(Target{})); diff != "" {
		t.Errorf("(-without ssh_config +with an empty one):\n%s", diff)
	}
}

func TestWarningsNameTheOption(t *testing.T) {
	t.Parallel()
	tests := []struct{ config, want string }{
		{"Compression yes", "ssh option compression yes is not followed: data is sent uncompressed"},
		{"ForwardAgent yes", "ssh option forwardagent yes is not followed: no agent is forwarded"},
		{"ControlMaster auto\nControlPath /run/%C", "ssh option controlpath /run/"},
		{"VerifyHostKeyDNS yes", "host keys are not looked up in DNS"},
		{"HostbasedAuthentication yes", "only public keys are offered"},
		{"LocalForward 1234 localhost:80", "ssh option localforward"},
		{"BindInterface lo", "ssh option bindinterface lo"},
		{"RekeyLimit 1G 1h", "but not after a time"},
		{"SendEnv LANG\nGSSAPIAuthentication yes\nControlMaster auto\nForwardX11 yes\nLogLevel DEBUG\nHashKnownHosts yes", ""},
	}
	for _, tt := range tests {
		target, err := Resolve(t.Context(), configured(t, "Host mac\n"+tt.config+"\n"))
		if err != nil {
			t.Errorf("%s: %v", tt.config, err)
			continue
		}
		switch {
		case tt.want == "" && len(target.Warnings) > 0:
			t.Errorf("%s: warnings %q", tt.config, target.Warnings)
		case tt.want != "" && (len(target.Warnings) != 1 || !strings.Contains(target.Warnings[0], tt.want)):
			t.Errorf("%s: warnings %q, want one with %q", tt.config, target.Warnings, tt.want)
		}
	}
}

func TestConfigurationThatCannotBeFollowed(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, config, want string }{
		{"bad option", "Host mac\nNoSuchOption yes\n", "Bad configuration option: nosuchoption"},
		{"no common cipher", "Ciphers aes192-cbc\n", "Ciphers aes192-cbc: none of these is known here"},
		{"unknown token", "ProxyCommand nc %Z\n", `unknown token %Z in "nc %Z"`},
		{"no such variable", "IdentityFile ${NO_SUCH_VARIABLE}/key\n", `has no "NO_SUCH_VARIABLE"`},
		{"jump to itself", "Host mac\nProxyJump mac\n", "jumphost loop"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Resolve(t.Context(), configured(t, tt.config))
			e := mustBe[*ConnectError](t, "Resolve", err)
			if e.Step != StepConfig || e.Cause != CauseConfig || !strings.Contains(e.Error(), tt.want) || !strings.Contains(e.Fix, "ssh -G mac -F ") {
				t.Errorf("error %q (%q), want %q in it", e, e.Step, tt.want)
			}
		})
	}
	if _, err := Resolve(t.Context(), Config{Host: "-oProxyCommand=x", SSHConfig: true}); err == nil {
		t.Error("a host that is an option of ssh is taken")
	}
}

// A Match exec is run each time the host is reached anew, may not take for ever,
// and nothing of it is left.
func TestMatchExec(t *testing.T) {
	t.Parallel()
	flag := filepath.Join(t.TempDir(), "flag")
	cfg := configured(t, "Match host mac exec \"test -e "+flag+"\"\nPort 1\nMatch all\nPort 2\n")
	r := newResolver()
	for _, port := range []int{2, 1} {
		target, err := r.resolve(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		if target.Port != port {
			t.Errorf("port is %d, want %d", target.Port, port)
		}
		if err := os.WriteFile(flag, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	started := filepath.Join(t.TempDir(), "started")
	cfg = configured(t, "Match exec \"echo $$ >"+started+"; sleep 600\"\nPort 1\n")
	resolved := make(chan error, 1)
	go func() {
		_, err := Resolve(ctx, cfg)
		resolved <- err
	}()
	var pid []byte
	for !bytes.HasSuffix(pid, []byte("\n")) {
		select {
		case err := <-resolved:
			t.Fatalf("a Match exec without end has ended: %v", err)
		case <-time.After(time.Millisecond):
			pid, _ = os.ReadFile(started) // it may not be there yet
		}
	}
	cancel()
	if err := <-resolved; err == nil {
		t.Error("a Match exec without end has ended well")
	}
	awaitGone(t, string(pid))
}

// Where there is no ssh, hosts are reached as without its configuration.
func TestNoSSHProgram(t *testing.T) {
	cfg := configured(t, "Host mac\nHostName elsewhere\n")
	t.Setenv("PATH", t.TempDir())
	target, err := Resolve(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if target.Host != "mac" || !errors.Is(target.noProgram, exec.ErrNotFound) {
		t.Errorf("target is %s, %v", target, target.noProgram)
	}
}

func TestConfigFileOfOptions(t *testing.T) {
	for text, want := range map[string]string{
		"":                   "",
		"-F file":            "file",
		"-Ffile":             "file",
		"-4xF file -v":       "file",
		"-o -F -p 22":        "",
		"-oA=b -i -F -F two": "two",
		"-F":                 "",
		"-- -F file":         "",
	} {
		if got := configFileOf(strings.Fields(text)); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func TestJumpArguments(t *testing.T) {
	for jump, want := range map[string]string{
		"jump":              "ssh -W [10.0.0.7]:2222 -- jump",
		"nix@jump:23":       "ssh -l nix -p 23 -W [10.0.0.7]:2222 -- jump",
		"a@b:1,c,d@[::1]:9": "ssh -l d -p 9 -J a@b:1,c -W [10.0.0.7]:2222 -- ::1",
		"[::1]":             "ssh -W [10.0.0.7]:2222 -- ::1",
		"x@y@jump":          "ssh -l x@y -W [10.0.0.7]:2222 -- jump",
	} {
		target := &Target{Host: "10.0.0.7", Port: 2222, ProxyJump: jump, sshProgram: "ssh"}
		args, err := target.proxyArguments()
		if got := strings.Join(args, " "); err != nil || got != want {
			t.Errorf("%s: got %q, %v, want %q", jump, got, err, want)
		}
	}
	for _, jump := range []string{"-oProxyCommand=x", "a@-b", "-a@b", "user@"} {
		if args, err := (&Target{ProxyJump: jump}).proxyArguments(); err == nil {
			t.Errorf("%s: taken as %q", jump, args)
		}
	}
}

func FuzzParseSSHOptions(f *testing.F) {
	f.Add([]byte("user nix\nhostname mac\nport 22\nidentityfile ~/.ssh/a b\nidentityfile none\n"))
	f.Add([]byte("user x\nhostname -y\nport 99999\nproxyjump a,b\nuserknownhostsfile /a b /c none\nrekeylimit 1 1"))
	f.Add([]byte("user x\nhostname y\nport 1\nproxycommand %h%%%p ${X}\nsetenv =\nsetenv A=\nidentityagent $\n"))
	me := &localUser{name: "me", home: "/home/me", uid: 1, getenv: func(string) string { return "" }, environ: os.Environ}
	f.Fuzz(func(t *testing.T, text []byte) {
		opts, err := parseSSHOptions(text)
		if err != nil {
			return
		}
		target, err := targetOf(opts, sshOptions{}, Config{Host: "mac"}, me)
		if err != nil {
			return
		}
		if target.Host == "" || target.User == "" || target.Port < 1 || target.Port > 65535 {
			t.Errorf("%q: target %+v", text, target)
		}
		for _, name := range slices.Concat(target.IdentityFiles, target.UserKnownHosts, target.Certificates) {
			if strings.ContainsAny(name, "\n") {
				t.Errorf("%q: file name %q", text, name)
			}
		}
		if args, err := target.proxyArguments(); err == nil && target.ProxyCommand == "" && args != nil {
			if n := len(args); args[n-2] != "--" || strings.HasPrefix(args[n-1], "-") {
				t.Errorf("%q: proxy %q", text, args)
			}
		}
	})
}

func FuzzExpandTokens(f *testing.F) {
	f.Add("%h:%p %%h ${HOME} $x")
	f.Add("%")
	f.Add("${")
	tok := tokens{'h': "host%p", 'p': "22"}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := tok.expand(s, func(string) string { return "v%h" })
		if err == nil && !strings.ContainsAny(s, "%$") && got != s {
			t.Errorf("%q became %q", s, got)
		}
		escaped := strings.ReplaceAll(s, "%", "%%")
		if got, err := tok.expand(escaped, nil); err != nil || got != s {
			t.Errorf("%q became %q, %v", escaped, got, err)
		}
	})
}
