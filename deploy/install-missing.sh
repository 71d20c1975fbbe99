#!/bin/sh
# Installs, with apt-get, the Debian packages of the programs that are missing:
#
#   install-missing.sh PROGRAM=PACKAGE...
#
# In place of a program there may be the absolute path of a file. It changes
# nothing when all are there. No service is started, now or at the next boot.
set -eu
PATH=$PATH:/usr/sbin:/sbin
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

# found tells whether a program, or file, is there.
found() {
	case $1 in
	/*) [ -e "$1" ] ;;
	*) command -v "$1" >/dev/null 2>&1 ;;
	esac
}

# missing prints the packages of the programs that are not found.
missing() {
	for pair; do
		found "${pair%%=*}" || echo "${pair#*=}"
	done
}

# units prints the services that the packages brought.
units() {
	dpkg -L $packages | sed -n 's|^\(/usr\)*/lib/systemd/system/\([^@/]*\.service\)$|\2|p'
}

packages=$(missing "$@" | sort -u)
[ -n "$packages" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
	echo "missing Debian packages:" $packages >&2
	echo "install them, or run this as root on Debian" >&2
	exit 1
fi

# Debian's maintainer scripts ask this file whether they may start a service.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	trap 'rm -f $policy' EXIT
	trap 'exit 1' HUP INT TERM
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod 755 $policy
fi

echo "installing" $packages
log=$(mktemp)
install() { apt-get install -qq -y --no-install-recommends $packages >"$log" 2>&1; }
# The package lists may be absent or old.
install || { apt-get update -qq && install; } || {
	tail -n 30 "$log" >&2
	rm -f "$log"
	exit 1
}
rm -f "$log"
# Nor shall one be started at the next boot that nobody has asked for.
if command -v systemctl >/dev/null 2>&1; then
	for unit in $(units); do
		systemctl disable "$unit" >/dev/null 2>&1 || true
	done
fi
left=$(missing "$@")
if [ -n "$left" ]; then
	echo "installed" $left ", but their programs are not in PATH" >&2
	exit 1
fi
