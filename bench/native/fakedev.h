/* What nbdshim.so, inside a gateway, and nbdload, in the place of the kernel, say to each other.
 *
 * A directory, $RBDNBD_BENCH_DIR, stands in for /dev and /sys: DIR/dev/nbdN is an empty file, DIR/sys/block/nbdN
 * holds pid, size and queue/. Every ioctl is one connection to the socket DIR/ctl/nbdN (SOCK_SEQPACKET): one `asked`
 * there, with the socket of NBD_SET_SOCK beside it (SCM_RIGHTS), one `answer` back. That of NBD_DO_IT comes when the
 * device is released.
 */
#ifndef FAKEDEV_H
#define FAKEDEV_H

#include <stdint.h>

#define DIRECTORY_VARIABLE "RBDNBD_BENCH_DIR"

struct asked {
    uint64_t request;
    uint64_t argument;
};

struct answer {
    int32_t error;
    uint64_t value;
};

#endif
