package daemon

import (
	"fmt"
	"strings"
	"testing"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func TestClaimsAreComparedWithTheMachinesOwnNix(t *testing.T) {
	t.Parallel()
	config := func(features string) string {
		return fmt.Sprintf(`{"system": {"value": %q}, "extra-platforms": {"value": ["i686-linux"]}, "system-features": {"value": [%s]}, "x": {"value": 3}}`, nixSystem(), features)
	}
	tests := []struct {
		name, config, command string
		system                string
		want                  []string // details, in part; those but of the last say "warning"
		warnings              int
	}{
		{"all is true", config(`"kvm", "big"`), "config show --json", "", []string{"with kvm, big: no less than the list says"}, 0},
		{"an old Nix", config(`"kvm", "big", "more"`), "show-config --json", "", []string{"no less than"}, 0},
		{"a feature is missing", config(`"big"`), "config show --json", "", []string{"has no feature kvm, which the list says, and fails such builds (it has big)"}, 1},
		{"a system and both features are", config(``), "config show --json", "riscv64-linux,i686-linux",
			[]string{"does not build for riscv64-linux, which", "no feature kvm, big, which the list says, and fails such builds (it has none)"}, 2},
		{"no answer", "", "", "", []string{"not known"}, 0},
		{"a greeting", "\xcb\xeeRT", "config show --json", "", []string{"not known"}, 0},
		{"other JSON", `[1]`, "config show --json", "", []string{"not known"}, 0},
		{"no system", `{}`, "config show --json", "", []string{"not known"}, 0},
		{"too much", config(strings.Repeat(`"kvm",`, maxConfig/6) + `"big"`), "config show --json", "", []string{"not known"}, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := oneMachine("ssh")
			m.features, m.mandatory, m.system = "kvm", "big", tt.system
			m.config, m.configCommand = tt.config, tt.command
			s := newSite(t, m)
			steps, err := s.ping(&dispatchv1.PingRequest{Machine: m.uri(), Claims: true})
			if err != nil {
				t.Fatal(err)
			}
			var got []*dispatchv1.PingResponse
			warnings := 0
			for _, step := range steps {
				if step.GetStep() == stepClaims {
					got = append(got, step)
					if step.GetVerdict() == dispatchv1.PingVerdict_PING_VERDICT_WARNING && step.GetCause() == "claims" && step.GetFix() != "" {
						warnings++
					}
				}
			}
			if len(got) != len(tt.want) || warnings != tt.warnings {
				t.Fatalf("steps %v, want %d, %d of them warnings", got, len(tt.want), tt.warnings)
			}
			for i, want := range tt.want {
				if !strings.Contains(got[i].GetDetail(), want) {
					t.Errorf("said %q, want %q", got[i].GetDetail(), want)
				}
			}
		})
	}
}

// Whatever a machine prints, the words taken from it are fit for a message.
func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(`{"system": {"value": "x86_64-linux"}, "extra-platforms": {"value": []}, "system-features": {"value": ["kvm"]}}`))
	f.Add([]byte(`{"system": {"value": "a\u001b"}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, text []byte) {
		own, err := parseConfig(text)
		if err != nil {
			return
		}
		if len(own.systems) == 0 {
			t.Error("no system, and no error")
		}
		for _, word := range append(own.systems, own.features...) {
			if word == "" || strings.ContainsAny(word, " \n\x1b\x00") || len(word) > 100 {
				t.Errorf("took %q", word)
			}
		}
	})
}
