package daemon

import (
	"testing"
)

func TestBuildOnMachine(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		s := newSite(t, m)
		r := s.drv("hello", drvConfig{})
		st := s.mustBuild(r)
		t.Log(st.phases(), st.log)
	})
}
