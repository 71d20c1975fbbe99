package daemon

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nixdispatch/daemon/webtest"
)

// freeAddress is a loopback address that nobody listens on. Of the 16 million
// addresses it takes one by chance: on 127.0.0.1 another test could take the port
// before the daemon does.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254)))
	if err != nil {
		t.Skipf("no loopback here: %v", err)
	}
	defer l.Close()
	return l.Addr().String()
}

// A browser asks the metrics listener.
type browser struct {
	t              *testing.T
	base           string
	user, password string // "" for no authentication
	host           string // in place of the address; "" for that
	client         *http.Client
}

// newBrowser is one that trusts a certificate for 127.0.0.1, in PEM, for https.
func newBrowser(t *testing.T, base string, certificate string) *browser {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(certificate))
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "127.0.0.1"}}
	t.Cleanup(transport.CloseIdleConnections)
	return &browser{t: t, base: base, client: &http.Client{Transport: transport, Timeout: patience}}
}

// get asks for a path.
func (b *browser) get(path string) (*http.Response, string) {
	b.t.Helper()
	return b.do(http.MethodGet, path)
}

func (b *browser) do(method, path string) (*http.Response, string) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), method, b.base+path, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	if b.user != "" {
		req.SetBasicAuth(b.user, b.password)
	}
	req.Host = b.host
	r, err := b.client.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	return r, string(body)
}

func TestMetricsAreServed(t *testing.T) {
	t.Parallel()
	address := freeAddress(t)
	newSiteWith(t, siteConfig{machines: []*fakeMachine{oneMachine("ssh")}, options: func(o *Options) { o.MetricsListen = address }})
	b := newBrowser(t, "http://"+address, "")
	r, body := b.get("/metrics")
	if want := `nix_dispatch_machine_up{machine="ssh://m1"} 1`; r.StatusCode != http.StatusOK || !strings.Contains(body, want) {
		t.Errorf("GET /metrics = %d, %.200q; want it to contain %s", r.StatusCode, body, want)
	}
	if r, _ := b.get("/debug/pprof/"); r.StatusCode != http.StatusNotFound {
		t.Errorf("GET of something else = %d, want 404", r.StatusCode)
	}
	if r, _ := b.do(http.MethodPost, "/metrics"); r.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST = %d, want 405", r.StatusCode)
	}
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestNothingIsServedToStrangers has TLS and a password.
func TestNothingIsServedToStrangers(t *testing.T) {
	t.Parallel()
	dir, address := t.TempDir(), freeAddress(t)
	certificate, key := webtest.Certificate(t)
	writeFile(t, filepath.Join(dir, "cert.pem"), certificate)
	writeFile(t, filepath.Join(dir, "key.pem"), key)
	file := filepath.Join(dir, "web.yml")
	writeFile(t, file, webtest.Config(t, "prometheus", "secret"))
	newSiteWith(t, siteConfig{machines: []*fakeMachine{oneMachine("ssh")}, options: func(o *Options) {
		o.MetricsListen, o.MetricsConfig = address, file
	}})
	friend := newBrowser(t, "https://"+address, certificate)
	friend.user, friend.password = "prometheus", "secret"
	want := func(who string, b *browser, path string, status int) {
		t.Helper()
		r, body := b.get(path)
		if r.StatusCode != status {
			t.Errorf("%s: GET %s = %d, want %d", who, path, r.StatusCode, status)
		}
		if served := strings.Contains(body, "ssh://m1"); served != (status == http.StatusOK) {
			t.Errorf("%s: GET %s serves the machines: %v", who, path, served)
		}
	}
	want("who knows the password", friend, "/metrics", http.StatusOK)
	stranger := newBrowser(t, "https://"+address, certificate)
	plain := newBrowser(t, "http://"+address, "")
	plain.user, plain.password = "prometheus", "secret"
	wrong := newBrowser(t, "https://"+address, certificate)
	wrong.user, wrong.password = "prometheus", "guess"
	for _, path := range []string{"/metrics", "/", "/nothing"} {
		want("who has no password", stranger, path, http.StatusUnauthorized)
		want("who has a wrong one", wrong, path, http.StatusUnauthorized)
		want("who speaks without TLS", plain, path, http.StatusBadRequest)
	}

	// The file counts as it is now.
	writeFile(t, file, webtest.Config(t, "prometheus", "new"))
	want("who has the old password", friend, "/metrics", http.StatusUnauthorized)
	friend.password = "new"
	want("who has the new one", friend, "/metrics", http.StatusOK)
	writeFile(t, file, "basic_auth_users: [")
	want("who has it, with a bad file", friend, "/metrics", http.StatusInternalServerError)
}

func TestBadWebConfigurationIsRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "web.yml")
	for name, text := range map[string]string{
		"no such key": "basic_auth: {}\n", "no certificate": "tls_server_config: {cert_file: none.pem, key_file: none.pem}\n",
		"no hash": "basic_auth_users: {prometheus: secret}\n",
	} {
		writeFile(t, file, text)
		_, err := New(Options{StateDir: filepath.Join(dir, "state"), MetricsConfig: file})
		if err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: New = %v, want an error that names the file", name, err)
		}
	}
}

// TestPageNamesNobodyToStrangers looks at the page in all the ways there are to it.
func TestPageNamesNobodyToStrangers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certificate, key := webtest.Certificate(t)
	writeFile(t, filepath.Join(dir, "cert.pem"), certificate)
	writeFile(t, filepath.Join(dir, "key.pem"), key)
	withUsers, withTLS, asking := filepath.Join(dir, "users.yml"), filepath.Join(dir, "tls.yml"), filepath.Join(dir, "asking.yml")
	writeFile(t, withUsers, webtest.Config(t, "prometheus", "secret"))
	tlsOnly, _, _ := strings.Cut(webtest.Config(t, "prometheus", "secret"), "basic_auth_users")
	writeFile(t, withTLS, tlsOnly)
	writeFile(t, asking, tlsOnly+"  client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: cert.pem\n")
	pair, err := tls.X509KeyPair([]byte(certificate), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, config string
		flag         bool
		user         string
		certificate  bool
		named        bool
	}{
		{name: "open to all", named: false},
		{name: "open to all, as was asked for", flag: true, named: true},
		{name: "words of authentication that nobody checks", user: "prometheus", named: false},
		{name: "a password", config: withUsers, user: "prometheus", named: true},
		{name: "TLS alone", config: withTLS, named: false},
		{name: "TLS, and words that nobody checks", config: withTLS, user: "prometheus", named: false},
		{name: "no certificate where one may be shown", config: asking, named: false},
		{name: "a certificate", config: asking, certificate: true, named: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := oneMachine("ssh")
			open := make(chan struct{})
			m.build = m.gated(open)
			address := freeAddress(t)
			s := newSiteWith(t, siteConfig{machines: []*fakeMachine{m}, options: func(o *Options) {
				o.MetricsListen, o.MetricsConfig, o.PageNames = address, tt.config, tt.flag
			}})
			h := s.hook()
			h.accepted(s.drv("thing", drvConfig{}))
			s.eventually("it is being built", func() bool { return m.building() == 1 })
			scheme := "http://"
			if tt.config != "" {
				scheme = "https://"
			}
			b := newBrowser(t, scheme+address, certificate)
			b.user, b.password = tt.user, "secret"
			if tt.certificate {
				b.client.Transport.(*http.Transport).TLSClientConfig.Certificates = []tls.Certificate{pair}
			}
			r, body := b.get("/")
			if r.StatusCode != http.StatusOK || !strings.Contains(body, "1 of 1 slots in use") {
				t.Errorf("GET / = %d, %s; want the machine and its slot", r.StatusCode, body)
			}
			if named := strings.Contains(body, "thing"); named != tt.named {
				t.Errorf("the page names the derivation: %v, want %v", named, tt.named)
			}
			close(open)
			h.finish()
			s.eventually("the page tells that it has ended", func() bool {
				_, body := b.get("/")
				return strings.Contains(body, "0 of 1 slots in use") && strings.Contains(body, ">built<")
			})
			b.host = "evil.example"
			if r, body := b.get("/"); r.StatusCode != http.StatusMisdirectedRequest || strings.Contains(body, "ssh://") {
				t.Errorf("under another host's name: %d, %s", r.StatusCode, body)
			}
		})
	}
}
