#!/bin/sh
# Makes the root directory of a Debian suite with Nix and OpenSSH in it.
# Runs as root, as the first process of its own mount and pid namespace, so that
# mounts and leftover processes go away with it.
#
#   base.sh SUITE TARGET MIRROR KEYRING DEBS
#
# TARGET is empty and is complete when the exit status is 0. DEBS keeps the
# downloaded packages, so that a changed recipe need not download them again.
set -eu
suite=$1 target=$2 mirror=$3 keyring=$4 debs=$5
export LC_ALL=C DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin

say() { echo "$suite: $*"; }

mount --make-rprivate /
mount -t proc proc /proc

# What is not needed is not unpacked, and nothing is synced: the root is
# renamed into place only when it is whole.
mkdir -p "$target/etc/dpkg/dpkg.cfg.d" "$target/etc/apt/apt.conf.d" "$target/usr/sbin"
cat >"$target/etc/dpkg/dpkg.cfg.d/fleet" <<END
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/lintian/*
END
cat >"$target/etc/apt/apt.conf.d/90fleet" <<END
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
// A mirror may be a snapshot, older than its Release file allows.
Acquire::Check-Valid-Until "false";
Dpkg::Use-Pty "false";
END

# An older debootstrap does not know newer suites; sid's script serves them.
script=
[ -e "/usr/share/debootstrap/scripts/$suite" ] || script=/usr/share/debootstrap/scripts/sid

say "debootstrap from $mirror"
debootstrap --variant=minbase --cache-dir="$debs" ${keyring:+--keyring="$keyring"} \
	"$suite" "$target" "$mirror" $script || {
	echo "--- end of debootstrap.log"
	tail -n 20 "$target/debootstrap/debootstrap.log" 2>/dev/null
	exit 1
}

# Packages must not start services here.
printf '#!/bin/sh\nexit 101\n' >"$target/usr/sbin/policy-rc.d"
chmod 755 "$target/usr/sbin/policy-rc.d"
mount --bind "$debs" "$target/var/cache/apt/archives"
mount -t proc proc "$target/proc"
mount -t devpts devpts "$target/dev/pts" 2>/dev/null || true

say "installing Nix and OpenSSH"
chroot "$target" apt-get update -qq
chroot "$target" apt-get install -qq -y --no-install-recommends \
	nix-bin openssh-server openssh-client iproute2 procps
umount "$target/var/cache/apt/archives"
rm -f "$target/usr/sbin/policy-rc.d" "$target"/etc/ssh/ssh_host_*
rm -rf "$target"/var/lib/apt/lists/* "$target"/var/cache/apt/archives/*.deb "$target"/var/log/* "$target"/nix

# Users. A password of "*" (none) instead of "!" (locked) lets sshd without PAM
# accept a key.
group() { echo "$1:x:$2:${3-}" >>"$target/etc/group"; echo "$1:!::${3-}" >>"$target/etc/gshadow"; }
user() {
	echo "$1:x:$2:$3::$4:$5" >>"$target/etc/passwd"
	echo "$1:*:19000:0:99999:7:::" >>"$target/etc/shadow"
}
sed -i -e '/^nixbld/d' "$target/etc/passwd" "$target/etc/shadow" "$target/etc/group" "$target/etc/gshadow"
members=
n=1
while [ $n -le 32 ]; do
	user "nixbld$n" $((30000 + n)) 30000 /var/empty /usr/sbin/nologin
	members=$members${members:+,}nixbld$n
	n=$((n + 1))
done
group nixbld 30000 "$members"
for u in alice:1001 bob:1002 nix:1003; do
	id=${u#*:} u=${u%:*}
	group "$u" "$id"
	user "$u" "$id" "$id" "/home/$u" /bin/bash
	mkdir -p "$target/home/$u/.ssh"
	chmod 700 "$target/home/$u/.ssh"
	chown -R "$id:$id" "$target/home/$u"
done
mkdir -p "$target/root/.ssh" "$target/run/sshd" "$target/var/empty" "$target/var/log" "$target/etc/nix"
chmod 700 "$target/root/.ssh"
sed -i 's/^root:[^:]*:/root:*:/' "$target/etc/shadow"

version=$(chroot "$target" nix --version)
version=${version##* }
echo "$version" >"$target/etc/nix-version"
umount "$target/proc"
umount "$target/dev/pts" 2>/dev/null || true
say "done: Nix $version"
