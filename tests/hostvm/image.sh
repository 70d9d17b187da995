#!/usr/bin/env bash
# Makes the image of a provider's host in the folder named as argument: a
# Debian 13 with systemd, libvirt, the newest backported kernel and QEMU.
#
#   tree/      its files; the QEMU that boots it is run from here, too
#   disk.img   the same as an ext4 file system
#   vmlinuz, initrd.img
#   made-by    this script's digest: another script makes another image
#
# Minutes and 2.5 GB the first time, nothing when it is there. Root.
set -euo pipefail
image=$1
made_by=$(sha256sum "$0" | cut -d' ' -f1)
[[ $(cat "$image/made-by" 2>/dev/null) == "$made_by" ]] && exit 0

mirror=$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null | head -n 1 | tr -d ' ' || true)
mirror=${mirror:-http://deb.debian.org/debian}
new=$image.new tree=$image.new/tree
say() { echo "$(printf '%4ds' $SECONDS)  $*"; }
rm -rf "$new"
mkdir -p "$new"

say "Debian 13 from $mirror"
log=$new/log
debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,udev,ca-certificates,kmod,iproute2,nftables,zstd \
	trixie "$tree" "$mirror" >"$log" 2>&1 || { tail -n 20 "$log"; exit 1; }
echo "deb $mirror trixie-backports main" >"$tree/etc/apt/sources.list.d/backports.list"
printf 'MODULES=list\nCOMPRESS=zstd\n' >"$tree/hostvm-initramfs"
printf '#!/bin/sh\nexit 101\n' >"$tree/usr/sbin/policy-rc.d" # nothing is started in here
chmod +x "$tree/usr/sbin/policy-rc.d"

say "kernel, QEMU, libvirt"
# shellcheck disable=SC2016 # the inner shell's
unshare --mount bash -euo pipefail -c '
	mount -t proc proc "$1/proc"
	mount -t devtmpfs dev "$1/dev" 2>/dev/null || mount --bind /dev "$1/dev"
	mount -t devpts devpts "$1/dev/pts" 2>/dev/null || true
	inside() { chroot "$1" env DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin "${@:2}"; }
	inside "$1" apt-get -q update
	inside "$1" apt-get -q -y --no-install-recommends install initramfs-tools
	mv "$1/hostvm-initramfs" "$1/etc/initramfs-tools/conf.d/hostvm"
	printf "virtio_pci\nvirtio_blk\next4\n" >>"$1/etc/initramfs-tools/modules"
	inside "$1" apt-get -q -y --no-install-recommends install libvirt-daemon-system libvirt-clients libvirt-daemon-driver-qemu
	inside "$1" apt-get -q -y --no-install-recommends -t trixie-backports install qemu-system-x86 linux-image-amd64
	inside "$1" apt-get -q clean
' image "$tree" >>"$log" 2>&1 || { tail -n 20 "$log"; exit 1; }
rm "$tree/usr/sbin/policy-rc.d"

say "settings"
echo provider >"$tree/etc/hostname"
printf '127.0.0.1 localhost provider\n' >"$tree/etc/hosts"
printf 'LABEL=root / ext4 defaults 0 1\nLABEL=rig /opt/rig ext4 ro 0 0\n' >"$tree/etc/fstab"
mkdir -p "$tree/opt/rig"
# Drivers that would take the devices before anybody asks.
printf 'blacklist nouveau\nblacklist nova_core\nblacklist snd_hda_intel\n' >"$tree/etc/modprobe.d/hostvm.conf"
cat >"$tree/etc/systemd/system/rig.service" <<'UNIT'
[Unit]
Description=Orders of the test rig
RequiresMountsFor=/opt/rig
[Service]
ExecStart=/opt/rig/hostvm inside
Restart=always
RestartSec=1
OOMScoreAdjust=-1000
[Install]
WantedBy=multi-user.target
UNIT
for unit in rig.service; do
	ln -s "../$unit" "$tree/etc/systemd/system/multi-user.target.wants/$unit"
done
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer logrotate.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer libvirt-guests.service getty@tty1.service; do
	ln -sf /dev/null "$tree/etc/systemd/system/$unit"
done
cp "$tree"/boot/vmlinuz-* "$new/vmlinuz"
cp "$tree"/boot/initrd.img-* "$new/initrd.img"

echo "$made_by" >"$new/made-by"

say "disk"
mke2fs -q -t ext4 -L root -E lazy_itable_init=1 -d "$tree" "$new/disk.img" 4G
rm -rf "$image"
mv "$new" "$image"
say "made $image"
