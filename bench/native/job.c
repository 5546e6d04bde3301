/* A job: keep a number of requests in flight for a time, and measure.
 *
 * Of every read the first and the last sector are looked at (content.c). Every reply must be a simple reply to a
 * request in flight, without an error.
 *
 * The processor time is that of the process that serves. A latency is the time from the moment before the request is
 * sent until its reply is there as a whole, in a histogram whose buckets are 0.8 % wide.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>

#include "nbdload.h"

#define RECEIVE_BYTES 65536
#define STALL_SECONDS 60

struct slot {
    uint64_t offset, began; /* bytes, nanoseconds */
    uint32_t turn;          /* tells a late or doubled reply apart */
    uint16_t type, flags;
    int waiting; /* for a reply */
    unsigned char *data;
};

struct connection {
    int fd;
    unsigned queue[MAX_DEPTH], head, queued; /* slots to send, and how much of the first is sent */
    size_t sent;
    unsigned char buffer[RECEIVE_BYTES]; /* received and not yet looked at */
    size_t begin, end;
    int slot; /* whose data is coming, or -1 */
    size_t missing;
};

static struct job job;
static struct slot slots[MAX_DEPTH];
static struct connection connections[MAX_CONNECTIONS];
static struct target *target;
static uint64_t random_state, cursor, in_flight, measured;
static struct histogram latencies;
static int measuring, stopping;
static double measure_from, measure_until, cpu_from, cpu_until;

static uint64_t nanoseconds(void) { return (uint64_t)(now() * 1e9); }

static uint64_t chance(void) { return scramble(random_state++); }

static void enqueue(unsigned number) {
    struct connection *connection = &connections[number % (unsigned)target->connections];
    connection->queue[(connection->head + connection->queued++) % MAX_DEPTH] = number;
    slots[number].waiting = 1;
    slots[number].turn++;
}

static void submit(unsigned number) {
    struct slot *slot = &slots[number];
    uint64_t blocks = (job.span ? job.span : target->size) / job.bs;
    slot->offset = (job.random ? chance() % blocks : cursor++ % blocks) * job.bs;
    slot->type = chance() % 100 < job.read ? NBD_CMD_READ : NBD_CMD_WRITE;
    int fua = !strcmp(job.sync, "durable") && target->flags & NBD_FLAG_SEND_FUA;
    slot->flags = slot->type == NBD_CMD_WRITE && fua ? NBD_CMD_FLAG_FUA : 0;
    if (slot->type == NBD_CMD_WRITE)
        content_stamp(slot->data, slot->offset, job.bs);
    slot->began = nanoseconds();
    in_flight++;
    enqueue(number);
}

