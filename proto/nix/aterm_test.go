package nix

import (
	"embed"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

//go:embed testdata/drv/*.drv
var drvFiles embed.FS

func readDrv(t testing.TB, name string) []byte {
	t.Helper()
	data, err := drvFiles.ReadFile("testdata/drv/" + name + ".drv")
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// printDerivation is the inverse of ParseDerivation.
func printDerivation(d *Derivation) string {
	list := func(items []string) string { return "[" + strings.Join(items, ",") + "]" }
	quoted := func(items []string) string {
		var q []string
		for _, s := range items {
			q = append(q, printString(s))
		}
		return list(q)
	}
	var outputs, inputDrvs, srcs, env []string
	for _, name := range slices.Sorted(maps.Keys(d.Outputs)) {
		o := d.Outputs[name]
		outputs = append(outputs, fmt.Sprintf("(%s,%s,%s,%s)", printString(name), printString(string(o.Path)), printString(o.HashAlgo), printString(o.Hash)))
	}
	for _, drv := range slices.Sorted(maps.Keys(d.InputDrvs)) {
		inputDrvs = append(inputDrvs, "("+printString(string(drv))+","+quoted(d.InputDrvs[drv])+")")
	}
	for _, src := range d.InputSrcs {
		srcs = append(srcs, string(src))
	}
	for _, name := range slices.Sorted(maps.Keys(d.Env)) {
		env = append(env, "("+printString(name)+","+printString(d.Env[name])+")")
	}
	return "Derive(" + strings.Join([]string{
		list(outputs), list(inputDrvs), quoted(srcs), printString(d.Platform), printString(d.Builder), quoted(d.Args), list(env),
	}, ",") + ")"
}

func printString(s string) string {
	return `"` + strings.NewReplacer("\\", `\\`, `"`, `\"`, "\n", `\n`, "\r", `\r`, "\t", `\t`).Replace(s) + `"`
}

func TestParseDerivation(t *testing.T) {
	got, err := ParseDerivation(readDrv(t, "structured-attrs"))
	if err != nil {
		t.Fatal(err)
	}
	want := &Derivation{
		BasicDerivation: BasicDerivation{
			Outputs:   map[string]DerivationOutput{"out": {Path: "/nix/store/4jqhwf0k9vfg6cdc1128clgk1nhrz7v8-b"}},
			InputSrcs: []StorePath{"/nix/store/14krzpyh432fcpjslbdwbwspbwfm6rmf-t.nix"},
			Platform:  "x86_64-linux", Builder: "/bin/sh",
			Args: []string{"-c", "echo /nix/store/p6p7m4kfn05q1dbp1hbq2s5isvcglkdh-a /nix/store/dkjnca2hxpws2ph1g9fa2ks6lbjw8zvh-a-dev"},
			Env: map[string]string{
				"__json": `{"builder":"/bin/sh","name":"b","preferLocalBuild":true,"requiredSystemFeatures":["kvm","a"],"src":"/nix/store/14krzpyh432fcpjslbdwbwspbwfm6rmf-t.nix","system":"x86_64-linux"}`,
				"out":    "/nix/store/4jqhwf0k9vfg6cdc1128clgk1nhrz7v8-b",
			},
		},
		InputDrvs: map[StorePath][]string{"/nix/store/chplwzkm2h83mpr1p1gg8sda6504d9dl-a.drv": {"dev", "out"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("derivation (-want +got):\n%s", diff)
	}
}

func TestParseDerivationUnescapesArgsAndEnv(t *testing.T) {
	d, err := ParseDerivation(readDrv(t, "outputs-escapes"))
	if err != nil {
		t.Fatal(err)
	}
	if want := "x\ny\t\"q\"\\ \r \\n"; d.Args[1] != want {
		t.Errorf("argument %q, want %q", d.Args[1], want)
	}
	if want := "l1\nl2"; d.Env["FOO"] != want {
		t.Errorf("FOO = %q, want %q", d.Env["FOO"], want)
	}
	d, err = ParseDerivation([]byte(`Derive([],[],[],"\x\é","\\",[],[("a\"","` + "\xff\x00\n" + `")])`))
	if err != nil || d.Platform != "xé" || d.Builder != `\` || d.Env[`a"`] != "\xff\x00\n" {
		t.Errorf("odd but legal strings: %+v, %v", d, err)
	}
}

func TestDerivationKinds(t *testing.T) {
	for _, tt := range []struct {
		name      string
		kind      OutputKind
		known, ca bool
		outputs   map[string]StorePath
		features  []string
		local     bool
	}{
		{"outputs-escapes", InputAddressed, true, false, map[string]StorePath{
			"dev": "/nix/store/dkjnca2hxpws2ph1g9fa2ks6lbjw8zvh-a-dev", "out": "/nix/store/p6p7m4kfn05q1dbp1hbq2s5isvcglkdh-a",
		}, []string{"big-parallel", "kvm"}, true},
		{"structured-attrs", InputAddressed, true, false, map[string]StorePath{"out": "/nix/store/4jqhwf0k9vfg6cdc1128clgk1nhrz7v8-b"}, []string{"a", "kvm"}, true},
		{"fixed-flat", Fixed, true, true, map[string]StorePath{"out": "/nix/store/i8yf3p9li8bd9rwjsr5nkg63lxs367am-f"}, nil, false},
		{"fixed-recursive", Fixed, true, true, map[string]StorePath{"out": "/nix/store/xc9xcfpsszm2vhcrxgqzdzf4hza4ag6j-r"}, nil, false},
		{"floating", Floating, false, true, nil, nil, false},
		{"deferred", Deferred, false, false, nil, nil, false},
		{"impure", Impure, false, true, nil, nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, err := ParseDerivation(readDrv(t, tt.name))
			if err != nil {
				t.Fatal(err)
			}
			for name, o := range d.Outputs {
				if o.Kind() != tt.kind {
					t.Errorf("output %q has kind %d, want %d", name, o.Kind(), tt.kind)
				}
			}
			if d.AllOutputsKnown() != tt.known || d.ContentAddressed() != tt.ca {
				t.Errorf("AllOutputsKnown %t, ContentAddressed %t", d.AllOutputsKnown(), d.ContentAddressed())
			}
			if diff := cmp.Diff(tt.outputs, d.OutputPaths(), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("OutputPaths (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.features, d.RequiredSystemFeatures(), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("RequiredSystemFeatures (-want +got):\n%s", diff)
			}
			if d.PreferLocalBuild() != tt.local {
				t.Errorf("PreferLocalBuild = %t", d.PreferLocalBuild())
			}
		})
	}
	none := &BasicDerivation{}
	if none.AllOutputsKnown() || none.ContentAddressed() {
		t.Error("a derivation without outputs has known or content-addressed ones")
	}
}

func TestStructuredAttributesHideTheEnvironment(t *testing.T) {
	d := BasicDerivation{Env: map[string]string{
		"__json": `{"name":"x"}`, "requiredSystemFeatures": "kvm", "preferLocalBuild": "1",
	}}
	if d.PreferLocalBuild() || len(d.RequiredSystemFeatures()) != 0 {
		t.Errorf("PreferLocalBuild %t, RequiredSystemFeatures %q", d.PreferLocalBuild(), d.RequiredSystemFeatures())
	}
}

func TestDerivationPrintsAsNixWroteIt(t *testing.T) {
	files, err := drvFiles.ReadDir("testdata/drv")
	if err != nil || len(files) < 7 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		data := readDrv(t, strings.TrimSuffix(file.Name(), path.Ext(file.Name())))
		d, err := ParseDerivation(data)
		if err != nil {
			t.Errorf("%s: %v", file.Name(), err)
		} else if diff := cmp.Diff(string(data), printDerivation(d)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", file.Name(), diff)
		}
	}
}

func TestParseDerivationRefusesEveryTruncation(t *testing.T) {
	data := readDrv(t, "outputs-escapes")
	for n := range data {
		if _, err := ParseDerivation(data[:n]); err == nil {
			t.Errorf("the first %d of %d bytes parse", n, len(data))
		}
	}
}

func TestParseDerivationRefuses(t *testing.T) {
	const out = `("out","/nix/store/p6p7m4kfn05q1dbp1hbq2s5isvcglkdh-a","","")`
	const drv = `("/nix/store/chplwzkm2h83mpr1p1gg8sda6504d9dl-a.drv",["out"])`
	for _, tt := range []struct{ text, message string }{
		{`derive()`, `at byte 0: expected "Derive("`},
		{`DrvWithVersion("xp-new",[`, `unknown format version "xp-new"`},
		{`DrvWithVersion(`, `expected "\""`},
		{`Derive([],[],[],"s","b",[],[])x`, `1 bytes after the end`},
		{`Derive([],[],[],"s","b",["a" "b"],[])`, `expected "]"`},
		{`Derive([],[],[],"s","b",["a",],[])`, `expected "\""`},
		{`Derive([],[],["/nix/store/../x"],"s","b",[],[])`, `store path`},
		{`Derive([` + out + `,` + out + `],[],[],"s","b",[],[])`, `output "out": declared twice`},
		{`Derive([("","","","")],[],[],"s","b",[],[])`, `output "": empty name`},
		{`Derive([("a!b","","","")],[],[],"s","b",[],[])`, `illegal character '!'`},
		{`Derive([("../x","","","")],[],[],"s","b",[],[])`, `illegal character '/'`},
		{`Derive([("out","/tmp/x","","")],[],[],"s","b",[],[])`, `store path`},
		{`Derive([("out","","","00")],[],[],"s","b",[],[])`, `hash without an algorithm`},
		{`Derive([("out","","sha256","00")],[],[],"s","b",[],[])`, `fixed output without a path`},
		{strings.ReplaceAll(`Derive([OUT],[],[],"s","b",[],[])`, "OUT", strings.ReplaceAll(out, `"",""`, `"sha256",""`)), `not known before the build`},
		{strings.ReplaceAll(`Derive([OUT],[],[],"s","b",[],[])`, "OUT", strings.ReplaceAll(out, `"",""`, `"sha256","impure"`)), `not known before the build`},
		{`Derive([],[` + drv + `,` + drv + `],[],"s","b",[],[])`, `listed twice`},
		{`Derive([],[` + strings.ReplaceAll(drv, `"out"`, `"*"`) + `],[],"s","b",[],[])`, `illegal character '*'`},
		{`Derive([],[],[],"s","b",[],[("a","1"),("a","2")])`, `environment variable "a" set twice`},
		{`Derive([],[],[],"s","b",[],[("__json","[]")])`, `structured attributes`},
		{`Derive([],[],[],"s","b",[],[("__json","null")])`, `null is not an object`},
		{`Derive([],[],[],"s","b",[],[("__json","{")])`, `structured attributes`},
		{`Derive([],[],[],"s","b",[],[("__json","{\"requiredSystemFeatures\":\"kvm\"}")])`, `structured attribute "requiredSystemFeatures"`},
		{`Derive([],[],[],"s","b",[],[("__json","{\"requiredSystemFeatures\":null}")])`, `unexpected null`},
		{`Derive([],[],[],"s","b",[],[("__json","{\"preferLocalBuild\":\"1\"}")])`, `structured attribute "preferLocalBuild"`},
	} {
		d, err := ParseDerivation([]byte(tt.text))
		if err == nil {
			t.Errorf("%s: %+v, want an error", tt.text, d)
		} else if !strings.Contains(err.Error(), tt.message) || errors.Is(err, ErrDynamicDerivation) {
			t.Errorf("%s: %v; want it to say %q", tt.text, err, tt.message)
		}
	}
	if _, err := ParseDerivation(make([]byte, MaxDerivationSize+1)); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("larger than MaxDerivationSize: %v", err)
	}
}

func TestDynamicDerivationHasItsOwnError(t *testing.T) {
	_, err := ParseDerivation([]byte(`DrvWithVersion("xp-dyn-drv",[("out","","","")],[],[],"s","b",[],[])`))
	if !errors.Is(err, ErrDynamicDerivation) {
		t.Errorf("error %v, want ErrDynamicDerivation", err)
	}
}

func TestBasicReplacesSourcesOnlyWhereThereAreInputDerivations(t *testing.T) {
	const a, b = "/nix/store/14krzpyh432fcpjslbdwbwspbwfm6rmf-t.nix", "/nix/store/p6p7m4kfn05q1dbp1hbq2s5isvcglkdh-a"
	inputs := []StorePath{b, a, b}
	for name, want := range map[string][]StorePath{"structured-attrs": {a, b}, "outputs-escapes": nil} {
		d, err := ParseDerivation(readDrv(t, name))
		if err != nil {
			t.Fatal(err)
		}
		before := slices.Clone(d.InputSrcs)
		got := d.Basic(inputs)
		if diff := cmp.Diff(want, got.InputSrcs); diff != "" {
			t.Errorf("%s: InputSrcs (-want +got):\n%s", name, diff)
		}
		got.InputSrcs = d.InputSrcs
		if diff := cmp.Diff(d.BasicDerivation, got); diff != "" {
			t.Errorf("%s: the rest changed:\n%s", name, diff)
		}
		if !slices.Equal(before, d.InputSrcs) || inputs[0] != b {
			t.Errorf("%s: Basic changed the derivation or its argument", name)
		}
	}
}

func FuzzParseDerivation(f *testing.F) {
	files, err := drvFiles.ReadDir("testdata/drv")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, _ := drvFiles.ReadFile("testdata/drv/" + file.Name())
		f.Add(data)
	}
	f.Add([]byte(`DrvWithVersion("xp-dyn-drv",`))
	f.Add([]byte(`Derive([("o","","r:sha256","")],[],[],"\\\"","\n\r\t\q",[""],[("","")])`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := ParseDerivation(data)
		if err != nil {
			return
		}
		d.RequiredSystemFeatures()
		d.PreferLocalBuild()
		if d.AllOutputsKnown() && len(d.OutputPaths()) != len(d.Outputs) {
			t.Errorf("all outputs of %v known, but paths are %v", d.Outputs, d.OutputPaths())
		}
		printed := printDerivation(d)
		again, err := ParseDerivation([]byte(printed))
		if err != nil {
			t.Fatalf("%q prints as %q, which does not parse: %v", data, printed, err)
		}
		if diff := cmp.Diff(d, again); diff != "" {
			t.Errorf("%q prints as %q, which parses to something else (-first +again):\n%s", data, printed, diff)
		}
	})
}
