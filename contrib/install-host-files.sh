#!/bin/sh
# Put udev's rule and systemd's unit where the host finds them, or remove them.
#
#   install-host-files.sh install|uninstall PREFIX
#
# With DESTDIR the files go below it and nothing is told. udev and systemd look below /usr/local and
# /usr only: with another PREFIX the files lie there, to be linked by hand.
set -eu
cd "$(dirname "$0")/.."
action=$1 prefix=$2
root=${DESTDIR:-}
rule=$prefix/lib/udev/rules.d/59-rbdnbd.rules
unit=$prefix/lib/systemd/system/rbdnbd@.service
stop=$prefix/lib/rbdnbd/bin/rbdnbd-systemd-stop

put() { # MODE SOURCE TARGET
    mkdir -p "$root${3%/*}"
    sed "s|@PREFIX@|$prefix|g" "$2" >"$root$3"
    chmod "$1" "$root$3"
}

case $action in
install)
    put 644 contrib/udev/59-rbdnbd.rules "$rule"
    put 644 contrib/systemd/rbdnbd@.service "$unit"
    put 755 contrib/systemd/rbdnbd-systemd-stop "$stop"
    ;;
uninstall)
    rm -f "$root$rule" "$root$unit" "$root$stop"
    ;;
*)
    echo "install-host-files: install or uninstall?" >&2
    exit 1
    ;;
esac

[ -z "$root" ] || exit 0
case $prefix in
/usr | /usr/local)
    [ ! -e /run/udev/control ] || udevadm control --reload
    [ ! -d /run/systemd/system ] || systemctl daemon-reload
    ;;
*)
    [ "$action" = uninstall ] || echo "udev and systemd do not look there: link $rule into" \
        "/etc/udev/rules.d, and $unit into /etc/systemd/system"
    ;;
esac
