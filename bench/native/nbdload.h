/* nbdload's parts: a target (device.c: the fake kernel; client.c: a client of a server) and jobs on it (job.c). */
#ifndef NBDLOAD_H
#define NBDLOAD_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define MAX_CONNECTIONS 16
#define SECTOR 512

/* doc/proto.md of the NBD project. */
#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698u
enum { NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_DISC, NBD_CMD_FLUSH };
enum { NBD_CMD_FLAG_FUA = 1 };
enum { NBD_FLAG_SEND_FLUSH = 4, NBD_FLAG_SEND_FUA = 8, NBD_FLAG_CAN_MULTI_CONN = 256 };

struct __attribute__((packed)) nbd_request {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t length;
};

struct __attribute__((packed)) nbd_simple_reply {
    uint32_t magic, error;
    uint64_t cookie;
};

/* What is served: sockets in the transmission phase, and the process that serves them. */
struct target {
    int sockets[MAX_CONNECTIONS];
    int connections;
    uint64_t size;
    unsigned flags;
    pid_t pid;
    int live;
};

/* The fake kernel's device; `listener` is readable when somebody asks something. */
struct device {
    struct target *target;
    const char *directory;
    int index;
    int listener;
    int do_it; /* the connection whose answer is the end of NBD_DO_IT, or -1 */
    uint64_t block_size;
};

void device_listen(struct device *device);
void device_answer(struct device *device); /* one question */
void device_release(struct device *device); /* the server has closed its end */

void client_connect(struct target *target, const char *path, const char *export_name, int connections);

void disconnect(struct target *target); /* say NBD_CMD_DISC */

#define MAX_DEPTH 512

/* What a line asks for; jobline.c says what each of these is. */
struct job {
    unsigned bs, depth, read, random, verify;
    double seconds, warmup;
    uint64_t count, span;
    char sync[16];
};

struct job job_of(char *line, const struct target *target);

/* Run the job of one line, and print its figures as one line of JSON. */
void run_job(struct target *target, char *line);

uint64_t scramble(uint64_t number);
void content_prepare(unsigned char *data, unsigned length);
void content_stamp(unsigned char *data, uint64_t offset, unsigned length);
void content_check(const unsigned char *data, uint64_t offset, unsigned length, int whole);

struct histogram {
    uint64_t count, buckets[64 << 7];
};

void histogram_add(struct histogram *histogram, uint64_t value);
double histogram_percentile(const struct histogram *histogram, double part);

void send_whole(int fd, const void *data, size_t length);
void receive_whole(int fd, void *data, size_t length);
double now(void);                  /* seconds, monotonic */
double processor_seconds(pid_t);   /* of all threads, also of those that have ended */
long status_field(pid_t, const char *); /* a number in /proc/PID/status */
void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

#endif
