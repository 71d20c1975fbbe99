#!/bin/sh
# The first process of a host, already in namespaces of its own (mount, pid,
# uts, ipc, network): makes the host's root and becomes its init.
#
#   host.sh BASE DIR NAME INIT [FROM TO]...
#
# BASE is the base root, DIR the host's directory, INIT the shell text that runs
# in the finished root, FROM a directory or file of this machine to show read-only
# at TO.
set -eu
base=$1 dir=$2 name=$3 init=$4
shift 4
PATH=/usr/sbin:/usr/bin:/sbin:/bin

mount --make-rprivate /
mount -t overlay -o "lowerdir=$base,upperdir=$dir/upper,workdir=$dir/work" overlay "$dir/root"
cd "$dir/root"

# The store is on the file system itself: it is no overlay on a real machine.
mkdir -p nix
mount --bind "$dir/nix" nix

mount -t proc -o nosuid,nodev,noexec proc proc
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs run
mount -t tmpfs -o mode=755,nosuid tmpfs dev
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr
for node in null:3 zero:5 full:7 random:8 urandom:9; do
	mknod -m 666 "dev/${node%:*}" c 1 "${node#*:}"
done
mknod -m 666 dev/tty c 5 0

while [ $# -gt 1 ]; do
	if [ -d "$1" ]; then
		mkdir -p ".$2"
	else
		mkdir -p ".${2%/*}"
		: >>".$2"
	fi
	mount --bind "$1" ".$2"
	mount -o remount,bind,ro ".$2"
	shift 2
done
echo "$name" >/proc/sys/kernel/hostname

# pivot_root, not chroot: the kernel refuses user namespaces to processes in a
# chroot, and Nix would not find its root in the mount namespace.
pivot_root . mnt
cd /
umount -l /mnt
exec /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
	/bin/sh -c "$init" init
