#!/bin/bash
# A throw-away Ceph cluster: one monitor and one OSD, no manager, which is all that RBD needs.
# The one recipe, for the tests and the demo, on the host and in a container (ceph.Dockerfile).
#
#   one-node-ceph.sh start DIR ADDR [STORE]   return once the pool "rbd" can be used
#   one-node-ceph.sh run DIR ADDR [STORE]     the same, but stay until SIGTERM or the monitor's end
#   one-node-ceph.sh stop DIR                 kill the daemons; DIR stays for whoever wants the logs
#   one-node-ceph.sh stop-osd DIR             a fault: the OSD ends in an orderly way, data kept
#   one-node-ceph.sh start-osd DIR            the OSD comes back with its data
#   one-node-ceph.sh stop-mon DIR             a fault: the monitor is killed
#   one-node-ceph.sh start-mon DIR            the monitor comes back
#
# DIR is new, or an empty directory, and holds everything: ceph.conf, keys, data, logs, pid files.
# ADDR is an address of this machine; the daemons bind to it and advertise it. STORE is "memstore"
# (in memory, at most 4 GiB) or "bluestore" (a sparse 16 GiB file; survives kill -9).
#
# A client needs ceph.conf alone, wherever it is copied to: it names the address and carries
# client.admin's key. Seen with Ceph 16.2 (Debian 12) and 18.2 (Debian 13).
set -eu
unset CEPH_CONF CEPH_ARGS CEPH_KEYRING

readonly limit=60 # seconds for one step; a whole start takes about two
readonly usage="usage: one-node-ceph.sh start|run|stop|stop-osd|start-osd|stop-mon|start-mon DIR [ADDR [STORE]]"
# The monitor itself would try again for 15 s before it says so.
readonly try_to_listen='import socket, sys; socket.create_server((sys.argv[1], 3300)).close()'
launched= # the daemons that this process is the parent of
client=   # the process id of the client command under way

say() { echo "one-node-ceph: $*"; }
die() { echo "one-node-ceph: $*" >&2 && exit 1; }
uuid() { cat /proc/sys/kernel/random/uuid; }
pid_of() { cat "$dir/$1.pid"; } # NAME

write_conf() { # FSID ADDR STORE
    cat >"$dir/ceph.conf" <<EOF
[global]
fsid = $1
mon_host = [v2:$2:3300]
public_addr = $2
ms_bind_msgr1 = false
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx

[client.admin]
key = $(ceph-authtool "$dir/keyring" --name client.admin --print-key)

[mon]
mon_data = $dir/\$name
mon_cluster_log_file = $dir/cluster.log
mon_data_avail_crit = 1
mon_allow_pool_delete = true
mon_allow_pool_size_one = true
mon_osd_min_down_reporters = 1
auth_allow_insecure_global_id_reclaim = false
osd_pool_default_size = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
# Every change of a map waits this long for company: with the stock second a start takes 7 s.
paxos_propose_interval = 0.05
log_file = $dir/\$name.log
crash_dir = $dir
# No admin socket: its path is limited to 107 bytes, and "ceph tell" does the same.
admin_socket =

[osd]
osd_data = $dir/\$name
osd_objectstore = $3
# An orderly stop saves what memstore holds.
osd_fast_shutdown = false
memstore_device_bytes = $((4 << 30))
bluestore_block_size = $((16 << 30))
log_file = $dir/\$name.log
crash_dir = $dir
admin_socket =
EOF
}

write_keys() {
    ceph-authtool --create-keyring "$dir/keyring" --gen-key --name mon. --cap mon 'allow *'
    ceph-authtool "$dir/keyring" --gen-key --name client.admin \
        --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    mkdir "$dir/osd.0"
    ceph-authtool --create-keyring "$dir/osd.0/keyring" --gen-key --name osd.0 \
        --cap mon 'allow profile osd' --cap osd 'allow *'
    # Known to the monitor from its first moment, osd.0 needs no "ceph auth add".
    ceph-authtool "$dir/keyring" --import-keyring "$dir/osd.0/keyring"
}

# Run a step that makes something on disk; its words matter only when it fails.
make() { # COMMAND...
    "$@" >>"$dir/start.out" 2>&1 || fail "failed: $*"
}

fail() { # SENTENCE
    tail -n 15 "$dir/start.out" >&2
    die "$1"
}

# Start one daemon in a session of its own, so that Ctrl-C is ours alone to handle.
launch() { # NAME
    setsid "ceph-${1%.*}" -f -c "$dir/ceph.conf" -i "${1#*.}" >>"$dir/$1.out" 2>&1 &
    echo $! >"$dir/$1.pid"
    launched="$launched $1"
}

