// Threads for pieces of one step. The caller cuts work into chunks, and every thread has a queue of them that it begins
// with; who has finished his own steals from the others. Nobody waits for a worker that has not come: on a machine whose
// cores are wanted elsewhere a step becomes slower, but never stands in a barrier until the kernel gives a sleeping thread
// its turn. (Equal parts behind barriers ran ten times slower than one thread alone when another process took a core.)
//
// Held up. A worker that has begun a chunk and then loses its core for some milliseconds holds all others up: with one busy
// loop beside it a decoder on two cores ran slower than one thread alone. So the caller measures how long it waits beyond
// what a chunk takes; where that costs more than a thread is worth, one thread fewer gets work, and from time to time
// one more is tried again. Who computes what changes no bit of a result.
//
// Looking ahead. With few rows a step is a walk through the weights at the speed of memory, and memory rests whenever a thread
// waits: for the other's last chunk, or for what the caller does alone between two jobs. A job may therefore say what the
// next one will read (`prefetch_next`), and who has nothing to do fetches his share of it into his core's cache. The shares
// are the same cut, so what was fetched is what he will take.
//
// Workers look for work for some two hundred microseconds after the last (longer than Python takes between two steps), so
// that they are there for the next piece, then sleep: between requests they cost nothing, and torch's own threads find
// their cores free.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "simd.h"

namespace sprat {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline std::int64_t ticks() {  // some billions a second
#if defined(__x86_64__)
    return static_cast<std::int64_t>(__builtin_ia32_rdtsc());
#else
    return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

// How many threads get work: fewer while others are held up.
class ThreadGovernor {
public:
    explicit ThreadGovernor(int most) : most_(most), now_(most) {}
    int now() const { return now_; }

    // A job took the caller `worked` ticks for `own` chunks, and `waited` more for those that others had begun.
    void record(std::int64_t worked, Index own, std::int64_t waited) {
        if (own > 0) total_ += worked + waited, held_ += std::max<std::int64_t>(0, waited - 2 * worked / own - kSlack);
        if (total_ < kWindow) return;
        const bool held = static_cast<double>(held_) * now_ > kWorth * static_cast<double>(total_);
        if (held && now_ > 1) {
            --now_;
            rest_ = tried_ ? std::min(2 * rest_, kLongest) : kShortest;
            left_ = rest_, tried_ = false;
        } else if (now_ < most_ && --left_ <= 0) {
            ++now_, left_ = rest_, tried_ = true;
        } else {
            tried_ = false;
        }
        total_ = held_ = 0;
    }

private:
    static constexpr std::int64_t kWindow = 60'000'000, kSlack = 100'000;  // ticks: some 25 ms, some 40 µs
    static constexpr double kWorth = 0.8;              // of one thread's share of the work, lost by waiting for it
    static constexpr int kShortest = 32, kLongest = 512;  // windows until one more is tried
    int most_, now_, rest_ = kShortest, left_ = 0;
    bool tried_ = false;  // whether the last window was such a try
    std::int64_t total_ = 0, held_ = 0;
};

class ThreadPool {
public:
    explicit ThreadPool(int threads) : queues_(static_cast<std::size_t>(std::max(threads, 1))), governor_(std::max(threads, 1)) {
        workers_.reserve(queues_.size());
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    }
    ~ThreadPool() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            stopping_.store(true);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int threads() const { return static_cast<int>(queues_.size()); }
    int active_threads() const { return governor_.now(); }  // of them; fewer while others are held up

    // What the job after the next `run` will read; each thread its share of every span.
    void prefetch_next(const void* at, Index bytes) {
        if (spans_ < kSpans) prefetch_spans_[spans_++] = {static_cast<const char*>(at), bytes};
    }

