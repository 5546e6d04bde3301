#!/bin/sh
# Put our rbd-nbd, and the hook that it runs around snapshots, in the place of Ceph's, or undo that.
#
#   install-drop-in.sh install|uninstall COMMAND
#
# COMMAND is the installed rbd-nbd of ours. `rbd` runs the rbd-nbd that lies beside itself. What is
# there already is kept as FILE.distrib, on Debian by dpkg-divert, so that an upgrade of the package
# does not undo it. With DESTDIR the files go below it, and nothing is diverted.
set -eu
cd "$(dirname "$0")/.."
action=$1 command=$2
root=${DESTDIR:-}

rbd=$(command -v rbd || echo /usr/bin/rbd)
binary=$(dirname "$(readlink -f "$rbd")")/rbd-nbd
hook=/usr/lib/rbd-nbd/rbd-nbd_quiesce
hooks=${hook%/*}

diverting() { [ -z "$root" ] && command -v dpkg-divert >/dev/null; }

set_aside() {
    if diverting; then
        dpkg-divert --quiet --local --rename --divert "$1.distrib" --add "$1"
    elif [ -e "$root$1" ] && [ ! -e "$root$1.distrib" ]; then
        mv "$root$1" "$root$1.distrib"
    fi
}

bring_back() {
    if diverting; then
        dpkg-divert --quiet --local --rename --remove "$1"
    elif [ -e "$root$1.distrib" ]; then
        mv "$root$1.distrib" "$root$1"
    fi
}

is_ours() { [ "$(readlink "$root$1")" = "$2" ]; }

case $action in
install)
    mkdir -p "$root${binary%/*}" "$root$hooks"
    is_ours "$binary" "$command" || set_aside "$binary"
    is_ours "$hook" "$hooks/rbdnbd-quiesce" || set_aside "$hook"
    ln -sfn "$command" "$root$binary"
    install -m 755 contrib/rbd-nbd_quiesce "$root$hooks/rbdnbd-quiesce"
    ln -sfn "$hooks/rbdnbd-quiesce" "$root$hook"
    echo "rbd-nbd is rbdnbd's: $root$binary"
    ;;
uninstall)
    if is_ours "$binary" "$command"; then
        rm "$root$binary"
        bring_back "$binary"
    fi
    if is_ours "$hook" "$hooks/rbdnbd-quiesce"; then
        rm "$root$hook" "$root$hooks/rbdnbd-quiesce"
        bring_back "$hook"
    fi
    [ ! -d "$root$hooks" ] || rmdir --ignore-fail-on-non-empty "$root$hooks"
    ;;
*)
    echo "install-drop-in: install or uninstall?" >&2
    exit 1
    ;;
esac
