#!/bin/sh
# Builds the programs twice, in two places and with empty caches, and compares them.
set -eu
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
version=$(git describe --always --dirty 2>/dev/null || echo unknown)
for place in one two/deeper; do
	name=${place%%/*}
	mkdir -p "$tmp/$place"
	tar -c --exclude=./.git --exclude=./bin . | tar -x -C "$tmp/$place"
	GOCACHE=$tmp/cache-$name make -s -C "$tmp/$place" build VERSION="$version" BIN="$tmp/bin-$name"
done
status=0
for program in "$tmp"/bin-one/*; do
	name=${program##*/}
	if cmp "$program" "$tmp/bin-two/$name"; then
		sha256sum "$program" | sed "s|$tmp/bin-one/||"
	else
		status=1
	fi
done
exit $status
