#!/usr/bin/env bash
# Installs what building and testing need, on Debian 12 or 13, as root; packages
# named as arguments come on top. Idempotent: one line per thing, and nothing is
# asked of apt when all is there.
set -euo pipefail

if ! command -v go >/dev/null; then
	echo "missing: go in the PATH of $(id -un) (sudo has a PATH of its own); get Go 1.26 from https://go.dev/dl" >&2
	exit 1
fi
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-unknown}")
machine=$release/$(uname -m)
case $machine in
bookworm/x86_64 | trixie/x86_64) ;;
*)
	echo "this machine is $machine; Debian 12 (bookworm) or 13 (trixie) on x86_64 is needed" >&2
	exit 1
	;;
esac
packages=(gcc libc6-dev curl nftables iproute2 util-linux strace softhsm2 qemu-system-x86 libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients libvirt-daemon-system "$@")
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

# The guest's kernel and firmware are fetched and unpacked, never installed.
cd "$(dirname "$0")/.."
debs=.cache/debs
mirror=$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null | head -n 1 | tr -d ' ' || true)
mirror=${mirror:-http://deb.debian.org/debian}

# fetch NAME SUITE PACKAGE-PATTERN: the newest package that matches, through an
# apt of its own that knows one suite and leaves the machine's lists alone.
fetch() {
	local name=$1 suite=$2 pattern=$3 apt
	if [[ -s $debs/$name.deb ]]; then
		echo "ok       $name $(cat "$debs/$name.version" 2>/dev/null || true)"
		return
	fi
	echo "fetch    $name from $suite"
	mkdir -p "$debs"
	apt=$(mktemp -d)
	mkdir -p "$apt"/{lists/partial,archives/partial}
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$apt/sources.list"
	local options=(-o "Dir::State=$apt" -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt" -o "Dir::Etc::sourcelist=$apt/sources.list"
		-o Dir::Etc::sourceparts=- -o Dir::State::status=/dev/null -o APT::Sandbox::User=root)
	apt-get -qq "${options[@]}" update
	local package
	package=$(apt-cache "${options[@]}" pkgnames | grep -E "$pattern" | sort -V | tail -n 1)
	(cd "$apt" && apt-get -qq "${options[@]}" download "$package")
	dpkg-deb -f "$apt"/*.deb Version | sed "s/^/$package /" >"$debs/$name.version"
	mv "$apt"/*.deb "$debs/$name.deb"
	rm -rf "$apt"
}
kernel_suite=trixie
[[ $release == bookworm ]] && kernel_suite=bookworm-backports
fetch kernel "$kernel_suite" '^linux-image-6\.12\.[0-9.]+\+deb1[23](\.[0-9]+)?-cloud-amd64$'
fetch ovmf-amdsev forky '^ovmf-amdsev$'

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
		printf 'Types: deb\nURIs: %s\nSuites: bookworm-backports\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' \
			"$mirror" >"$list"
	fi
	options=(-t bookworm-backports)
fi
# A minimal Debian lacks apt-utils, and debconf warns that it asks nothing early.
export DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes
echo "update   package lists"
apt-get -qq update
for package in "${missing[@]}"; do
	echo "install  $package"
done
apt-get -qq -y --no-install-recommends "${options[@]}" install "${missing[@]}" >/dev/null
