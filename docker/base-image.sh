#!/bin/bash
# Make the image debian:SUITE-slim available to the Docker engine, also where none can be pulled:
# then it is made with debootstrap (root), from the mirror and with the proxy of this host's apt.
#
#   base-image.sh SUITE        for example bookworm or trixie
set -eu

[ $# -eq 1 ] || { echo "usage: base-image.sh SUITE" >&2 && exit 2; }
readonly suite=$1 image=debian:$1-slim pull_limit=30

if docker image inspect "$image" >/dev/null 2>&1; then
    exit
fi
echo "$image: pulling it"
if timeout "$pull_limit" docker pull --quiet "$image" >/dev/null 2>&1; then
    exit
fi

# shellcheck disable=SC2016 # apt-get itself expands this
mirror=$(apt-get indextargets --format '$(REPO_URI)' \
    'Created-By: Packages' 'Label: Debian' 'Component: main' | grep -m 1 '^http' || true)
: "${mirror:=http://deb.debian.org/debian}"
work=$(mktemp -d /var/tmp/rbdnbd-base-image.XXXXXX)
trap 'rm -rf --one-file-system "$work"' EXIT
echo "$image: cannot be pulled; making it with debootstrap from $mirror (half a minute)"
case $mirror in https:*) include=--include=ca-certificates ;; *) include= ;; esac
# shellcheck disable=SC2086
debootstrap --variant=minbase $include "$suite" "$work/root" "$mirror" >"$work/log" 2>&1 || {
    tail -n 15 "$work/log" >&2
    echo "base-image: debootstrap failed for $suite from $mirror" >&2
    exit 1
}
# What a slim image leaves out, and no fsync for each unpacked file.
cat >"$work/root/etc/dpkg/dpkg.cfg.d/slim" <<END
force-unsafe-io
path-exclude /usr/share/doc/*
path-exclude /usr/share/info/*
path-exclude /usr/share/locale/*
path-exclude /usr/share/man/*
END
apt-config dump | grep -E '^Acquire::(https?::|Check-|Force|Retries)' \
    >"$work/root/etc/apt/apt.conf.d/60host" || true
(cd "$work/root" && rm -rf var/cache/apt/archives/*.deb var/lib/apt/lists/* \
    usr/share/doc/* usr/share/info/* usr/share/locale/* usr/share/man/*)
tar -C "$work/root" -c . | docker import --change 'CMD ["bash"]' - "$image" >/dev/null
