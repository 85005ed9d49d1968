// Who computes which rows of attention over which keys, for the new tokens of many sequences.
//
// A tile of query rows of one key head walks over its keys once. Where there are too few tiles for all threads, and keys
// enough, the keys are shared out instead, span by span; sharing rows has every thread read all keys.
#pragma once
#include <algorithm>
#include <vector>

#include "dims.h"
#include "product.h"

namespace sprat {

// One layer's share of the paged memory.
struct Kept {
    const std::uint8_t* memory;
    Index block, layer;  // bytes of a block; where the layer's share begins in it
    Index window;        // keys that a token sees, its own included; 0: all before it
};

class Attention {
public:
    Attention(const Dims& dims, Memory memory, Pool& pool) : dims_(dims), memory_(memory), pool_(pool) {}

    // Pieces in which the keys of sequence s are shared out; 1: not at all.
    Index spans(const Batch& b, Index s, Index window = 0) const {
        const Index rows = (b.starts[s + 1] - b.starts[s]) * per(), tiles = (rows + most() - 1) / most() * dims_.groups() * b.sequences;
        const Index count = (b.positions[b.starts[s + 1] - 1] + kSpan) / kSpan - before(b, s, window);
        return memory_ == Memory::bytes && tiles < pool_.threads() && count >= 2 * pool_.threads() ? count : 1;
    }

    // out [T, H, value width] of scaled queries q [T, H, key width].
    void run(const Kept& kept, const Batch& b, const float* q, float* out) {
        bool shared = false;
        tasks_.clear();
        for (Index s = 0; s < b.sequences; ++s) {
            const Index rows = (b.starts[s + 1] - b.starts[s]) * per(), pieces = spans(b, s, kept.window);
            // A tile for each thread at least: few rows of one sequence are shared out.
            const Index fair = (rows + pool_.threads() - 1) / pool_.threads();
            const Tiling tiling(rows, pieces > 1 || b.sequences * dims_.groups() >= pool_.threads() ? most() : std::min(most(), fair));
            for (Index g = 0; g < dims_.groups(); ++g) {
                for (Index t = 0; t < tiling.tiles; ++t) {
                    for (Index i = 0; i < pieces; ++i) tasks_.push_back({s, g, tiling.start(t), tiling.size(t), i, pieces});
                }
            }
            shared = shared || pieces > 1;
        }
        const Index count = static_cast<Index>(tasks_.size()), deep = dims_.value_width();
        if (shared) {
            parts_.resize(tasks_.size() * kByteQueries);
            float* sums = sums_.need(parts_.size() * static_cast<std::size_t>(deep));
            for (std::size_t i = 0; i < parts_.size(); ++i) parts_[i].sums = sums + static_cast<Index>(i) * deep;
        }
        prepare();
        pool_.run(count, [&](Index i, int thread) { run_task(kept, b, tasks_[i], q, out, thread, parts_.data() + i * kByteQueries); });
        for (Index i = 0; i < count; i += tasks_[i].spans) {
            if (tasks_[i].spans > 1) join_parts(b, tasks_[i], parts_.data() + i * kByteQueries, out);
        }
    }

    // The same for heads first … last - 1 of a single token over one key head, within a job that has called `prepare` before.
    void rows(const Kept& kept, const Batch& b, Index first, Index last, const float* q, float* out, int thread) {
        const Tiling tiling(last - first, most());
        for (Index t = 0; t < tiling.tiles; ++t) run_task(kept, b, {0, 0, first + tiling.start(t), tiling.size(t), 0, 1}, q, out, thread, nullptr);
    }
    void prepare() { rooms_.need(room_size() * pool_.threads()); }

private:
    struct Task {
        Index sequence, group, first, rows;  // query rows of a key head: token by token, its query heads side by side
        Index span, spans;                   // of keys: the one that it is about, of this many that are shared out; 1: all
    };

    // Spans that no new token of sequence s sees.
    Index before(const Batch& b, Index s, Index window) const { return first_seen(b.positions[b.starts[s]] + 1, window) / kSpan; }

