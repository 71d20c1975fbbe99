#!/bin/sh
# Builds the programs, and where dpkg-deb is the Debian package, twice, in two places and
# with empty caches, and compares them.
set -eu
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
version=$(git describe --always --dirty 2>/dev/null || echo unknown)
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || echo 0) # the copies have no history
export SOURCE_DATE_EPOCH
target=build
! command -v dpkg-deb >/dev/null || target=deb
for place in one two/deeper; do
	name=${place%%/*}
	mkdir -p "$tmp/$place"
	tar -c --exclude=./.git --exclude=./bin . | tar -x -C "$tmp/$place"
	GOCACHE=$tmp/cache-$name make -s -C "$tmp/$place" $target VERSION="$version" BIN="$tmp/bin-$name" >/dev/null
	rm -rf "$tmp/cache-$name"
done
status=0
for file in "$tmp"/bin-one/*; do
	name=${file##*/}
	if cmp "$file" "$tmp/bin-two/$name"; then
		sha256sum "$file" | sed "s|$tmp/bin-one/||"
	else
		status=1
	fi
done
exit $status
