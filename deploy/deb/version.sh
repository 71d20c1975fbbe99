#!/bin/sh
# Prints the Debian version for the program's version, as git describe gives it:
# v1.2 is 1.2, v1.2-3-gabcdef is 1.2+3.gabcdef, and where no tag is, abcdef is
# 0~20260131120000.abcdef, by the commit's date, so that later ones are greater.
set -eu
case $1 in
v[0-9]* | [0-9]*.[0-9]*)
	echo "${1#v}" | sed 's/-/+/; s/-/./g'
	;;
*)
	date=$(git log -1 --format=%cd --date=format:%Y%m%d%H%M%S 2>/dev/null || echo 0)
	echo "0~$date.$1" | sed 's/-/./g'
	;;
esac
