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

// One layer's part of the paged KV cache.
struct KVView {
    const std::uint8_t* data;
    Index block, layer;  // bytes of a block; where the layer begins in it
    Index window;        // keys that a token sees, its own included; 0: all before it
};

class Attention {
public:
    Attention(const Dims& dims, KVFormat kv_format, ThreadPool& pool) : dims_(dims), kv_format_(kv_format), pool_(pool) {}

    // Pieces in which the keys of sequence s are shared out; 1: not at all.
    Index num_spans(const Batch& b, Index s, Index window = 0) const {
        const Index rows = (b.cu_seqlens[s + 1] - b.cu_seqlens[s]) * heads_per_group(), tiles = (rows + tile_rows() - 1) / tile_rows() * dims_.groups() * b.num_seqs;
        const Index count = (b.positions[b.cu_seqlens[s + 1] - 1] + kSpan) / kSpan - hidden_spans(b, s, window);
        return kv_format_ == KVFormat::i8 && tiles < pool_.threads() && count >= 2 * pool_.threads() ? count : 1;
    }

    // out [T, H, value width] of scaled queries q [T, H, key width].
    void run(const KVView& kv, const Batch& b, const float* q, float* out) {
        bool shared = false;
        tasks_.clear();
        for (Index s = 0; s < b.num_seqs; ++s) {
            const Index rows = (b.cu_seqlens[s + 1] - b.cu_seqlens[s]) * heads_per_group(), pieces = num_spans(b, s, kv.window);
            // A tile for each thread at least: few rows of one sequence are shared out.
            const Index fair = (rows + pool_.threads() - 1) / pool_.threads();
            const Tiling tiling(rows, pieces > 1 || b.num_seqs * dims_.groups() >= pool_.threads() ? tile_rows() : std::min(tile_rows(), fair));
            for (Index g = 0; g < dims_.groups(); ++g) {
                for (Index t = 0; t < tiling.tiles; ++t) {
                    for (Index i = 0; i < pieces; ++i) tasks_.push_back({s, g, tiling.start(t), tiling.size(t), i, pieces});
                }
            }
            shared = shared || pieces > 1;
        }
        const Index count = static_cast<Index>(tasks_.size()), deep = dims_.value_width();
        if (shared) {
            partials_.resize(tasks_.size() * kInt8Queries);
            float* sums = sums_.need(partials_.size() * static_cast<std::size_t>(deep));
            for (std::size_t i = 0; i < partials_.size(); ++i) partials_[i].sums = sums + static_cast<Index>(i) * deep;
        }
        prepare();
        pool_.run(count, [&](Index i, int thread) { run_task(kv, b, tasks_[i], q, out, thread, partials_.data() + i * kInt8Queries); });
        for (Index i = 0; i < count; i += tasks_[i].spans) {
            if (tasks_[i].spans > 1) merge_partials(b, tasks_[i], partials_.data() + i * kInt8Queries, out);
        }
    }

    // The same for heads first … last - 1 of a single token over one key head, within a job that has called `prepare` before.
    void rows(const KVView& kv, const Batch& b, Index first, Index last, const float* q, float* out, int thread) {
        const Tiling tiling(last - first, tile_rows());
        for (Index t = 0; t < tiling.tiles; ++t) run_task(kv, b, {0, 0, first + tiling.start(t), tiling.size(t), 0, 1}, q, out, thread, nullptr);
    }
    void prepare() { thread_scratch_.need(scratch_size() * pool_.threads()); }

private:
    struct Task {
        Index sequence, group, first, rows;  // query rows of a key head: token by token, its query heads side by side
        Index span, spans;                   // of keys: the one that it is about, of this many that are shared out; 1: all
    };

    // Spans that no new token of sequence s sees.
    Index hidden_spans(const Batch& b, Index s, Index window) const { return first_visible(b.positions[b.cu_seqlens[s]] + 1, window) / kSpan; }

    Index heads_per_group() const { return dims_.heads / dims_.groups(); }
    Index tile_rows() const { return kv_format_ == KVFormat::i8 ? kInt8Queries : kQueries; }
    Index scratch_size() const {
        const Index wide = dims_.key_width(), deep = dims_.value_width();
        return kv_format_ == KVFormat::i8 ? Int8AttentionScratch::count(wide, deep) : AttentionScratch::count(wide, deep);
    }

