#!/bin/sh
# Install rbdnbd into an environment of its own and link the command; for `make install`.
#
#   install.sh LIB BIN
set -eu
cd "$(dirname "$0")/.."
lib=$1 bin=$2

die() { echo "install: $*" >&2 && exit 1; }

# rados and rbd come with Ceph and fit the distribution's own Python only.
/usr/bin/python3 -c 'import rados, rbd' 2>/dev/null ||
    die "install python3-rados and python3-rbd for /usr/bin/python3 first (they come with Ceph)"
/usr/bin/python3 -c 'import ensurepip' 2>/dev/null || die "install python3-venv first"
mkdir -p "$bin"
/usr/bin/python3 -m venv --clear --system-site-packages "$lib"
"$lib/bin/pip" install --quiet --disable-pip-version-check .
ln -sf "$lib/bin/rbdnbd" "$bin/rbdnbd"
echo "installed $("$bin/rbdnbd" --version) as $bin/rbdnbd"
