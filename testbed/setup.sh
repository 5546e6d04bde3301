#!/bin/sh
# Install what `make demo`, `make test`, `make fuzz` or `make bench` needs on a Debian machine: packages, and a virtual
# environment in .venv that sees the distribution's rados and rbd. Does nothing that is done.
#
#   setup.sh demo|test|fuzz|bench
set -eu
cd "$(dirname "$0")/.."

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2 && exit 1; }

demo_packages="python3 python3-venv python3-rados python3-rbd
    ceph-common ceph-mon ceph-osd iproute2 e2fsprogs
    qemu-system-x86 busybox-static kmod util-linux"
test_packages="$demo_packages
    file fio libnbd-bin python3-libnbd nbdkit qemu-utils nbd-client nbd-server
    xfsprogs fdisk debootstrap systemd udev procps rbd-nbd"
fuzz_packages="python3 python3-venv"
bench_packages="$demo_packages gcc libc6-dev fio qemu-utils qemu-block-extra rbd-nbd"

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

install_packages() {
    missing=""
    for package; do installed "$package" || missing="$missing $package"; done
    [ -n "$missing" ] || return 0
    [ "$(id -u)" = 0 ] || die "root is needed to install:$missing"
    say "installing$missing (a minute or less)"
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086
    if ! { apt-get update && apt-get install -y --no-install-recommends $missing; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        die "the packages could not be installed"
    fi
    rm -f "$log"
}

# The distribution's Python, because python3-rados and python3-rbd fit no other.
make_venv() { # GROUP...
    for stamp in ".venv/made-for $*"*; do # one with more groups will do
        [ "$stamp" -nt pyproject.toml ] && return 0
    done
    say "making the virtual environment .venv"
    /usr/bin/python3 -m venv --clear --system-site-packages .venv
    .venv/bin/pip install --quiet --disable-pip-version-check --upgrade pip
    groups=""
    for group; do groups="$groups --group $group"; done
    # shellcheck disable=SC2086
    .venv/bin/pip install --quiet --editable . $groups
    touch ".venv/made-for $*"
}

command -v dpkg-query >/dev/null || die "this set-up knows Debian only; see docs/testing.md"
case "${1-}" in
demo)
    # shellcheck disable=SC2086
    install_packages $demo_packages
    make_venv test lint
    ;;
test)
    docker info >/dev/null 2>&1 || test_packages="$test_packages docker.io iptables"
    # shellcheck disable=SC2086
    install_packages $test_packages
    make_venv test lint
    ;;
fuzz)
    # shellcheck disable=SC2086
    install_packages $fuzz_packages
    make_venv test lint fuzz
    ;;
bench)
    # shellcheck disable=SC2086
    install_packages $bench_packages
    make_venv test lint bench
    ;;
*) die "usage: setup.sh demo|test|fuzz|bench" ;;
esac