    // Run f(chunk, thread) for every chunk of 0 … chunks-1 (below 2^20), each once; returns when all are done.
    template <class F>
    void run(Index chunks, const F& f) {
        if (queues_.size() == 1 || chunks <= 1) {
            for (Index i = 0; i < chunks; ++i) f(i, 0);
            spans_ = 0;
            return;
        }
        const std::int64_t began = ticks();
        const Index count = governor_.now();
        active_.store(static_cast<int>(count), std::memory_order_relaxed);
        const std::uint64_t job_number = ++job_number_ % (1u << 24);
        Job& job = jobs_[job_number % kJobs];
        job.call = [](const void* self, Index chunk, int thread) { (*static_cast<const F*>(self))(chunk, thread); };
        job.self = &f;
        job.done.store(0, std::memory_order_relaxed);
        for (Index i = 0; i < kSpans; ++i) {
            job.spans[i].at.store(prefetch_spans_[i].first, std::memory_order_relaxed);
            job.spans[i].bytes.store(i < spans_ ? prefetch_spans_[i].second : 0, std::memory_order_relaxed);
        }
        spans_ = 0;
        for (Index t = 0; t < count; ++t) {
            const auto first = static_cast<std::uint64_t>(chunks * t / count), end = static_cast<std::uint64_t>(chunks * (t + 1) / count);
            queues_[t].word.store(job_number << 40 | end << 20 | first, std::memory_order_seq_cst);
        }
        bool sleeping = false;
        for (Index t = 1; t < count; ++t) sleeping = sleeping || queues_[t].asleep.load(std::memory_order_seq_cst);
        if (sleeping) {
            std::lock_guard<std::mutex> hold(mutex_);
            wake_.notify_all();
        }
        const Index own = drain(0);
        const std::int64_t worked = ticks() - began;
        const auto unfinished = [&] { return job.done.load(std::memory_order_acquire) < chunks; };
        prefetch_while(0, job, unfinished);
        while (unfinished()) pause();
        governor_.record(worked, own, ticks() - began - worked);
    }

private:
    static constexpr Index kSpans = 16;
    static constexpr Index kPrefetchBytes = 256 << 10;  // bytes that a thread fetches ahead: what a second-level cache has to spare
    static constexpr int kJobs = 4;               // a late worker may still look at the job before this one
    static constexpr int kLooks = 4000;           // pauses of some 50 ns each
    static constexpr std::uint64_t kMaxChunks = (1u << 20) - 1;

    struct Span {
        std::atomic<const char*> at{nullptr};
        std::atomic<Index> bytes{0};
    };
    struct Job {
        void (*call)(const void*, Index, int) = nullptr;
        const void* self = nullptr;
        std::atomic<Index> done{0};
        Span spans[kSpans];
    };
    // A thread's chunks: the job's number, the end of its queue and the next chunk in one word. A chunk that was taken
    // therefore belongs to a job whose caller is still waiting for it, however late the taker is.
    struct alignas(64) WorkQueue {
        std::atomic<std::uint64_t> word{0};
        std::atomic<bool> asleep{false};
    };
    static bool left(std::uint64_t word) { return (word & kMaxChunks) < (word >> 20 & kMaxChunks); }

    // Take chunks until none is left: one's own, then the others'. How many there were.
    Index drain(int thread) {
        const int count = threads();
        Index taken = 0;
        for (int i = 0; i < count; ++i) {
            std::atomic<std::uint64_t>& word = queues_[(thread + i) % count].word;
            while (left(word.load(std::memory_order_acquire))) {
                const std::uint64_t got = word.fetch_add(1, std::memory_order_acq_rel);
                if (!left(got)) break;
                Job& job = jobs_[(got >> 40) % kJobs];
                job.call(job.self, static_cast<Index>(got & kMaxChunks), thread);
                job.done.fetch_add(1, std::memory_order_acq_rel);
                ++taken;
            }
        }
        return taken;
    }

    // Fetch what the next job will read, as long as there is nothing to do.
    template <class Waiting>
    void prefetch_while(int thread, const Job& job, const Waiting& waiting) const {
        const Index count = active_.load(std::memory_order_relaxed);
        if (thread >= count) return;
        Index budget = kPrefetchBytes;
        for (const Span& span : job.spans) {
            const Index bytes = span.bytes.load(std::memory_order_relaxed), first = bytes * thread / count;
            const char* at = span.at.load(std::memory_order_relaxed) + first;
            const Index mine = std::min(budget, bytes * (thread + 1) / count - first);
            for (Index done = 0; done < mine; done += 256) {
                if (!waiting()) return;
                prefetch_l2(at + done, 256);
            }
            budget -= mine;
        }
    }

    void work(int thread) {
        std::atomic<std::uint64_t>& word = queues_[thread].word;
        std::uint64_t seen = 0;
        const auto idle = [&] { return word.load(std::memory_order_acquire) >> 40 == seen && !stopping_.load(std::memory_order_relaxed); };
        while (!stopping_.load(std::memory_order_relaxed)) {
            if (!idle()) {
                seen = word.load(std::memory_order_acquire) >> 40;
                drain(thread);
            }
            prefetch_while(thread, jobs_[seen % kJobs], idle);
            for (int looks = 0; looks < kLooks && idle(); ++looks) pause();
            if (!idle()) continue;
            std::unique_lock<std::mutex> hold(mutex_);
            queues_[thread].asleep.store(true, std::memory_order_seq_cst);
            wake_.wait(hold, [&] { return stopping_.load() || word.load(std::memory_order_seq_cst) >> 40 != seen; });
            queues_[thread].asleep.store(false, std::memory_order_seq_cst);
        }
    }

    std::vector<WorkQueue> queues_;
    ThreadGovernor governor_;
    std::atomic<int> active_{1};  // threads that have a share of the job
    Job jobs_[kJobs];
    std::uint64_t job_number_ = 0;
    std::pair<const char*, Index> prefetch_spans_[kSpans];
    Index spans_ = 0;
    alignas(64) std::atomic<bool> stopping_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;  // last: they use all of the above
};

}  // namespace sprat
