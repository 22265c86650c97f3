#!/bin/sh
# Boots the node that build.sh made in the folder NODE. What it writes to its disk, and what it shares (`lab`), is in the folder
# RUN. Call it in a mount, network and process namespace of its own, with which everything goes.
# Usage: boot.sh NODE RUN [ARGUMENT OF THE KERNEL...]
set -e
root=$1/kernel
mount --make-rprivate /
mount --bind "$1" "$root"/mnt
mount --bind "$2" "$root"/run
mount --rbind /dev "$root"/dev
mount -t proc proc "$root"/proc
shift 2
exec chroot "$root" /usr/bin/linux.uml mem=3G root=/dev/ubda rw ubd0=/run/changes,/mnt/disk con=null con0=null,fd:1 ssl=null \
    uml_dir=/run/ umid=uml quiet systemd.mask=systemd-udev-trigger.service "$@"
