/* Latencies by size: every octave has 128 buckets, so that one is at most 0.8 % wide. */
#include "nbdload.h"

#define FINE_BITS 7

static unsigned bucket_of(uint64_t value) {
    if (value >> FINE_BITS == 0)
        return (unsigned)value;
    unsigned octave = 63 - (unsigned)__builtin_clzll(value) - FINE_BITS;
    return (octave + 1) << FINE_BITS | (unsigned)(value >> octave & ((1 << FINE_BITS) - 1));
}

static double middle_of(unsigned bucket) {
    unsigned octave = bucket >> FINE_BITS;
    if (!octave)
        return bucket;
    uint64_t least = (uint64_t)((1 << FINE_BITS) | (bucket & ((1 << FINE_BITS) - 1))) << (octave - 1);
    return (double)least + (double)(1ull << (octave - 1)) / 2;
}

double histogram_percentile(const struct histogram *histogram, double part) {
    uint64_t seen = 0, wanted = (uint64_t)(part * (double)histogram->count);
    for (unsigned bucket = 0; bucket < sizeof histogram->buckets / sizeof *histogram->buckets; bucket++)
        if ((seen += histogram->buckets[bucket]) > wanted)
            return middle_of(bucket);
    return 0;
}

void histogram_add(struct histogram *histogram, uint64_t value) {
    histogram->buckets[bucket_of(value)]++;
    histogram->count++;
}