    Index per() const { return dims_.heads / dims_.groups(); }
    Index most() const { return memory_ == Memory::bytes ? kByteQueries : kQueries; }
    Index room_size() const {
        const Index wide = dims_.key_width(), deep = dims_.value_width();
        return memory_ == Memory::bytes ? ByteRoom::count(wide, deep) : AttentionRoom::count(wide, deep);
    }

    // Row r of a task as [token, head].
    Index place(const Batch& b, const Task& task, Index r) const {
        const Index row = task.first + r;
        return (b.starts[task.sequence] + row / per()) * dims_.heads + task.group * per() + row % per();
    }

    // `shared`: where a task about one span of many puts what it found.
    void run_task(const Kept& kept, const Batch& b, const Task& task, const float* q, float* out, int thread, Part* shared) {
        const Index key_wide = dims_.key_width(), deep = dims_.value_width();
        float* room = rooms_.data() + thread * room_size();
        const float* query[kByteQueries];
        float* to[kByteQueries];
        std::int32_t seen[kByteQueries];
        for (Index r = 0; r < task.rows; ++r) {
            const Index at = place(b, task, r);
            query[r] = q + at * key_wide, to[r] = out + at * deep, seen[r] = b.positions[at / dims_.heads] + 1;
        }
        const std::int32_t* table = b.tables + task.sequence * b.width;
        if (memory_ == Memory::half) {
            return attend<Float16>(paged<Float16>(kept, task.group, table), query, seen, to, task.rows, AttentionRoom(room, key_wide));
        }
        if (memory_ == Memory::full) {
            return attend<Float32>(paged<Float32>(kept, task.group, table), query, seen, to, task.rows, AttentionRoom(room, key_wide));
        }
        const Index part = dims_.latent ? 0 : PagedBytes::bytes(dims_.head_dim, 1);
        const PagedBytes at{kept.memory, kept.block, kept.layer + 2 * task.group * part, part,
                            dims_.latent ? dims_.rank : dims_.head_dim, dims_.latent ? dims_.rope : 0, deep, table, kept.window};
        const Index last = *std::max_element(seen, seen + task.rows);
        if (task.spans > 1) {
            const Index first = (before(b, task.sequence, kept.window) + task.span) * kSpan;
            return attend_bytes(at, query, seen, first, std::clamp(last, first, first + kSpan), shared, task.rows, ByteRoom(room, key_wide));
        }
        Part own[kByteQueries];
        for (Index r = 0; r < task.rows; ++r) own[r].sums = to[r];
        attend_bytes(at, query, seen, first_span(seen, task.rows, kept.window), last, own, task.rows, ByteRoom(room, key_wide));
        for (Index r = 0; r < task.rows; ++r) finish(own[r], deep, to[r]);
    }

    // The spans of a tile's rows, in the order of the keys.
    void join_parts(const Batch& b, const Task& task, Part* parts, float* out) const {
        const Index deep = dims_.value_width();
        for (Index r = 0; r < task.rows; ++r) {
            for (Index i = 1; i < task.spans; ++i) join(parts[r], parts[i * kByteQueries + r], deep);
            finish(parts[r], deep, out + place(b, task, r) * deep);
        }
    }

    template <class Format>
    Paged<Format> paged(const Kept& kept, Index group, const std::int32_t* table) const {
        using Type = typename Format::Type;
        const Index half = dims_.latent ? 0 : kBlock * dims_.head_dim, size = sizeof(Type), key_wide = dims_.key_width();
        const Index deep = dims_.value_width();
        return {reinterpret_cast<const Type*>(kept.memory), kept.block / size, kept.layer / size + 2 * group * half,
                half, key_wide, deep, (dims_.latent ? key_wide : deep) * kLanes, table, kept.window};
    }

    const Dims& dims_;
    const Memory memory_;
    Pool& pool_;
    std::vector<Task> tasks_;
    std::vector<Part> parts_;   // [task, row of its tile], where keys are shared out
    Room<float> sums_, rooms_;  // of parts; of threads
};

}  // namespace sprat
