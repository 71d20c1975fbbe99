#!/bin/sh
# Makes the layer that is laid over a suite's base root for hosts with systemd as
# process 1 and Debian's own unit of nix-daemon. Runs as base.sh does.
#
#   systemd.sh SUITE TARGET BASE DEBS
set -eu
suite=$1 target=$2 base=$3 debs=$4
export LC_ALL=C DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin

mount --make-rprivate /
mount -t proc proc /proc
mkdir "$target/upper" "$target/work" "$target/root"
root=$target/root
mount -t overlay -o "lowerdir=$base,upperdir=$target/upper,workdir=$target/work" overlay "$root"
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
mount --bind "$debs" "$root/var/cache/apt/archives"
mount -t proc proc "$root/proc"

echo "$suite: installing systemd"
chroot "$root" apt-get update -qq
chroot "$root" apt-get install -qq -y --no-install-recommends -o Dpkg::Options::=--force-confold \
	systemd systemd-sysv nix-setup-systemd
umount "$root/var/cache/apt/archives" "$root/proc"
rm -f "$root/usr/sbin/policy-rc.d" "$root/var/cache/apt/archives"/*.deb
rm -rf "$root"/var/lib/apt/lists/* "$root"/nix
: >"$root/etc/machine-id"

# Units that a host of the fleet has no use for: it has its network, its sshd and its
# /dev already. Networks and logins are made by the fleet.
for unit in systemd-udevd.service systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udev-trigger.service \
	systemd-logind.service systemd-networkd.service systemd-resolved.service systemd-timesyncd.service \
	console-getty.service getty.target ssh.service ssh.socket sshd.service sshd-keygen.service \
	apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
	systemd-hostnamed.service systemd-modules-load.service systemd-tmpfiles-setup-dev.service \
	dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount; do
	ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
# Debian lets only these use nix-daemon.
sed -i 's/^\(nix-users:.*:\)$/\1alice,bob,nix/' "$root/etc/group" "$root/etc/gshadow"
umount "$root"
mv "$target/upper"/* "$target/"
rm -rf "$target/upper" "$target/work" "$root"
echo "$suite: done: Nix $(cat "$base/etc/nix-version") under systemd"
