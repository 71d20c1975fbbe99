#!/bin/sh
# Installs nix-dispatch, or removes all that it installs:
#
#   install.sh install|uninstall BIN PREFIX DESTDIR
#
# BIN holds the programs, which are run for their manual pages and completions.
set -eu
action=$1 bin=$2 prefix=$3 dest=$4
here=$(dirname "$0")

# file MODE PLACE COMMAND...: what the command prints is a file below the prefix. It
# appears as a whole: a program may be in use, and a hook may be started any moment.
file() {
	mode=$1 place=$dest$prefix/$2
	shift 2
	if [ "$action" = uninstall ]; then
		rm -f "$place"
		return
	fi
	mkdir -p "${place%/*}"
	"$@" >"$place.new"
	chmod "$mode" "$place.new"
	mv -f "$place.new" "$place"
}
unit() { sed "s|/usr/local/|$prefix/|" "$here/systemd/$1"; }
page() { "$bin/$1" man | gzip -9n; }
hook_page() { echo '.so man1/nix-dispatch.1' | gzip -9n; }

case $action in
install) ;;
uninstall)
	# Nix must not be left with a hook that is gone.
	if [ -z "$dest" ] && [ -x "$prefix/bin/nix-dispatch" ]; then
		"$prefix/bin/nix-dispatch" disable --wait 10m
		if [ -d /run/systemd/system ]; then
			systemctl disable --now nix-dispatchd.socket nix-dispatchd.service
		fi
	fi
	;;
*)
	echo "install.sh: install or uninstall?" >&2
	exit 2
	;;
esac

for program in nix-dispatch nix-dispatchd nix-dispatch-hook; do
	file 755 "bin/$program" cat "$bin/$program"
done
for dir in system user; do
	sub=
	[ "$dir" = system ] || sub=user/
	for kind in service socket; do
		file 644 "lib/systemd/$dir/nix-dispatchd.$kind" unit "${sub}nix-dispatchd.$kind"
	done
done
for kind in sysusers tmpfiles; do
	file 644 "lib/$kind.d/nix-dispatch.conf" cat "$here/systemd/nix-dispatch.$kind"
done
file 644 share/man/man1/nix-dispatch.1.gz page nix-dispatch
file 644 share/man/man8/nix-dispatchd.8.gz page nix-dispatchd
file 644 share/man/man1/nix-dispatch-hook.1.gz hook_page
zsh=site-functions
[ "$prefix" != /usr ] || zsh=vendor-completions # Debian's
for program in nix-dispatch nix-dispatchd; do
	file 644 "share/bash-completion/completions/$program" "$bin/$program" completion bash
	file 644 "share/zsh/$zsh/_$program" "$bin/$program" completion zsh
	file 644 "share/fish/vendor_completions.d/$program.fish" "$bin/$program" completion fish
done
license=$here/../LICENSE
[ "$prefix" != /usr ] || license=$here/deb/copyright # Debian's form
file 644 share/doc/nix-dispatch/copyright cat "$license"
for example in builds-on-this-host.conf nix-daemon.conf; do
	file 644 "share/doc/nix-dispatch/examples/$example" unit "examples/$example"
done
