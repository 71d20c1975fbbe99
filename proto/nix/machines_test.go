package nix

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// The public key is real; nobody has the private one.
const testHostKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f root@mac"

var testHostKey64 = base64.StdEncoding.EncodeToString([]byte(testHostKey))

// memFiles is a file system for includes.
type memFiles map[string]string

func (f memFiles) read(name string) ([]byte, error) {
	text, ok := f[name]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	if text == "EACCES" {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
	}
	return []byte(text), nil
}

func parseMachines(text string, files memFiles) (machines []Machine, errs, warnings []string) {
	machines, failures := ParseMachines(text, MachinesOptions{
		DefaultSystems: []string{"x86_64-linux", "i686-linux", "i686-linux"},
		File:           "machines",
		ReadFile:       files.read,
		Warn:           func(e *MachineError) { warnings = append(warnings, e.Error()) },
	})
	for _, e := range failures {
		errs = append(errs, e.Error())
	}
	return machines, errs, warnings
}

func TestParseMachinesReadsAllColumns(t *testing.T) {
	line := "ssh-ng://nix@mac.example:2222?compress=true aarch64-darwin,x86_64-darwin,,aarch64-darwin /root/.ssh/id +8 2.5 kvm,big-parallel,kvm nixos-test,benchmark " + testHostKey64 + " ninth column"
	got, errs, warnings := parseMachines("\n"+line+"\nhost\n", nil)
	if errs != nil {
		t.Fatal(errs)
	}
	want := []Machine{
		{
			StoreURI: "ssh-ng://nix@mac.example:2222?compress=true", SystemTypes: []string{"aarch64-darwin", "x86_64-darwin"},
			SSHKey: "/root/.ssh/id", MaxJobs: 8, SpeedFactor: 2.5,
			SupportedFeatures: []string{"big-parallel", "kvm"}, MandatoryFeatures: []string{"benchmark", "nixos-test"},
			SSHPublicHostKey: testHostKey64, Source: Position{"machines", 2},
			Ref: StoreReference{Scheme: "ssh-ng", User: "nix", Host: "mac.example", Port: 2222, Params: map[string]string{"compress": "true"}},
		},
		{
			StoreURI: "ssh://host", SystemTypes: []string{"i686-linux", "x86_64-linux"}, MaxJobs: 1, SpeedFactor: 1,
			Source: Position{"machines", 3}, Ref: StoreReference{Scheme: "ssh", Host: "host"},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("machines (-want +got):\n%s", diff)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], `"ninth column", expected 8 columns`) {
		t.Errorf("warnings %q, want one about the ninth column", warnings)
	}
}

