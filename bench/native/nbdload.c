/* nbdload: requests for an NBD server, measured. One process for each mapping, driven by lines on stdin.
 *
 *   nbdload device DIR N                    be the kernel of DIR/dev/nbdN (nbdshim.c), wait for a gateway to attach
 *   nbdload client SOCKET EXPORT [COUNT]    be a client of a server that listens on a unix socket
 *
 * Prints one line of JSON when the target is live, one for each job that a line of stdin asks for (job.c), and one
 * when the target is released. The line "idle" prints what the server holds, "disconnect" says NBD_CMD_DISC, and
 * the end of stdin is the end. Whatever is not as it must be, a reply above all, ends it with a sentence on stderr
 * and status 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <endian.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "nbdload.h"

void die(const char *format, ...) {
    va_list rest;
    va_start(rest, format);
    fputs("nbdload: ", stderr);
    vfprintf(stderr, format, rest);
    fputc('\n', stderr);
    exit(1);
}

double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

double processor_seconds(pid_t pid) {
    clockid_t clock;
    struct timespec t;
    if (clock_getcpuclockid(pid, &clock) || clock_gettime(clock, &t))
        die("process %d has no processor time: has it ended?", (int)pid);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

long status_field(pid_t pid, const char *name) {
    char path[64], line[256];
    long value = -1;
    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    FILE *file = fopen(path, "r");
    while (file && value < 0 && fgets(line, sizeof line, file))
        if (!strncmp(line, name, strlen(name)) && line[strlen(name)] == ':')
            value = strtol(line + strlen(name) + 1, NULL, 10);
    if (file)
        fclose(file);
    if (value < 0)
        die("process %d has no %s: has it ended?", (int)pid, name);
    return value;
}

void send_whole(int fd, const void *data, size_t length) {
    while (length) {
        ssize_t sent = send(fd, data, length, MSG_NOSIGNAL);
        if (sent <= 0)
            die("the server does not take what it is sent: %s", strerror(errno));
        data = (const char *)data + sent;
        length -= (size_t)sent;
    }
}

void receive_whole(int fd, void *data, size_t length) {
    ssize_t got = length ? recv(fd, data, length, MSG_WAITALL) : 0;
    if (got != (ssize_t)length)
        die("the server hung up");
}

void disconnect(struct target *target) {
    struct nbd_request goodbye = {.magic = htobe32(NBD_REQUEST_MAGIC), .type = htobe16(NBD_CMD_DISC)};
    for (int i = 0; i < target->connections; i++)
        send(target->sockets[i], &goodbye, sizeof goodbye, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void say_live(struct target *target) {
    printf("{\"event\": \"live\", \"pid\": %d, \"size\": %llu, \"flags\": %u, \"connections\": %d}\n", (int)target->pid,
           (unsigned long long)target->size, target->flags, target->connections);
    fflush(stdout);
}

static void say_idle(struct target *target) {
    printf("{\"event\": \"idle\", \"rss_kib\": %ld, \"threads\": %ld, \"cpu_seconds\": %.9f}\n",
           status_field(target->pid, "VmRSS"), status_field(target->pid, "Threads"), processor_seconds(target->pid));
    fflush(stdout);
}

static void say_event(const char *event) {
    printf("{\"event\": \"%s\"}\n", event);
    fflush(stdout);
}

static int hung_up(int socket) {
    char one;
    if (recv(socket, &one, 1, MSG_DONTWAIT) > 0)
        die("the server sent a reply that nobody waits for");
    return 1;
}

/* Wait for a question, the server's end, or stdin, and do what the first two ask for. */
static void wait_for_events(struct target *target, struct device *device) {
    struct pollfd watched[2 + MAX_CONNECTIONS] = {{STDIN_FILENO, POLLIN, 0}, {device ? device->listener : -1, POLLIN, 0}};
    int was_live = target->live, connections = was_live ? target->connections : 0;
    for (int i = 0; i < connections; i++)
        watched[2 + i] = (struct pollfd){target->sockets[i], POLLIN, 0};
    if (poll(watched, 2 + (nfds_t)connections, -1) < 0)
        die("poll failed: %s", strerror(errno));
    if (watched[1].revents)
        device_answer(device);
    for (int i = 0; i < connections && target->live; i++)
        if (watched[2 + i].revents && hung_up(target->sockets[i])) {
            target->live = 0;
            if (device)
                device_release(device);
        }
    if (!was_live && target->live)
        say_live(target);
    if (was_live && !target->live)
        say_event("released");
}

/* Do what a line asks for. */
static void obey(struct target *target, char *line) {
    if (!target->live)
        die("nothing is live to do this: %s", line);
    if (!strcmp(line, "idle"))
        say_idle(target);
    else if (!strcmp(line, "disconnect"))
        disconnect(target);
    else
        run_job(target, line);
}

static void take_lines(struct target *target, struct device *device) {
    static char line[1024];
    size_t length = 0;
    for (;;) {
        struct pollfd input = {STDIN_FILENO, POLLIN, 0};
        wait_for_events(target, device);
        if (poll(&input, 1, 0) <= 0)
            continue;
        if (read(STDIN_FILENO, line + length, 1) <= 0)
            return;
        if (line[length] == '\n') {
            line[length] = 0;
            length = 0;
            obey(target, line);
        } else if (++length == sizeof line)
            die("a line is too long");
    }
}

int main(int argc, char **argv) {
    struct target target = {0};
    signal(SIGPIPE, SIG_IGN);
    if (argc == 4 && !strcmp(argv[1], "device")) {
        struct device device = {.target = &target, .directory = argv[2], .index = atoi(argv[3]), .do_it = -1};
        device_listen(&device);
        say_event("listening");
        take_lines(&target, &device);
    } else if ((argc == 4 || argc == 5) && !strcmp(argv[1], "client")) {
        client_connect(&target, argv[2], argv[3], argc == 5 ? atoi(argv[4]) : 1);
        say_live(&target);
        take_lines(&target, NULL);
    } else {
        fputs("usage: nbdload device DIR N | nbdload client SOCKET EXPORT [CONNECTIONS]\n", stderr);
        return 2;
    }
    return 0;
}
