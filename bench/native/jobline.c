/* The line that asks for a job: "key=value ...".
 *
 * Keys of a line, numbers unless said otherwise:
 *   bs      bytes of a request, a multiple of 512
 *   depth   requests in flight, over all connections
 *   read    per cent of them that read; the others write
 *   random  1: anywhere; 0: one after the other, going on where the last such job stopped
 *   span    go no further than so many bytes from the image's beginning
 *   seconds, warmup   how long to measure, and how long to run before that
 *   count   measure so many requests instead
 *   sync    "flush": each write is followed by a FLUSH and counts when that is answered; "durable": the same, or
 *           one write with FUA where that is offered, as the kernel does for O_DSYNC
 *   verify  1: compare every byte that is read
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nbdload.h"

#define MAX_BYTES (4u << 20)

struct job job_of(char *line, const struct target *target) {
    double bs = 4096, depth = 1, read = 100, random = 1, verify = 0, count = 0, span = 0;
    struct job job = {.seconds = 1};
    const struct {
        const char *name;
        double *value;
    } keys[] = {{"bs", &bs},       {"depth", &depth}, {"read", &read},           {"random", &random},  {"verify", &verify},
                {"count", &count}, {"span", &span},   {"seconds", &job.seconds}, {"warmup", &job.warmup}};
    const size_t all = sizeof keys / sizeof *keys;
    for (char *rest = NULL, *word = strtok_r(line, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
        size_t key = 0, length = strcspn(word, "=");
        while (key < all && (strncmp(word, keys[key].name, length) || keys[key].name[length]))
            key++;
        if (key < all && word[length])
            *keys[key].value = strtod(word + length + 1, NULL);
        else if (!strncmp(word, "sync=", 5))
            snprintf(job.sync, sizeof job.sync, "%s", word + 5);
        else
            die("a job does not know: %s", word);
    }
    job.bs = (unsigned)bs, job.depth = (unsigned)depth, job.read = (unsigned)read, job.random = (unsigned)random;
    job.verify = (unsigned)verify, job.count = (uint64_t)count, job.span = (uint64_t)span;
    if (!job.bs || job.bs % SECTOR || job.bs > MAX_BYTES || job.bs > target->size || !job.depth || job.depth > MAX_DEPTH ||
        (job.span && (job.span < job.bs || job.span > target->size)))
        die("no such job: bs=%u depth=%u on %llu bytes", job.bs, job.depth, (unsigned long long)target->size);
    if (*job.sync && !(target->flags & NBD_FLAG_SEND_FLUSH))
        die("the server offers no flush");
    return job;
}
