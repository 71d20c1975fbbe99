package sshpool

import (
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// followed are the options that this package goes by.
var followed = strings.Fields(`
	addressfamily bindaddress casignaturealgorithms certificatefile ciphers connecttimeout globalknownhostsfile
	hashknownhosts host hostkeyalgorithms hostkeyalias hostname identitiesonly identityagent identityfile
	kexalgorithms knownhostscommand macs nohostauthenticationforlocalhost port preferredauthentications proxycommand proxyjump
	proxyusefdpass pubkeyacceptedalgorithms pubkeyauthentication requiredrsasize revokedhostkeys
	sendenv serveralivecountmax serveraliveinterval setenv stricthostkeychecking user userknownhostsfile
`)

// immaterial are the options that change nothing for a command without a
// terminal, asked for by a program, on a connection that stays: or that ssh has
// followed itself by the time it prints them. GSSAPIAuthentication, which
// distributions set for everybody, is told of where no key gets in (Target.Untried).
var immaterial = strings.Fields(`
	addkeystoagent batchmode canonicaldomains canonicalizefallbacklocal canonicalizehostname canonicalizemaxdots
	canonicalizepermittedcnames clearallforwardings connectionattempts controlmaster controlpersist
	enableescapecommandline enablesshkeysign escapechar exitonforwardfailure fingerprinthash forwardx11
	forwardx11timeout forwardx11trusted gatewayports gssapiauthentication gssapidelegatecredentials
	gssapikexalgorithms gssapikeyexchange gssapirenewalforcesrekey gssapitrustdns gssapiclientidentity
	gssapiserveridentity hostbasedacceptedalgorithms ignoreunknown ipqos kbdinteractiveauthentication
	kbdinteractivedevices localcommand loglevel logverbose numberofpasswordprompts obscurekeystroketiming
	passwordauthentication permitlocalcommand permitremoteopen requesttty securitykeyprovider
	streamlocalbindmask streamlocalbindunlink syslogfacility tag tcpkeepalive tunneldevice updatehostkeys
	versionaddendum visualhostkey warnweakcrypto xauthlocation
`)

// meanings say what it means that an option is not followed, where that needs
// saying.
var meanings = map[string]string{
	"bindinterface":           "connections leave by the interface the system chooses; BindAddress is followed",
	"checkhostip":             "the key is looked up by name only",
	"compression":             "data is sent uncompressed",
	"controlpath":             "a connection of another ssh (ControlMaster) is not shared; those made here are kept open anyway",
	"dynamicforward":          "nothing is forwarded",
	"forwardagent":            "no agent is forwarded",
	"hostbasedauthentication": "only public keys are offered",
	"localforward":            "nothing is forwarded",
	"pkcs11provider":          "load the token's keys into an agent: ssh-add -s PROVIDER",
	"rekeylimit":              "keys are renewed after that much data, but not after a time",
	"remotecommand":           "the command asked for is run",
	"remoteforward":           "nothing is forwarded",
	"verifyhostkeydns":        "host keys are not looked up in DNS",
}

// unfollowed describes the options that somebody set to something else than ssh's
// default, and that matter, and are not followed.
func unfollowed(o, defaults sshOptions) []string {
	if defaults == nil {
		return nil
	}
	var out []string
	for name, values := range o {
		switch {
		case !o.isSet(name, defaults), slices.Contains(followed, name), slices.Contains(immaterial, name):
			continue
		case name == "rekeylimit" && strings.HasSuffix(o.one(name), " 0"):
			continue
		case name == "controlpath" && isNone(o.one(name)):
			continue
		}
		meaning := meanings[name]
		if meaning == "" {
			meaning = "it has no effect here"
		}
		out = append(out, fmt.Sprintf("ssh option %s %s is not followed: %s", name, strings.Join(values, ", "), meaning))
	}
	sort.Strings(out)
	return out
}

// checkAlgorithms leaves of the lists of algorithms what the library has.
func (t *Target) checkAlgorithms() error {
	have, weak := ssh.SupportedAlgorithms(), ssh.InsecureAlgorithms()
	for _, l := range []struct {
		option string
		list   *[]string
		known  []string
	}{
		{"Ciphers", &t.Ciphers, append(have.Ciphers, weak.Ciphers...)},
		{"KexAlgorithms", &t.KexAlgorithms, append(have.KeyExchanges, weak.KeyExchanges...)},
		{"MACs", &t.MACs, append(have.MACs, weak.MACs...)},
		{"HostKeyAlgorithms", &t.HostKeyAlgorithms, append(have.HostKeys, weak.HostKeys...)},
	} {
		if *l.list == nil {
			continue
		}
		wanted := *l.list
		*l.list = slices.DeleteFunc(slices.Clone(wanted), func(a string) bool { return !slices.Contains(l.known, a) })
		if len(*l.list) == 0 {
			return fmt.Errorf("%s %s: none of these is known here; there are %s",
				l.option, strings.Join(wanted, ","), strings.Join(l.known, ","))
		}
	}
	return nil
}

func seconds(n int) time.Duration { return time.Duration(n) * time.Second }
