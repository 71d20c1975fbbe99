# Boots systemd in the namespaces it is run in, on a throw-away copy of this
# host's root: an overlay whose upper layer is in memory. $1 is an empty directory.
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 none sys/fs/cgroup
mount -t tmpfs tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
for d in null zero full random urandom tty; do
	touch dev/$d
	mount --bind /dev/$d dev/$d
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mkdir tmp/old
pivot_root . tmp/old
umount -l /tmp/old
# Nothing of this host's own services.
rm -rf /etc/systemd/system
mkdir /etc/systemd/system
for unit in systemd-udevd systemd-logind systemd-networkd systemd-resolved systemd-timesyncd console-getty getty@tty1; do
	ln -s /dev/null /etc/systemd/system/$unit.service
done
container=test exec /lib/systemd/systemd --log-target=console --unit=multi-user.target </dev/null
