/* nbdshim.so: /dev/nbdN for a program on a kernel without the nbd driver (LD_PRELOAD).
 *
 * Paths of the driver lead into $RBDNBD_BENCH_DIR, and an ioctl of a block device or of nbd on a file there becomes a
 * question to nbdload (fakedev.h). All else goes to libc. Data never passes here: the gateway and nbdload talk over
 * the socket that NBD_SET_SOCK handed over.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "fakedev.h"

#define PATH_BYTES 512
#define NBD_GROUP 0xab /* linux/nbd.h */
#define BLK_GROUP 0x12 /* linux/fs.h */
#define NBD_SET_SOCK 0xab00
#define BLKSSZGET 0x1268
#define BLKGETSIZE64 0x80081272

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_ours(const char *path) {
    static const char *const prefixes[] = {"/dev/nbd", "/sys/block/nbd", "/sys/module/nbd"};
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++)
        if (!strncmp(path, prefixes[i], strlen(prefixes[i])))
            return 1;
    return !strcmp(path, "/sys/block");
}

/* Return where `path` leads: into our directory, written to `buffer`, or where it did. */
static const char *led(const char *path, char *buffer) {
    const char *directory = getenv(DIRECTORY_VARIABLE);
    if (!path || !directory || !is_ours(path))
        return path;
    snprintf(buffer, PATH_BYTES, "%s%s", directory, path);
    return buffer;
}

#define OPENER(name)                                                                                                   \
    int name(const char *path, int flags, ...) {                                                                       \
        char buffer[PATH_BYTES];                                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        return REAL(name)(led(path, buffer), flags, mode);                                                             \
    }
#define OPENER_AT(name)                                                                                                \
    int name(int directory, const char *path, int flags, ...) {                                                        \
        char buffer[PATH_BYTES];                                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        return REAL(name)(directory, led(path, buffer), flags, mode);                                                  \
    }
#define WITH_PATH(result, name, type)                                                                                  \
    result name(const char *path, type second) {                                                                       \
        char buffer[PATH_BYTES];                                                                                       \
        return REAL(name)(led(path, buffer), second);                                                                  \
    }

OPENER(open)
OPENER(open64)
OPENER_AT(openat)
OPENER_AT(openat64)
WITH_PATH(FILE *, fopen, const char *)
WITH_PATH(FILE *, fopen64, const char *)
WITH_PATH(int, access, int)
WITH_PATH(int, stat, struct stat *)
WITH_PATH(int, stat64, struct stat64 *)
WITH_PATH(int, lstat, struct stat *)
WITH_PATH(int, lstat64, struct stat64 *)

DIR *opendir(const char *path) {
    char buffer[PATH_BYTES];
    return REAL(opendir)(led(path, buffer));
}

/* Return N if `fd` is DIR/dev/nbdN, else -1. */
static int index_of(int fd) {
    char link[32], path[PATH_BYTES], *end;
    const char *directory = getenv(DIRECTORY_VARIABLE);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!directory || length < 0)
        return -1;
    path[length] = 0;
    size_t before = strlen(directory);
    if (strncmp(path, directory, before) || strncmp(path + before, "/dev/nbd", 8))
        return -1;
    long index = strtol(path + before + 8, &end, 10);
    return *end ? -1 : (int)index;
}

/* Send a question, with a descriptor unless that is -1. */
static ssize_t send_asked(int to, struct asked *asked, int descriptor) {
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec data = {asked, sizeof *asked};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
    if (descriptor >= 0) {
        message.msg_control = control.room;
        message.msg_controllen = sizeof control.room;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
    }
    return sendmsg(to, &message, MSG_NOSIGNAL);
}

static int ask(int index, unsigned long request, unsigned long argument) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct asked asked = {request, argument};
    struct answer answer = {.error = ENXIO};
    snprintf(address.sun_path, sizeof address.sun_path, "%s/ctl/nbd%d", getenv(DIRECTORY_VARIABLE), index);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    if (connect(fd, (struct sockaddr *)&address, sizeof address) ||
        send_asked(fd, &asked, request == NBD_SET_SOCK ? (int)argument : -1) < 0 ||
        recv(fd, &answer, sizeof answer, 0) < 0)
        answer.error = errno;
    close(fd);
    if (answer.error) {
        errno = answer.error;
        return -1;
    }
    if (request == BLKGETSIZE64)
        *(uint64_t *)argument = answer.value;
    else if (request == BLKSSZGET)
        *(int *)argument = (int)answer.value;
    return 0;
}

int ioctl(int fd, unsigned long request, ...) {
    va_list rest;
    va_start(rest, request);
    unsigned long argument = va_arg(rest, unsigned long);
    va_end(rest);
    unsigned group = request >> 8 & 0xff;
    int index = group == NBD_GROUP || group == BLK_GROUP ? index_of(fd) : -1;
    return index < 0 ? REAL(ioctl)(fd, request, argument) : ask(index, request, argument);
}
