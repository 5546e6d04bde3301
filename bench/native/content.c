/* What stands in the image: a function of the offset, so that whoever wrote it, and in whatever order, can be checked.
 *
 * Every sector has a mark of 8 bytes that only its place decides; the rest is the same noise everywhere.
 */
#include <string.h>

#include "nbdload.h"

uint64_t scramble(uint64_t x) { /* splitmix64, public domain */
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static const unsigned char *noise(void) {
    static unsigned char sector[SECTOR];
    if (!sector[0])
        for (unsigned i = 0; i < SECTOR; i++)
            sector[i] = (unsigned char)(scramble(i) | 1);
    return sector;
}

void content_prepare(unsigned char *data, unsigned length) {
    for (unsigned at = 0; at < length; at += SECTOR)
        memcpy(data + at, noise(), SECTOR);
}

void content_stamp(unsigned char *data, uint64_t offset, unsigned length) {
    for (unsigned at = 0; at < length; at += SECTOR) {
        uint64_t mark = scramble((offset + at) / SECTOR);
        memcpy(data + at, &mark, sizeof mark);
    }
}

void content_check(const unsigned char *data, uint64_t offset, unsigned length, int whole) {
    const unsigned step = whole || length == SECTOR ? SECTOR : length - SECTOR;
    for (unsigned at = 0; at < length; at += step) {
        uint64_t mark = scramble((offset + at) / SECTOR);
        size_t rest = whole ? SECTOR - sizeof mark : 0;
        if (memcmp(data + at, &mark, sizeof mark) || memcmp(data + at + sizeof mark, noise() + sizeof mark, rest))
            die("what was read at %llu is not what was written", (unsigned long long)offset + at);
    }
}
