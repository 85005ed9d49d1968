// Threads for pieces of one step. The caller cuts work into chunks; it takes chunks itself, and so does every worker
// that is awake. Nobody waits for a worker that has not come: on a machine whose cores are wanted elsewhere a step
// becomes slower, but never stands in a barrier until the kernel gives a sleeping thread its turn. (Equal shares behind
// barriers ran ten times slower than one thread alone when another process took a core.)
//
// Workers look for work for some fifty microseconds after the last, so that they are there for the next piece, then
// sleep: between requests they cost nothing, and torch's own threads find their cores free.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
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

class Pool {
public:
    explicit Pool(int threads) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            stopping_.store(true);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Run f(chunk, thread) for every chunk of 0 … chunks-1, each once; returns when all are done.
    template <class F>
    void run(Index chunks, const F& f) {
        if (workers_.empty() || chunks <= 1) {
            for (Index i = 0; i < chunks; ++i) f(i, 0);
            return;
        }
        const std::uint64_t turn = ++turn_;
        Job& job = jobs_[turn % kJobs];
        job.call = [](const void* self, Index chunk, int thread) { (*static_cast<const F*>(self))(chunk, thread); };
        job.self = &f;
        job.chunks = chunks;
        job.done.store(0, std::memory_order_relaxed);
        ticket_.store(turn << 32, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> hold(mutex_);
            wake_.notify_all();
        }
        take(0);
        while (job.done.load(std::memory_order_acquire) < chunks) pause();
    }

private:
    struct Job {
        void (*call)(const void*, Index, int) = nullptr;
        const void* self = nullptr;
        Index chunks = 0;
        std::atomic<Index> done{0};
    };
    static constexpr int kJobs = 4;       // a late worker may still look at the job before this one
    static constexpr int kLooks = 1000;   // pauses of some 50 ns each

    // Take chunks of whatever job is current until none is left. The ticket holds job and next chunk in one word, so
    // a chunk that was taken belongs to a job whose caller is still waiting for it.
    void take(int thread) {
        for (;;) {
            if (exhausted(ticket_.load(std::memory_order_acquire))) return;
            const std::uint64_t got = ticket_.fetch_add(1, std::memory_order_acq_rel);
            Job& job = jobs_[(got >> 32) % kJobs];
            const Index chunk = static_cast<Index>(got & 0xffffffffu);
            if (chunk >= job.chunks) return;
            job.call(job.self, chunk, thread);
            job.done.fetch_add(1, std::memory_order_acq_rel);
        }
    }
    bool exhausted(std::uint64_t ticket) const {
        return static_cast<Index>(ticket & 0xffffffffu) >= jobs_[(ticket >> 32) % kJobs].chunks;
    }

    void work(int thread) {
        int looks = 0;
        while (!stopping_.load(std::memory_order_relaxed)) {
            if (!exhausted(ticket_.load(std::memory_order_acquire))) {
                take(thread);
                looks = 0;
            } else if (++looks < kLooks) {
                pause();
            } else {
                std::unique_lock<std::mutex> hold(mutex_);
                sleeping_.fetch_add(1, std::memory_order_seq_cst);
                wake_.wait(hold, [this] { return stopping_.load() || !exhausted(ticket_.load(std::memory_order_seq_cst)); });
                sleeping_.fetch_sub(1, std::memory_order_seq_cst);
                looks = 0;
            }
        }
    }

    std::vector<std::thread> workers_;
    Job jobs_[kJobs];
    std::uint64_t turn_ = 0;
    alignas(64) std::atomic<std::uint64_t> ticket_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    std::atomic<bool> stopping_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
};

}  // namespace sprat