# Wait until the client command or a daemon ends, and take the blame to the daemon if it was one.
# shellcheck disable=SC2046
wait_for_first() { # [CLIENT_PID]
    local ended='' status=0 name
    wait -n -p ended "$@" $(for name in $launched; do pid_of "$name"; done) || status=$?
    for name in $launched; do
        [ "$ended" = "$(pid_of "$name")" ] || continue
        tail -n 15 "$dir/$name.out" >&2
        die "$name ended with status $status; its last words are above, the rest in $dir/$name.log"
    done
    return "$status"
}

# Run a client's command to its end, for as long as the daemons live.
ask() { # COMMAND...
    local status=0
    timeout "$limit" "$@" >>"$dir/start.out" 2>&1 &
    client=$!
    wait_for_first "$client" || status=$?
    client=
    [ "$status" -ne 124 ] || fail "no answer within $limit s: $*"
    [ "$status" -eq 0 ] || fail "failed with status $status: $*"
}

start() { # ADDR STORE
    local began=$SECONDS conf="$dir/ceph.conf" fsid osd_uuid listen
    case $2 in memstore | bluestore) ;; *) die "no such STORE: $2 (memstore or bluestore)" ;; esac
    listen=$(python3 -c "$try_to_listen" "$1" 2>&1) ||
        die "cannot listen at $1:3300: ${listen##*$'\n'}"
    umask 077
    mkdir -p "$dir"
    [ -z "$(ls -A "$dir")" ] || die "$dir is not empty"
    fsid=$(uuid)
    osd_uuid=$(uuid)
    trap kill_all EXIT
    make write_keys
    write_conf "$fsid" "$1" "$2"
    make monmaptool --create --fsid "$fsid" --addv a "[v2:$1:3300]" "$dir/monmap"
    make ceph-mon -c "$conf" --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
    launch mon.a
    ask ceph -c "$conf" osd new "$osd_uuid" 0
    say "the monitor answers at $1"
    make ceph-osd -c "$conf" --mkfs -i 0 --osd-uuid "$osd_uuid"
    launch osd.0
    ask ceph -c "$conf" osd pool create rbd 8
    ask rbd -c "$conf" pool init rbd # its first write waits until the OSD serves the pool
    say "ready after $((SECONDS - began)) s: $conf"
}

# Say whether a daemon has ended: a zombie has, whenever its parent comes round to it, and so has
# one whose number is another process's by now.
gone() { # PID
    ! grep -qs '^Name:[[:space:]]ceph-' "/proc/$1/status" ||
        grep -qs '^State:[[:space:]][XZ]' "/proc/$1/status"
}

# Send SIGNAL to a daemon and return when it has gone.
end() { # SIGNAL NAME
    local pid deadline=$((SECONDS + limit))
    [ -e "$dir/$2.pid" ] || return 0
    pid=$(pid_of "$2")
    if ! gone "$pid" && kill -s "$1" "$pid" 2>/dev/null; then
        wait "$pid" 2>/dev/null || true # a child is reaped without bash's own remark on it
    fi
    until gone "$pid"; do
        [ "$SECONDS" -lt "$deadline" ] || die "$2 (process $pid) still runs $limit s after SIG$1"
        sleep 0.05
    done
    rm "$dir/$2.pid"
}

kill_osd() {
    [ -z "$client" ] || kill "$client" 2>/dev/null || true
    end KILL osd.0
}

kill_all() {
    kill_osd
    end KILL mon.a
}

start_osd() {
    [ ! -e "$dir/osd.0.pid" ] || die "osd.0 was not stopped"
    # The monitor may not have noticed a kill -9; a client that then trusts its map waits 15 s.
    ask ceph -c "$dir/ceph.conf" osd down 0
    trap kill_osd EXIT
    launch osd.0
    ask bash -c "until ceph -c '$dir/ceph.conf' osd tree up | grep -q osd.0; do sleep 0.1; done"
    ask rbd -c "$dir/ceph.conf" pool stats rbd # a read that waits until the OSD serves the pool
    say "osd.0 is back"
}

start_mon() {
    [ ! -e "$dir/mon.a.pid" ] || die "mon.a was not stopped"
    trap 'end KILL mon.a' EXIT
    launch mon.a
    ask ceph -c "$dir/ceph.conf" mon stat
    say "mon.a is back"
}

[ $# -ge 2 ] || die "$usage"
dir=$(realpath -m "$2")
case $1:$# in
start:3 | start:4)
    start "$3" "${4:-memstore}"
    trap - EXIT
    ;;
run:3 | run:4)
    trap 'say stopping; exit 0' TERM INT
    start "$3" "${4:-memstore}"
    launched=mon.a # the OSD may be stopped and started meanwhile
    wait_for_first
    ;;
stop:2) kill_all ;;
stop-osd:2) end TERM osd.0 ;;
start-osd:2)
    start_osd
    trap - EXIT
    ;;
stop-mon:2) end KILL mon.a ;;
start-mon:2)
    start_mon
    trap - EXIT
    ;;
*) die "$usage" ;;
esac