    // Row r of a task as [token, head].
    Index output_row(const Batch& b, const Task& task, Index r) const {
        const Index row = task.first + r;
        return (b.cu_seqlens[task.sequence] + row / heads_per_group()) * dims_.heads + task.group * heads_per_group() + row % heads_per_group();
    }

    // `shared`: where a task about one span of many puts what it found.
    void run_task(const KVView& kv, const Batch& b, const Task& task, const float* q, float* out, int thread, PartialSoftmax* shared) {
        const Index key_wide = dims_.key_width(), deep = dims_.value_width();
        float* scratch = thread_scratch_.data() + thread * scratch_size();
        const float* query[kInt8Queries];
        float* to[kInt8Queries];
        std::int32_t visible[kInt8Queries];
        for (Index r = 0; r < task.rows; ++r) {
            const Index at = output_row(b, task, r);
            query[r] = q + at * key_wide, to[r] = out + at * deep, visible[r] = b.positions[at / dims_.heads] + 1;
        }
        const std::int32_t* table = b.block_tables + task.sequence * b.blocks_per_seq;
        if (kv_format_ == KVFormat::f16) {
            return paged_attention<Float16>(paged<Float16>(kv, task.group, table), query, visible, to, task.rows, AttentionScratch(scratch, key_wide));
        }
        if (kv_format_ == KVFormat::f32) {
            return paged_attention<Float32>(paged<Float32>(kv, task.group, table), query, visible, to, task.rows, AttentionScratch(scratch, key_wide));
        }
        const Index part = dims_.is_mla ? 0 : PagedKVInt8::bytes(dims_.head_dim, 1);
        const PagedKVInt8 at{kv.data, kv.block, kv.layer + 2 * task.group * part, part,
                            dims_.is_mla ? dims_.rank : dims_.head_dim, dims_.is_mla ? dims_.rope : 0, deep, table, kv.window};
        const Index last = *std::max_element(visible, visible + task.rows);
        if (task.spans > 1) {
            const Index first = (hidden_spans(b, task.sequence, kv.window) + task.span) * kSpan;
            return paged_attention_i8(at, query, visible, first, std::clamp(last, first, first + kSpan), shared, task.rows, Int8AttentionScratch(scratch, key_wide));
        }
        PartialSoftmax own[kInt8Queries];
        for (Index r = 0; r < task.rows; ++r) own[r].sums = to[r];
        paged_attention_i8(at, query, visible, first_span(visible, task.rows, kv.window), last, own, task.rows, Int8AttentionScratch(scratch, key_wide));
        for (Index r = 0; r < task.rows; ++r) normalize(own[r], deep, to[r]);
    }

    // The spans of a tile's rows, in the order of the keys.
    void merge_partials(const Batch& b, const Task& task, PartialSoftmax* parts, float* out) const {
        const Index deep = dims_.value_width();
        for (Index r = 0; r < task.rows; ++r) {
            for (Index i = 1; i < task.spans; ++i) merge(parts[r], parts[i * kInt8Queries + r], deep);
            normalize(parts[r], deep, out + output_row(b, task, r) * deep);
        }
    }

    template <class Format>
    PagedKV<Format> paged(const KVView& kv, Index group, const std::int32_t* table) const {
        using Type = typename Format::Type;
        const Index half = dims_.is_mla ? 0 : kBlock * dims_.head_dim, size = sizeof(Type), key_wide = dims_.key_width();
        const Index deep = dims_.value_width();
        return {reinterpret_cast<const Type*>(kv.data), kv.block / size, kv.layer / size + 2 * group * half,
                half, key_wide, deep, (dims_.is_mla ? key_wide : deep) * kLanes, table, kv.window};
    }

    const Dims& dims_;
    const KVFormat kv_format_;
    ThreadPool& pool_;
    std::vector<Task> tasks_;
    std::vector<PartialSoftmax> partials_;   // [task, row of its tile], where keys are shared out
    Scratch<float> sums_, thread_scratch_;  // of partial results; of threads
};

}  // namespace sprat