/* Send what the socket takes; one sendmsg a request, as the kernel does. */
static void send_queued(struct connection *connection) {
    while (connection->queued) {
        unsigned number = connection->queue[connection->head];
        struct slot *slot = &slots[number];
        struct nbd_request request = {
            .magic = htobe32(NBD_REQUEST_MAGIC),
            .flags = htobe16(slot->flags),
            .type = htobe16(slot->type),
            .cookie = (uint64_t)slot->turn << 32 | number,
            .offset = htobe64(slot->type == NBD_CMD_FLUSH ? 0 : slot->offset),
            .length = htobe32(slot->type == NBD_CMD_FLUSH ? 0 : job.bs),
        };
        size_t payload = slot->type == NBD_CMD_WRITE ? job.bs : 0, total = sizeof request + payload;
        size_t head = connection->sent < sizeof request ? connection->sent : sizeof request;
        struct iovec parts[2] = {{(char *)&request + head, sizeof request - head},
                                 {slot->data + (connection->sent - head), payload - (connection->sent - head)}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
        ssize_t sent = sendmsg(connection->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN)
            return;
        if (sent < 0)
            die("the server does not take what it is sent: %s", strerror(errno));
        connection->sent += (size_t)sent;
        if (connection->sent < total)
            continue;
        connection->sent = 0;
        connection->head = (connection->head + 1) % MAX_DEPTH;
        connection->queued--;
    }
}

/* Begin and end the measurement when it is time, as of `when` nanoseconds. */
static void look_at_clock(uint64_t when) {
    double at = (double)when * 1e-9;
    if (!measuring && at >= measure_from) {
        measuring = 1;
        measure_from = at;
        measure_until = job.count ? 1e300 : at + job.seconds;
        cpu_from = processor_seconds(target->pid);
    } else if (measuring && !stopping && (at >= measure_until || (job.count && measured >= job.count))) {
        stopping = 1;
        measure_until = at;
        cpu_until = processor_seconds(target->pid);
    }
}

static void complete(unsigned number) {
    struct slot *slot = &slots[number];
    if (slot->type == NBD_CMD_READ)
        content_check(slot->data, slot->offset, job.bs, job.verify);
    if (slot->type == NBD_CMD_WRITE && *job.sync && !slot->flags) {
        slot->type = NBD_CMD_FLUSH;
        enqueue(number);
        return;
    }
    uint64_t when = nanoseconds();
    in_flight--;
    if (measuring && !stopping) {
        measured++;
        histogram_add(&latencies, when - slot->began);
    }
    look_at_clock(when);
    if (!stopping)
        submit(number);
}

static void take_reply(struct connection *connection, const struct nbd_simple_reply *reply) {
    uint32_t number = (uint32_t)reply->cookie;
    if (be32toh(reply->magic) != NBD_SIMPLE_REPLY_MAGIC)
        die("a reply's magic is 0x%08x", be32toh(reply->magic));
    if (number >= job.depth || !slots[number].waiting || slots[number].turn != reply->cookie >> 32)
        die("a reply's cookie is of no request in flight");
    if (reply->error)
        die("a reply says error %u", be32toh(reply->error));
    slots[number].waiting = 0;
    connection->slot = (int)number;
    connection->missing = slots[number].type == NBD_CMD_READ ? job.bs : 0;
}

/* Look at what is in the buffer, reply by reply. */
static void parse(struct connection *connection) {
    for (;;) {
        size_t there = connection->end - connection->begin;
        if (connection->slot < 0) {
            struct nbd_simple_reply reply;
            if (there < sizeof reply)
                return;
            memcpy(&reply, connection->buffer + connection->begin, sizeof reply);
            connection->begin += sizeof reply;
            take_reply(connection, &reply);
            continue;
        }
        size_t part = there < connection->missing ? there : connection->missing;
        memcpy(slots[connection->slot].data + job.bs - connection->missing, connection->buffer + connection->begin, part);
        connection->begin += part;
        connection->missing -= part;
        if (connection->missing)
            return;
        unsigned number = (unsigned)connection->slot;
        connection->slot = -1;
        complete(number);
    }
}

static void stalled(void) {
    die("no reply within %d s, with %llu requests in flight", STALL_SECONDS, (unsigned long long)in_flight);
}

/* Receive once: the data that is missing where it belongs, and what comes behind it into the buffer. */
static void receive(struct connection *connection, int flags) {
    memmove(connection->buffer, connection->buffer + connection->begin, connection->end - connection->begin);
    connection->end -= connection->begin;
    connection->begin = 0;
    size_t direct = connection->slot < 0 ? 0 : connection->missing;
    unsigned char *place = direct ? slots[connection->slot].data + job.bs - direct : NULL;
    struct iovec parts[2] = {{place, direct},
                             {connection->buffer + connection->end, sizeof connection->buffer - connection->end}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t got = recvmsg(connection->fd, &message, flags);
    if (got < 0 && errno == EAGAIN && flags & MSG_DONTWAIT)
        return;
    if (got < 0 && errno == EAGAIN)
        stalled();
    if (got <= 0)
        die("the server hung up with %llu requests in flight", (unsigned long long)in_flight);
    size_t placed = (size_t)got < direct ? (size_t)got : direct;
    connection->missing -= placed;
    connection->end += (size_t)got - placed;
    parse(connection);
}

/* Send what can be sent and receive once: one connection with nothing to send is simply read. */
static void turn(void) {
    struct pollfd watched[MAX_CONNECTIONS];
    int some = target->connections;
    for (int i = 0; i < some; i++)
        send_queued(&connections[i]);
    if (some == 1 && !connections[0].queued) {
        receive(&connections[0], 0);
        return;
    }
    for (int i = 0; i < some; i++)
        watched[i] = (struct pollfd){connections[i].fd, connections[i].queued ? POLLIN | POLLOUT : POLLIN, 0};
    if (poll(watched, (nfds_t)some, STALL_SECONDS * 1000) <= 0)
        stalled();
    for (int i = 0; i < some; i++)
        if (watched[i].revents & (POLLIN | POLLHUP | POLLERR))
            receive(&connections[i], MSG_DONTWAIT);
}

static void prepare(void) {
    for (unsigned i = 0; i < job.depth; i++) {
        if (!(slots[i].data = realloc(slots[i].data, job.bs)))
            die("no memory");
        content_prepare(slots[i].data, job.bs);
    }
    for (int i = 0; i < target->connections; i++) {
        struct connection *connection = &connections[i];
        struct timeval patience = {.tv_sec = STALL_SECONDS};
        connection->fd = target->sockets[i];
        setsockopt(connection->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        connection->queued = connection->head = 0;
        connection->sent = connection->begin = connection->end = 0;
        connection->slot = -1;
    }
    memset(&latencies, 0, sizeof latencies);
    in_flight = measured = 0;
    measuring = stopping = 0;
    measure_from = now() + job.warmup;
}

/* Have what is still in the server's cache written, so that it does not burden what is measured next. */
static void flush(void) {
    slots[0].type = NBD_CMD_FLUSH;
    slots[0].flags = 0;
    in_flight++;
    enqueue(0);
    while (in_flight)
        turn();
}

void run_job(struct target *of, char *line) {
    target = of;
    job = job_of(line, target);
    prepare();
    look_at_clock(nanoseconds());
    for (unsigned i = 0; i < job.depth; i++)
        submit(i);
    while (in_flight)
        turn();
    if (job.read < 100 && target->flags & NBD_FLAG_SEND_FLUSH)
        flush();
    double seconds = measure_until - measure_from;
    printf("{\"event\": \"job\", \"requests\": %llu, \"seconds\": %.6f, \"iops\": %.2f, \"p50_us\": %.2f, \"p99_us\": %.2f, "
           "\"cpu_us\": %.3f, \"rss_kib\": %ld, \"threads\": %ld}\n",
           (unsigned long long)measured, seconds, (double)measured / seconds, histogram_percentile(&latencies, 0.5) / 1000, histogram_percentile(&latencies, 0.99) / 1000,
           measured ? (cpu_until - cpu_from) / (double)measured * 1e6 : 0.0, status_field(target->pid, "VmRSS"),
           status_field(target->pid, "Threads"));
    fflush(stdout);
}
