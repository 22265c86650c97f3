#!/usr/bin/env bash
# Makes a node for user-mode Linux in the folder that is named: `disk`, Debian 13 with systemd and containerd, and `kernel`,
# a root that has little more than the kernel. Installs nothing; takes some minutes and 1.5 GB meanwhile.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
. "$here"/../debian/apt.sh

folder=$1
work=$folder.building
root=$work/root
[ "$(id -u)" = 0 ] || { echo "root is needed to lay a system out" >&2; exit 1; }

rm -rf "$work"
mkdir -p "$work"/debs "$work"/node/kernel/{dev,lib64,mnt,proc,run,tmp,usr/bin}
private_apt "$work"/apt bookworm
(cd "$work"/debs && unpack "$work"/debian mmdebstrap)
mirror=$(awk '$1 == "deb" { print $3 }' "$work"/apt/sources.list)
"$work"/debian/usr/bin/mmdebstrap --mode=root --variant=apt --format=directory \
    --include=systemd,systemd-sysv,dbus,udev,containerd,runc,containernetworking-plugins,iproute2,kmod,busybox-static \
    --include=user-mode-linux,ca-certificates trixie "$root" "$mirror"

# Its C library is newer than the machine's may be.
cp "$root"/usr/bin/linux.uml "$work"/node/kernel/usr/bin/
for library in $(chroot "$root" ldd /usr/bin/linux.uml | grep -o '/[^ ]*'); do
    mkdir -p "$work"/node/kernel"${library%/*}"
    cp -L "$root$library" "$work"/node/kernel"$library"
done

cp -r "$here"/root/. "$root"
version=$(ls "$root"/usr/lib/uml/modules)
mkdir -p "$root"/usr/lib/modules "$root"/lab "$root"/etc/cni/net.d
ln -s ../uml/modules/"$version" "$root"/usr/lib/modules/"$version"
echo "none /lab hostfs hostfs=/run/lab 0 0" >"$root"/etc/fstab
echo lab-node >"$root"/etc/hostname
: >"$root"/etc/machine-id
systemctl --quiet --root "$root" enable lab kubelet containerd systemd-networkd
systemctl --quiet --root "$root" mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer \
    e2scrub_all.timer systemd-logind.service getty@tty1.service modprobe@drm.service
rm -rf "$root"/var/cache/apt/*.bin "$root"/var/lib/apt/lists/*

truncate -s 4G "$work"/node/disk
mkfs.ext4 -q -F -d "$root" "$work"/node/disk
mv "$work"/node "$folder"
rm -rf "$work"
