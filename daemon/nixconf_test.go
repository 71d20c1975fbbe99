package daemon

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// TestOwnListFromNixConf leaves the list to Nix's configuration, and changes that.
func TestOwnListFromNixConf(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	dir := t.TempDir()
	conf := filepath.Join(dir, "nix.conf")
	getenv := func(name string) string {
		return map[string]string{"NIX_CONF_DIR": dir, "XDG_CONFIG_HOME": dir, "XDG_CONFIG_DIRS": dir}[name]
	}
	var line string
	s := newSiteWith(t, siteConfig{machines: []*fakeMachine{m}, options: func(o *Options) {
		line = o.Builders
		write(t, filepath.Join(dir, "machines"), line)
		o.Builders, o.ReloadPoll = "", 5*time.Millisecond
		o.NixConf = &nix.ConfSource{Getenv: getenv, Home: dir}
	}})
	if got := s.d.machines.current().builders; got != "@"+dir+"/machines" {
		t.Errorf("without a nix.conf the list is %q, want the file machines beside it", got)
	}
	write(t, conf, "cores = 1\nbuilders = "+line+" ; ssh://m2 - - 2\n")
	s.eventually("there are two machines", func() bool { return len(s.status().GetMachines()) == 2 })
	if !s.d.machines.current().same(line + " ; ssh://m2 - - 2") {
		t.Errorf("the list %q is not what Nix tells its hook", s.d.machines.current().builders)
	}
	write(t, conf, "builders ssh://m3\n")
	s.eventually("the bad nix.conf is reported", func() bool { return len(s.status().GetReload().GetErrors()) == 1 })
	if n := len(s.status().GetMachines()); n != 2 {
		t.Errorf("%d machines after a bad nix.conf, want 2 as before", n)
	}
	if err := os.Remove(conf); err != nil {
		t.Fatal(err)
	}
	s.eventually("there is one machine", func() bool { return len(s.status().GetMachines()) == 1 })
	h := s.hook(func(h *dispatchv1.Hello) { h.Builders = "@" + dir + "/machines" })
	h.accepted(s.drv("thing", drvConfig{}))
	h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
}
