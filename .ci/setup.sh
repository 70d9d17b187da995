#!/usr/bin/env bash
# Installs what building and testing need, on Debian 12 or 13, as root.
# Idempotent: one line per thing, and nothing is asked of apt when all is there.
set -euo pipefail

release=$(. /etc/os-release && echo "${VERSION_CODENAME:-unknown}")
packages=(gcc libc6-dev nftables iproute2 util-linux qemu-system-x86 libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients libvirt-daemon-system)
missing=()
for package in "${packages[@]}"; do
	version=$(dpkg-query -W -f '${db:Status-Abbrev}${Version}' "$package" 2>/dev/null || true)
	wanted=yes
	# libvirt and QEMU know SEV-SNP from 10.5 and 9.1 on; bookworm's own do not.
	case "$package:$version" in
	libvirt*:"ii "9.* | qemu*:"ii "1:7.*) wanted=no ;;
	esac
	if [[ $version == "ii "* && $wanted == yes ]]; then
		echo "ok       $package ${version#ii }"
	else
		missing+=("$package")
	fi
done
[[ ${#missing[@]} -eq 0 ]] && exit 0
if [[ $EUID -ne 0 ]]; then
	echo "missing: ${missing[*]}; run as root: make setup" >&2
	exit 1
fi

options=()
if [[ $release == bookworm ]]; then
	# A sources file of our own, so that the machine's are left as they are.
	list=/etc/apt/sources.list.d/nodeagent-backports.sources
	if [[ ! -f $list ]]; then
		mirror=$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null | head -n 1 | tr -d ' ' || true)
		printf 'Types: deb\nURIs: %s\nSuites: bookworm-backports\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' \
			"${mirror:-http://deb.debian.org/debian}" >"$list"
	fi
	options=(-t bookworm-backports)
fi
export DEBIAN_FRONTEND=noninteractive
echo "update   package lists"
apt-get -qq update
for package in "${missing[@]}"; do
	echo "install  $package"
done
apt-get -qq -y --no-install-recommends "${options[@]}" install "${missing[@]}" >/dev/null
