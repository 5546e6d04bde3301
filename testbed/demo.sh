#!/bin/bash
# The steps of `make demo`, as a user would type them: the file is its own transcript. Needs root, a
# kernel with nbd, and CEPH_CONF. testbed/demo.py runs it, on this host or in a VM.
set -eu

work=$(mktemp -d /tmp/rbdnbd-demo-XXXXXX)
cd "$work"
mkdir mnt

tidy() { # after the last step there is nothing to do but the directory
    mountpoint -q mnt && umount mnt
    rbdnbd unmap rbd/demo
    rbd rm --no-progress rbd/demo
    rm -rf "$work"
}
trap 'status=$?; set +e; tidy >/dev/null 2>&1; exit $status' EXIT

step() { # WHAT COMMAND
    printf '\n# %s\n$ %s\n' "$1" "$2"
    eval "$2"
}

step "An image of 256 MiB..." \
    'rbd create rbd/demo --size 256M'
step "... mapped, is a block device." \
    'rbdnbd map rbd/demo | tee device'
device=$(cat device)
step "A filesystem on it, mounted." \
    "mkfs.ext4 -q $device && mount $device mnt"
step "32 MiB of noise, and its checksum." \
    'dd if=/dev/urandom of=mnt/noise bs=1M count=32 status=none && sha256sum mnt/noise | tee written'
step "What is mapped on this host." \
    'rbdnbd list-mapped'
step "A mounted device is not taken away." \
    "rbdnbd unmap $device || echo \"status \$?\""
step "Unmounted, it is." \
    "umount mnt && rbdnbd unmap $device"
step "What the cluster holds, read without a block device, has the same checksum." \
    'rbd export --no-progress rbd/demo export.raw && debugfs -R "cat noise" export.raw 2>/dev/null | sha256sum'
[ "$(debugfs -R 'cat noise' export.raw 2>/dev/null | sha256sum | cut -c-64)" = "$(cut -c-64 written)" ]
step "So has the file, mapped again." \
    'mount -o ro $(rbdnbd map --read-only rbd/demo) mnt && sha256sum --check written'
step "What the mapping has done." \
    'rbdnbd stats'
step "Everything is put away, by the image's name." \
    'umount mnt && rbdnbd unmap rbd/demo && rbd rm --no-progress rbd/demo && rbdnbd list-mapped'
