package integration

import (
	"hash/fnv"
	"os"
	"testing"
)

// nightly says that every test takes its whole form: "make nightly". Otherwise, in
// "make test", a test that has a short form takes that one. docs/hacking.md says what
// is in which.
var nightly = os.Getenv("NIX_DISPATCH_NIGHTLY") != ""

// onlyNightly leaves out a test of which "make test" has another form, instead.
func onlyNightly(t *testing.T, instead string) {
	t.Helper()
	if !nightly {
		t.Skipf("NIX_DISPATCH_NIGHTLY is not set: make test has %s instead", instead)
	}
}

// shortOr is a number that is smaller in "make test" than in "make nightly".
func shortOr[N any](short, whole N) N {
	if nightly {
		return whole
	}
	return short
}

// clients are the Nix versions of the clients that a test is run with. In "make test"
// that is one of them, always the same for a test, so that every version has about
// a third of the tests. Nothing else in a test with a short form depends on the client.
func clients(t *testing.T) []string {
	if nightly {
		return suites
	}
	name := fnv.New32a()
	name.Write([]byte(t.Name())) // never fails
	return suites[name.Sum32()%uint32(len(suites)):][:1]
}