func TestParseMachinesGrammar(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       []string // "file:line uri"
	}{
		{"nothing", "", nil},
		{"blank lines, comments and separators", "\n  \t\r\n # x\n ; ;; \n  # a ; b\n", nil},
		{"semicolons and newlines", "a;b ; c\nd;", []string{"machines:1 ssh://a", "machines:1 ssh://b", "machines:1 ssh://c", "machines:2 ssh://d"}},
		{"comment ends the line, semicolon or not", "a # b ; c\nd#e", []string{"machines:1 ssh://a", "machines:2 ssh://d"}},
		{"carriage returns and tabs", "a\tx86_64-linux\r\n\tb\r\n", []string{"machines:1 ssh://a", "machines:2 ssh://b"}},
		{"hash in a URI ends it", "ssh://a?x=1#y=2", []string{"machines:1 ssh://a?x=1"}},
		{"semicolon in a URI is encoded", "ssh://a?x=%3B%23%20", []string{"machines:1 ssh://a?x=%3B%23%20"}},
		{"the same machine twice", "a\na", []string{"machines:1 ssh://a", "machines:2 ssh://a"}},
		{"all kinds of stores", "auto\ndaemon\nlocal\n/chroot?x=y\nunix:///s\nu@::1", []string{
			"machines:1 auto", "machines:2 daemon", "machines:3 local", "machines:4 local:///chroot?x=y", "machines:5 unix:///s", "machines:6 ssh://u@[::1]",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			machines, errs, _ := parseMachines(tt.text, nil)
			if errs != nil {
				t.Errorf("errors: %q", errs)
			}
			var got []string
			for _, m := range machines {
				got = append(got, m.Source.String()+" "+m.StoreURI)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("machines (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseMachinesColumnValues(t *testing.T) {
	set := func(change func(*Machine)) Machine {
		m := Machine{SystemTypes: []string{"i686-linux", "x86_64-linux"}, MaxJobs: 1, SpeedFactor: 1}
		change(&m)
		return m
	}
	for columns, want := range map[string]Machine{
		"":                  set(func(*Machine) {}),
		"- - - - - - -":     set(func(*Machine) {}),
		"- - - - - - - -":   set(func(*Machine) {}),
		"builtin,a-b":       set(func(m *Machine) { m.SystemTypes = []string{"a-b", "builtin"} }),
		", ":                set(func(m *Machine) { m.SystemTypes = nil }),
		"- - +4":            set(func(m *Machine) { m.MaxJobs = 4 }),
		"- - 007":           set(func(m *Machine) { m.MaxJobs = 7 }),
		"- - 0":             set(func(m *Machine) { m.MaxJobs = 0 }),
		"- - 4294967295":    set(func(m *Machine) { m.MaxJobs = 4294967295 }),
		"- - - 0":           set(func(*Machine) {}),
		"- - - -0.0":        set(func(*Machine) {}),
		"- - - 1e-60":       set(func(*Machine) {}), // 0 in 32 bits
		"- - - .5":          set(func(m *Machine) { m.SpeedFactor = 0.5 }),
		"- - - +2.":         set(func(m *Machine) { m.SpeedFactor = 2 }),
		"- - - 3.1e1":       set(func(m *Machine) { m.SpeedFactor = 31 }),
		"- k - - b,a,b":     set(func(m *Machine) { m.SSHKey = "k"; m.SupportedFeatures = []string{"a", "b"} }),
		"- - - - - b,a":     set(func(m *Machine) { m.MandatoryFeatures = []string{"a", "b"} }),
		"- - - - - - YQ==":  set(func(m *Machine) { m.SSHPublicHostKey = "YQ==" }),
		"- - - - - - YQ=:!": set(func(m *Machine) { m.SSHPublicHostKey = "YQ=:!" }), // '=' ends base-64 for Nix
	} {
		got, errs, _ := parseMachines("h "+columns, nil)
		if len(got) != 1 || errs != nil {
			t.Errorf("%q: machines %v, errors %q", columns, got, errs)
			continue
		}
		if diff := cmp.Diff(want, got[0], cmpopts.EquateEmpty(), cmpopts.IgnoreFields(Machine{}, "StoreURI", "Ref", "Source")); diff != "" {
			t.Errorf("%q (-want +got):\n%s", columns, diff)
		}
	}
}

func TestParseMachinesReportsEveryBadColumnAndKeepsTheGoodEntries(t *testing.T) {
	text := strings.Join([]string{
		"good1", "-", "u@host?ssh-key=/k", "ssh://-x", "h - - eight fast", "h - - -1 -0.5", "h - - 4294967296 nan",
		"h - - 1.0 inf", "h - - + 1e39", "h - - 0x4 0x1p2", "h - - 1_0 1e", "h - - - - - - a!b", "good2; h - - x; good3",
	}, "\n")
	machines, errs, _ := parseMachines(text, nil)
	var uris []string
	for _, m := range machines {
		uris = append(uris, m.StoreURI)
	}
	if diff := cmp.Diff([]string{"ssh://good1", "ssh://good2", "ssh://good3"}, uris); diff != "" {
		t.Errorf("machines (-want +got):\n%s", diff)
	}
	const (
		uri   = `expected a store URI such as "ssh://user@host" or a host name`
		jobs  = "expected a whole number from 0 to 4294967295"
		speed = "expected a finite number of 0 or more such as 1.5"
	)
	want := []string{
		`machines:2: column #0 (store URI): found "-", ` + uri,
		`machines:3: column #0 (store URI): found "u@host?ssh-key=/k", ` + uri + `: parse store URI "u@host?ssh-key=/k": it has no scheme such as "ssh://"`,
		`machines:4: column #0 (store URI): found "ssh://-x", ` + uri + `: parse store URI "ssh://-x": host name "-x" begins with '-'`,
		`machines:5: column #3 (max jobs): found "eight", ` + jobs,
		`machines:5: column #4 (speed factor): found "fast", ` + speed,
		`machines:6: column #3 (max jobs): found "-1", ` + jobs,
		`machines:6: column #4 (speed factor): found "-0.5", ` + speed,
		`machines:7: column #3 (max jobs): found "4294967296", ` + jobs,
		`machines:7: column #4 (speed factor): found "nan", ` + speed,
		`machines:8: column #3 (max jobs): found "1.0", ` + jobs,
		`machines:8: column #4 (speed factor): found "inf", ` + speed,
		`machines:9: column #3 (max jobs): found "+", ` + jobs,
		`machines:9: column #4 (speed factor): found "1e39", ` + speed,
		`machines:10: column #3 (max jobs): found "0x4", ` + jobs,
		`machines:10: column #4 (speed factor): found "0x1p2", ` + speed,
		`machines:11: column #3 (max jobs): found "1_0", ` + jobs,
		`machines:11: column #4 (speed factor): found "1e", ` + speed,
		`machines:12: column #7 (public host key): found "a!b", expected the base-64 of a line like "ssh-ed25519 AAAA... comment": illegal base-64 character '!'`,
		`machines:13: column #3 (max jobs): found "x", ` + jobs,
	}
	if diff := cmp.Diff(want, errs); diff != "" {
		t.Errorf("errors (-want +got):\n%s", diff)
	}
}

func TestParseMachinesWarnsOfWhatNixAccepts(t *testing.T) {
	for text, want := range map[string]string{
		"h - - 0":                               `column #3 (max jobs): found "0"`,
		"shh://host":                            `column #0 (store URI): found "shh://host"`,
		"h?compress":                            `parameter "compress" has no '='`,
		"h - - - - - - YQ==":                    `does not decode to one line`,
		"h - - - - - - " + b64("ssh-ed25519 !"): `second word of the decoded key`,
		"h - - - - - - " + b64("ssh-rsa "+strings.Fields(testHostKey)[1]): `not of the type "ssh-rsa"`,
		"h - - - - - - " + b64(testHostKey+"\n"+testHostKey):              `does not decode to one line`,
	} {
		machines, errs, warnings := parseMachines(text, nil)
		if len(machines) != 1 || errs != nil || len(warnings) != 1 || !strings.Contains(warnings[0], want) {
			t.Errorf("%q: %d machines, errors %q, warnings %q; want one that says %q", text, len(machines), errs, warnings, want)
		}
	}
	if _, _, warnings := parseMachines("h - - - - - - "+b64(testHostKey+"\n"), nil); warnings != nil {
		t.Errorf("warnings for a good host key: %q", warnings)
	}
}

func b64(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

func TestParseMachinesIncludes(t *testing.T) {
	files := memFiles{
		"/a":              "a1\n @ /dir/with blank # comment\n a2",
		"/dir/with blank": "b1 ; @/c;b2",
		"/c":              "c1 - - x\nc2",
		"/empty":          "",
	}
	machines, errs, _ := parseMachines("first; @/a ;last\n@/missing\n@\n@/empty\n@/c", files)
	var got []string
	for _, m := range machines {
		got = append(got, m.Source.String()+" "+m.StoreURI)
	}
	want := []string{
		"machines:1 ssh://first", "/a:1 ssh://a1", "/dir/with blank:1 ssh://b1", "/c:2 ssh://c2", "/dir/with blank:1 ssh://b2",
		"/a:3 ssh://a2", "machines:1 ssh://last", "/c:2 ssh://c2",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("machines (-want +got):\n%s", diff)
	}
	if len(errs) != 2 || !strings.HasPrefix(errs[0], "/c:1: column #3 (max jobs)") || errs[0] != errs[1] {
		t.Errorf("errors %q, want the bad entry of /c twice", errs)
	}
}

func TestParseMachinesBadIncludesLoseNothingElse(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files memFiles
		want  string
	}{
		{"itself", memFiles{"/a": "in\n@/a"}, `/a:2: found "@/a", expected a file that is not being read already: include cycle: /a -> /a`},
		{"cycle of three", memFiles{"/a": "in\n@/b", "/b": "@/c", "/c": "@/x/../a"}, `/c:1: found "@/x/../a", expected a file that is not being read already: include cycle: /a -> /b -> /c -> /x/../a`},
		{"the text's own file", memFiles{"/a": "in\n@machines"}, `/a:2: found "@machines", expected a file that is not being read already: include cycle: machines -> /a -> machines`},
		{"unreadable", memFiles{"/a": "in\n@/b", "/b": "EACCES"}, `/a:2: found "@/b", expected a readable file, or none: open /b: permission denied`},
		{"too large", memFiles{"/a": "in\n@/b", "/b": strings.Repeat("#", MaxMachinesSize)}, `/b: found "4194304 bytes", expected at most 4194304 bytes in all files together`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			machines, errs, _ := parseMachines("before\n@/a\nafter", tt.files)
			if len(machines) != 3 {
				t.Errorf("machines %v, want those before, in and after the bad include", machines)
			}
			if diff := cmp.Diff([]string{strings.ReplaceAll(tt.want, "permission denied", fs.ErrPermission.Error())}, errs); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseMachinesWithoutReadFileRefusesIncludes(t *testing.T) {
	machines, errs := ParseMachines("@/a\nh", MachinesOptions{})
	if len(machines) != 1 || len(errs) != 1 || errs[0].Error() != `line 1: found "@/a", expected no include here` {
		t.Errorf("machines %v, errors %v", machines, errs)
	}
}

func TestParseMachinesIsBounded(t *testing.T) {
	files := memFiles{}
	for i := range 100 {
		files[fmt.Sprintf("/deep%d", i)] = fmt.Sprintf("@/deep%d", i+1)
		files[fmt.Sprintf("/wide%d", i)] = strings.Repeat(fmt.Sprintf("@/wide%d\n", i+1), 10)
	}
	for text, want := range map[string]string{
		"@/deep0": "at most 32 files one within the other",
		strings.Repeat("h\n", MaxMachineEntries+1): "at most 10000 entries in all files together",
		strings.Repeat("-;", MaxMachineEntries+1):  "at most 10000 entries in all files together",
		strings.Repeat(" ", MaxMachinesSize+1):     "at most 4194304 bytes",
		"h\n@/wide0":                               "at most 10000 entries in all files together",
	} {
		machines, errs, _ := parseMachines(text, files)
		if len(errs) == 0 || !strings.Contains(errs[len(errs)-1], want) && !strings.Contains(errs[0], want) {
			t.Errorf("%.20q: errors %.3q, want %q", text, errs, want)
		}
		if len(machines)+len(errs) > MaxMachineEntries+1 {
			t.Errorf("%.20q: %d machines and %d errors", text, len(machines), len(errs))
		}
	}
}

func TestMachineErrorUnwrapsAndEscapes(t *testing.T) {
	_, errs := ParseMachines("@/a\nb\x1b[1m", MachinesOptions{
		File: "odd\nname", ReadFile: func(string) ([]byte, error) { return nil, fs.ErrPermission },
	})
	if len(errs) != 2 || !errors.Is(errs[0], fs.ErrPermission) {
		t.Fatalf("errors %v, want one of the include and one of the host", errs)
	}
	for _, e := range errs {
		if strings.ContainsFunc(e.Error(), isControl) {
			t.Errorf("control characters in %q", e)
		}
	}
	if e := errs[1]; e.Column != 0 || e.Name != "store URI" || e.Found != "b\x1b[1m" || e.Source != (Position{"odd\nname", 2}) {
		t.Errorf("fields of the error: %+v", e)
	}
}

func TestMachinePredicates(t *testing.T) {
	m := Machine{
		SystemTypes: []string{"x86_64-linux"}, SupportedFeatures: []string{"kvm"}, MandatoryFeatures: []string{"benchmark"},
	}
	for system, want := range map[string]bool{"x86_64-linux": true, "builtin": true, "i686-linux": false, "": false} {
		if m.SystemSupported(system) != want {
			t.Errorf("SystemSupported(%q) = %t", system, !want)
		}
	}
	for _, tt := range []struct {
		features  []string
		all, mand bool
	}{
		{nil, true, false},
		{[]string{"kvm"}, true, false},
		{[]string{"benchmark"}, true, true},
		{[]string{"kvm", "benchmark"}, true, true},
		{[]string{"benchmark", "big-parallel"}, false, true},
	} {
		if m.AllSupported(tt.features) != tt.all || m.MandatoryMet(tt.features) != tt.mand {
			t.Errorf("%q: AllSupported %t, MandatoryMet %t", tt.features, m.AllSupported(tt.features), m.MandatoryMet(tt.features))
		}
	}
	if !(&Machine{}).MandatoryMet(nil) {
		t.Error("a machine without mandatory features turns away a build without features")
	}
}

func TestKeysComeFromColumnsBeforeParameters(t *testing.T) {
	const uri = "ssh://h?ssh-key=/param&base64-ssh-public-host-key=cGFyYW0="
	machines, errs, _ := parseMachines(uri+"\n"+uri+" - /column - - - - "+testHostKey64+"\nh", nil)
	if errs != nil {
		t.Fatal(errs)
	}
	for i, want := range [][2]string{{"/param", "cGFyYW0="}, {"/column", testHostKey64}, {"", ""}} {
		if got := [2]string{machines[i].IdentityFile(), machines[i].HostKey()}; got != want {
			t.Errorf("machine %d: identity file and host key %q, want %q", i, got, want)
		}
	}
	if line, err := DecodeHostKey(testHostKey64); err != nil || line != testHostKey {
		t.Errorf("DecodeHostKey = %q, %v", line, err)
	}
}

func FuzzParseMachines(f *testing.F) {
	f.Add("ssh://a x86_64-linux,b - 4 1.5 kvm,x y "+testHostKey64+"\n# c\n@/inc;h", "i1\n@/inc\n@/other")
	f.Add("- ; h - - x y; @", "@self")
	f.Add("h - - 0 0\r\n\tu@::1%e", "")
	f.Fuzz(func(t *testing.T, text, included string) {
		machines, errs := ParseMachines(text, MachinesOptions{
			DefaultSystems: []string{"x86_64-linux"}, File: "self",
			ReadFile: func(name string) ([]byte, error) {
				if strings.HasPrefix(name, "/") {
					return []byte(included), nil
				}
				return nil, fs.ErrNotExist
			},
			Warn: func(e *MachineError) { _ = e.Error() },
		})
		for _, e := range errs {
			if strings.ContainsFunc(e.Error(), isControl) || len(e.Error()) > 20_000 {
				t.Errorf("error not fit for a log line: %q", e)
			}
		}
		for _, m := range machines {
			checkMachine(t, m)
		}
	})
}

// checkMachine asserts that m keeps its type's promises and that it says the
// same when it is written down and read again.
func checkMachine(t *testing.T, m Machine) {
	t.Helper()
	if !(m.SpeedFactor > 0 && m.SpeedFactor < 1e39) || m.MaxJobs < 0 {
		t.Errorf("speed factor %v, max jobs %d", m.SpeedFactor, m.MaxJobs)
	}
	dash := func(s string) string {
		if s == "" {
			return "-"
		}
		return s
	}
	// The first comma adds nothing, but it makes "," of an empty list and ",-" of
	// the one name that would mean unset.
	list := func(names []string) string { return "," + strings.Join(names, ",") }
	line := strings.Join([]string{
		m.StoreURI, list(m.SystemTypes), dash(m.SSHKey), fmt.Sprint(m.MaxJobs), fmt.Sprint(m.SpeedFactor),
		list(m.SupportedFeatures), list(m.MandatoryFeatures), dash(m.SSHPublicHostKey),
	}, " ")
	again, errs := ParseMachines(line, MachinesOptions{})
	if len(again) != 1 || errs != nil {
		t.Fatalf("%+v is written as %q, which is read as %v, %v", m, line, again, errs)
	}
	ignore := cmpopts.IgnoreFields(Machine{}, "Source")
	if diff := cmp.Diff(m, again[0], ignore, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("written as %q and read again (-first +again):\n%s", line, diff)
	}
}
