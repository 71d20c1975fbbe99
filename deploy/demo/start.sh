#!/bin/sh
# The beginning of 'make demo', before anything is compiled: says what is about to
# happen, and stops where it cannot, saying what to do instead.
set -eu

cat <<'END'
The demo makes four small hosts inside this one: a client, and three machines with
Nix 2.8, Nix 2.26 and the newest Nix in Debian. A user on the client builds twelve
derivations through nix-dispatch; the demo checks the results and removes the hosts.
It takes less than a minute. The first time it takes some minutes more: it compiles
the programs, installs debootstrap and iproute2 if they are missing, and downloads
three Debian base systems, 65 MB each. Ctrl-C stops it and cleans up.

END

# fail WHY WHAT-TO-DO...: stops the demo.
fail() {
	printf 'The demo cannot run here: %s.\n' "$1" >&2
	shift
	printf '%s\n' "$@" "See \"Where the demo cannot run\" in README.md." >&2
	exit 1
}

[ "$(uname -s)" = Linux ] || fail "it needs Linux, and this is $(uname -s)" \
	"Run it in a virtual machine with Debian."
case $(uname -m) in
x86_64) ;;
*) fail "its derivations are for x86_64-linux, and this is $(uname -m)" \
	"nix-dispatch itself runs here: see \"Install\" in README.md." ;;
esac
[ "$(id -u)" = 0 ] || fail "it needs root, for namespaces and mounts" \
	"Run: sudo env \"PATH=\$PATH\" make demo"
command -v go >/dev/null || fail "the program go is not in PATH" \
	"Install any Go from 1.21 on: it downloads the Go that go.mod names."
go list -m >/dev/null || fail "go cannot use go.mod, for the reason above" \
	"Go from 1.21 on downloads the Go that go.mod names, unless GOTOOLCHAIN=local forbids it." \
	"Run: GOTOOLCHAIN=auto make demo, or install that Go."

echo "Compiling the programs (the first time: a minute or more)"
