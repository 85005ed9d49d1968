// Reads a buffer over and over on several threads, as decoding reads its weights, and prints the best rate in bytes/s.
//   bandwidth THREADS BYTES SECONDS
// Each thread reads its own share, then all meet (a step ends when its last thread ends). Eight running sums hide the
// latency of the additions; the compiler makes them vectors.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

static int threads;
static size_t words;
static uint64_t *buffer;
static double seconds, best;
static pthread_barrier_t barrier;
static volatile uint64_t sink;
static volatile int done;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static uint64_t sum(const uint64_t *p, size_t n) {
    uint64_t lanes[64] = {0};
    for (size_t i = 0; i + 64 <= n; i += 64)
        for (int k = 0; k < 64; k++) lanes[k] ^= p[i + k];
    uint64_t total = 0;
    for (int k = 0; k < 64; k++) total ^= lanes[k];
    return total;
}

static void *work(void *argument) {
    const int me = (int)(intptr_t)argument;
    const size_t share = words / threads;
    memset(buffer + me * share, me + 1, share * 8);  // first touch
    double end = now() + seconds;
    while (!done) {
        pthread_barrier_wait(&barrier);
        double start = now();
        sink ^= sum(buffer + me * share, share);
        pthread_barrier_wait(&barrier);
        if (me == 0) {
            double rate = (double)share * threads * 8 / (now() - start);
            if (rate > best) best = rate;
            if (now() > end) done = 1;
        }
        pthread_barrier_wait(&barrier);
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    threads = atoi(argv[1]);
    words = strtoull(argv[2], NULL, 10) / 8;
    seconds = atof(argv[3]);
    buffer = aligned_alloc(1 << 21, ((words * 8 >> 21) + 1) << 21);
    madvise(buffer, words * 8, MADV_HUGEPAGE);  // what is measured is memory, not the page table
    pthread_barrier_init(&barrier, NULL, threads);
    pthread_t ids[64];
    for (int t = 1; t < threads; t++) pthread_create(&ids[t], NULL, work, (void *)(intptr_t)t);
    work(NULL);
    for (int t = 1; t < threads; t++) pthread_join(ids[t], NULL);
    printf("%.0f\n", best);
    return 0;
}
