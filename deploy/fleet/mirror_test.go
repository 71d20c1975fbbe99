package fleet

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMirrorComesFromAptSources(t *testing.T) {
	const deb822 = `# a comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/some.gpg
`
	for name, test := range map[string]struct {
		files map[string]string
		want  mirror // zero: an error
	}{
		"deb822": {
			map[string]string{"sources.list.d/debian.sources": deb822},
			mirror{"http://mirror.example/debian", "/usr/share/keyrings/some.gpg"},
		},
		"one line with options": {
			map[string]string{"sources.list": "# deb http://no.example x main\n" +
				"deb-src http://no.example/debian sid main\n" +
				"deb [arch=amd64 signed-by=/k.gpg] https://one.example/debian trixie main contrib # why\n"},
			mirror{"https://one.example/debian", "/k.gpg"},
		},
		"third parties, security and disabled entries are passed over": {
			map[string]string{
				"sources.list": "deb http://security.example/debian-security bookworm-security main\n" +
					"deb https://other.example/apt stable-tools main\ndeb cdrom:[Debian]/ bookworm main\n",
				"sources.list.d/a.sources": "Enabled: no\n" + deb822,
				"sources.list.d/b.sources": "Types: deb\nURIs: https://node.example\nSuites: nodistro\nComponents: main\n\n" +
					"Types: deb\nURIs: http://late.example/debian\nSuites:\n stable\nComponents: main\nSigned-By: /k.gpg\n",
			},
			mirror{"http://late.example/debian", "/k.gpg"},
		},
		"no Debian at all": {
			map[string]string{"sources.list": "deb http://other.example/ubuntu noble main\n"},
			mirror{},
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for file, text := range test.files {
				file = filepath.Join(dir, file)
				if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := mirrorFromSources(dir)
			if (err != nil) != (test.want == mirror{}) {
				t.Fatalf("error %v, want %v", err, test.want)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func FuzzParseSources(f *testing.F) {
	f.Add("deb [signed-by=/k] http://m.example/debian sid main\n")
	f.Add("Types: deb\nURIs: http://m.example\nSuites: sid\n trixie\nComponents: main\n\n x")
	f.Add(" \n\t:\n[")
	f.Fuzz(func(t *testing.T, text string) {
		for _, s := range append(parseOneLine(text), parseDeb822(text)...) {
			if s.SignedBy != "" && s.SignedBy[0] != '/' {
				t.Errorf("keyring %q is not a path", s.SignedBy)
			}
			if s.isDebian() && len(s.URI) < len("http://") {
				t.Errorf("mirror %q", s.URI)
			}
		}
	})
}
