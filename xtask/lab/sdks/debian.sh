#!/usr/bin/env bash
# Lays out packages of a Debian release, with all that they need, in a folder to chroot into: debian.sh FOLDER RELEASE
# PACKAGE... Installs nothing on the machine. The versions of the packages are in the file `versions` of that folder.
set -euo pipefail
. "$(dirname "$0")"/../../debian/apt.sh

folder=$1 release=$2
shift 2
work=$folder.building
rm -rf "$work"
mkdir -p "$work"/debs
private_apt "$work"/apt "$release"
needed=$(apt -o APT::Install-Recommends=false --simulate install "$@" | awk '$1 == "Inst" { print $2 }')
cd "$work"/debs
# One word a package.
# shellcheck disable=SC2086
unpack "$work"/debian $needed
for package in "$@"; do
    printf '%s %s\n' "$package" "$(dpkg-deb -f "$package"_*.deb Version)"
done >"$work"/debian/versions
# What the packages' own scripts would make.
mkdir -p "$work"/debian/{dev,mnt,proc,root,srv,tmp}
ln -sf bash "$work"/debian/bin/sh
echo 127.0.0.1 localhost >"$work"/debian/etc/hosts
rm -rf "$folder"
mv "$work"/debian "$folder"
rm -rf "$work"
