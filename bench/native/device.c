/* The kernel's side of /dev/nbdN, as far as a gateway asks for it; fakedev.h says how it asks.
 *
 * It answers the ioctls of linux/nbd.h as nbd_ioctl does, writes pid and size where sysfs has them, and has one
 * device. A block device's flush or new partition table is nothing here, because nothing is cached.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "fakedev.h"
#include "nbdload.h"

enum {
    NBD_SET_SOCK = 0xab00,
    NBD_SET_BLKSIZE,
    NBD_SET_SIZE,
    NBD_DO_IT,
    NBD_CLEAR_SOCK,
    NBD_SET_SIZE_BLOCKS = 0xab07,
    NBD_DISCONNECT,
    NBD_SET_TIMEOUT,
    NBD_SET_FLAGS,
    BLKSSZGET = 0x1268,
};
#define BLKGETSIZE64 0x80081272u

static void sysfs_path(const struct device *device, const char *name, char *path, size_t room) {
    snprintf(path, room, "%s/sys/block/nbd%d/%s", device->directory, device->index, name);
}

/* Write a number to a file of the device at once, as sysfs would show it. */
static void publish(const struct device *device, const char *name, unsigned long long value) {
    char path[512], fresh[512];
    sysfs_path(device, name, path, sizeof path);
    sysfs_path(device, ".fresh", fresh, sizeof fresh);
    FILE *file = fopen(fresh, "w");
    if (!file || fprintf(file, "%llu\n", value) < 0 || fclose(file) || rename(fresh, path))
        die("cannot write %s: %s", path, strerror(errno));
}

void device_listen(struct device *device) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int length = snprintf(address.sun_path, sizeof address.sun_path, "%s/ctl/nbd%d", device->directory, device->index);
    if (length >= (int)sizeof address.sun_path)
        die("the path is too long for a socket: %s", device->directory);
    unlink(address.sun_path);
    device->block_size = 1024; /* the driver's own, until NBD_SET_BLKSIZE */
    device->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (bind(device->listener, (struct sockaddr *)&address, sizeof address) || listen(device->listener, 16))
        die("cannot listen at %s: %s", address.sun_path, strerror(errno));
}

static void reply(int to, int error, uint64_t value) {
    struct answer answer = {error, value};
    send(to, &answer, sizeof answer, MSG_NOSIGNAL);
    close(to);
}

void device_release(struct device *device) {
    struct target *target = device->target;
    char pid[512];
    for (int i = 0; i < target->connections; i++)
        close(target->sockets[i]);
    target->connections = target->live = 0;
    target->size = 0;
    publish(device, "size", 0);
    sysfs_path(device, "pid", pid, sizeof pid);
    unlink(pid);
    if (device->do_it >= 0)
        reply(device->do_it, 0, 0);
    device->do_it = -1;
}

/* Receive a question; `*descriptor` is the one that came with it, or -1. */
static ssize_t hear(int from, struct asked *asked, int *descriptor) {
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec data = {asked, sizeof *asked};
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control.room};
    ssize_t got = recvmsg(from, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *header = got < 0 ? NULL : CMSG_FIRSTHDR(&message);
    *descriptor = -1;
    if (header && header->cmsg_type == SCM_RIGHTS)
        memcpy(descriptor, CMSG_DATA(header), sizeof *descriptor);
    return got;
}

static int take_socket(struct target *target, int descriptor, pid_t pid) {
    if (descriptor < 0)
        return EINVAL;
    if (target->live || target->connections == MAX_CONNECTIONS) {
        close(descriptor);
        return EBUSY;
    }
    target->sockets[target->connections++] = descriptor;
    target->pid = pid;
    return 0;
}

static int start(struct device *device, int asker) {
    struct target *target = device->target;
    if (!target->connections)
        return EINVAL;
    if (target->live)
        return EBUSY;
    publish(device, "pid", (unsigned long long)target->pid);
    device->do_it = asker;
    target->live = 1;
    return 0;
}

static void set_size(struct device *device, uint64_t size) {
    device->target->size = size;
    publish(device, "size", size / SECTOR);
}

void device_answer(struct device *device) {
    struct target *target = device->target;
    struct asked asked;
    struct ucred asker;
    socklen_t length = sizeof asker;
    int descriptor, error = 0, from = accept4(device->listener, NULL, NULL, SOCK_CLOEXEC);
    uint64_t value = 0;
    if (from < 0 || getsockopt(from, SOL_SOCKET, SO_PEERCRED, &asker, &length))
        die("nobody asks: %s", strerror(errno));
    if (hear(from, &asked, &descriptor) != sizeof asked) {
        close(from);
        return;
    }
    switch (asked.request) {
    case NBD_SET_SOCK: error = take_socket(target, descriptor, asker.pid); break;
    case NBD_SET_BLKSIZE: device->block_size = asked.argument; break;
    case NBD_SET_SIZE: set_size(device, asked.argument); break;
    case NBD_SET_SIZE_BLOCKS: set_size(device, asked.argument * device->block_size); break;
    case NBD_SET_FLAGS: target->flags = (unsigned)asked.argument; break;
    case NBD_DO_IT:
        error = start(device, from);
        if (!error)
            return;
        break;
    case NBD_DISCONNECT: disconnect(target); break;
    case NBD_CLEAR_SOCK:
        if (target->connections)
            device_release(device);
        break;
    case BLKGETSIZE64: value = target->size; break;
    case BLKSSZGET: value = device->block_size; break;
    default: break;
    }
    reply(from, error, value);
}
