#!/bin/sh
# Makes the Debian package, with dpkg-deb, and prints its path:
#
#   build.sh BIN VERSION
#
# BIN holds the programs, and gets the package. VERSION is the programs', as git
# describe gives it. The environment says who made it (MAINTAINER), for which GOARCH,
# how it is compressed (COMPRESSION) and the time of all its files (SOURCE_DATE_EPOCH),
# so that the same programs make the same bytes.
set -eu
bin=$1 version=$2
here=$(dirname "$0")
export LC_ALL=C
umask 022
tree=$bin/deb
trap 'rm -rf "$tree"' EXIT
trap 'exit 1' HUP INT TERM

case $GOARCH in
386) arch=i386 ;;
arm) arch=armhf ;;
*) arch=$GOARCH ;;
esac
# v1.2 is 1.2, v1.2-3-gabcdef is 1.2+3.gabcdef, and where no tag is, abcdef is
# 0~20260131120000.abcdef, by the commit's time, so that later ones are greater.
case $version in
v[0-9]* | [0-9]*.[0-9]*) version=$(echo "${version#v}" | sed 's/-/+/; s/-/./g') ;;
*) version=0~$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d%H%M%S).$(echo "$version" | sed 's/-/./g') ;;
esac

rm -rf "$tree"
"$here/../install.sh" install "$bin" /usr "$tree"
# In KiB, as dpkg counts, whatever the file system here.
size=$(find "$tree" -type f -printf '%s\n' -o -type d -printf '1\n' | awk '{ kib += int(($1 + 1023) / 1024) } END { print kib }')
mkdir "$tree/DEBIAN"
(cd "$tree" && find usr -type f | sort | xargs md5sum >DEBIAN/md5sums)
{
	printf 'Package: nix-dispatch\nVersion: %s\nArchitecture: %s\nMaintainer: %s\nInstalled-Size: %s\n' \
		"$version" "$arch" "$MAINTAINER" "$size"
	cat "$here/control"
} >"$tree/DEBIAN/control"
for script in postinst prerm postrm; do
	cat "$here/$script" >"$tree/DEBIAN/$script"
	chmod 755 "$tree/DEBIAN/$script"
done
find "$tree" -exec touch -d "@$SOURCE_DATE_EPOCH" {} +
package=$bin/nix-dispatch_${version}_$arch.deb
dpkg-deb --root-owner-group -Z"$COMPRESSION" --build "$tree" "$package" >/dev/null
echo "$package"
