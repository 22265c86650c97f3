#!/usr/bin/env bash
# Lays out, in the folder that is named, Go and the source of Kubernetes' API server library: from Debian's unstable
# release, whose are the newest. Installs nothing; a download of 150 MB.
set -euo pipefail
. "$(dirname "$0")"/../debian/apt.sh

folder=$1
work=$folder.building
rm -rf "$work"
mkdir -p "$work"/debs
private_apt "$work"/apt unstable
# What these need, but for what is no Go: the compiler's own dependencies are for cgo.
packages=$(apt -o APT::Install-Recommends=false --simulate install golang-go golang-k8s-apiserver-dev |
    awk '$1 == "Inst" && $2 ~ /^golang-/ { print $2 }')
cd "$work"/debs
# One word a package.
# shellcheck disable=SC2086
unpack "$work"/debian $packages
rm -rf "$folder"
mv "$work"/debian "$folder"
rm -rf "$work"
