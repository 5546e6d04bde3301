/* The fixed-newstyle handshake of a client (doc/proto.md): option GO, and nothing else. */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "nbdload.h"

#define OPTION_MAGIC 0x49484156454f5054ull /* IHAVEOPT */
#define GREETING_MAGIC 0x4e42444d41474943ull /* NBDMAGIC */
#define OPTION_REPLY_MAGIC 0x3e889045565a9ull
enum { FIXED_NEWSTYLE = 1, NO_ZEROES = 2, OPT_GO = 7, REP_ACK = 1, REP_INFO = 3, INFO_EXPORT = 0 };

struct __attribute__((packed)) greeting {
    uint64_t magic, option_magic;
    uint16_t flags;
};

struct __attribute__((packed)) option {
    uint64_t magic;
    uint32_t option, length;
};

struct __attribute__((packed)) option_reply {
    uint64_t magic;
    uint32_t option, type, length;
};

struct __attribute__((packed)) export_info {
    uint16_t type;
    uint64_t size;
    uint16_t flags;
};

static void ask_for(int fd, const char *export_name) {
    uint32_t name_length = (uint32_t)strlen(export_name), be_length = htobe32(name_length);
    uint16_t no_questions = 0;
    struct option go = {htobe64(OPTION_MAGIC), htobe32(OPT_GO), htobe32(name_length + 6)};
    send_whole(fd, &go, sizeof go);
    send_whole(fd, &be_length, sizeof be_length);
    send_whole(fd, export_name, name_length);
    send_whole(fd, &no_questions, sizeof no_questions);
}

static void handshake(struct target *target, int fd, const char *export_name) {
    struct greeting greeting;
    receive_whole(fd, &greeting, sizeof greeting);
    unsigned offered = be16toh(greeting.flags);
    if (be64toh(greeting.magic) != GREETING_MAGIC || be64toh(greeting.option_magic) != OPTION_MAGIC ||
        !(offered & FIXED_NEWSTYLE))
        die("the server does not speak fixed newstyle");
    uint32_t flags = htobe32(FIXED_NEWSTYLE | (offered & NO_ZEROES));
    send_whole(fd, &flags, sizeof flags);
    ask_for(fd, export_name);
    for (;;) {
        struct option_reply reply;
        char data[4096];
        struct export_info info;
        receive_whole(fd, &reply, sizeof reply);
        uint32_t length = be32toh(reply.length), type = be32toh(reply.type);
        if (be64toh(reply.magic) != OPTION_REPLY_MAGIC || length > sizeof data)
            die("the server's reply to an option makes no sense");
        receive_whole(fd, data, length);
        if (type == REP_ACK)
            return;
        if (type != REP_INFO)
            die("the server refuses the export '%s': %.*s", export_name, (int)length, data);
        memcpy(&info, data, sizeof info);
        if (length == sizeof info && be16toh(info.type) == INFO_EXPORT) {
            target->size = be64toh(info.size);
            target->flags = be16toh(info.flags);
        }
    }
}

void client_connect(struct target *target, const char *path, const char *export_name, int connections) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct ucred server;
    socklen_t length = sizeof server;
    if (strlen(path) >= sizeof address.sun_path || connections < 1 || connections > MAX_CONNECTIONS)
        die("no such target: %s", path);
    strcpy(address.sun_path, path);
    for (int i = 0; i < connections; i++) {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(fd, (struct sockaddr *)&address, sizeof address))
            die("nobody listens at %s: %s", path, strerror(errno));
        if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &server, &length))
            die("the server of %s is unknown: %s", path, strerror(errno));
        handshake(target, fd, export_name);
        target->sockets[target->connections++] = fd;
    }
    if (connections > 1 && !(target->flags & NBD_FLAG_CAN_MULTI_CONN))
        die("the server does not offer several connections");
    target->pid = server.pid;
    target->live = 1;
}
