// Routed experts for a batch: tokens sorted by expert, the shared expert as one more that takes every token.
//
// Routing is DeepSeek's (V2: softmax, greedy or by best group; V3: sigmoid with a bias for the choice only, arXiv
// 2412.19437, section 2.1.2). Outputs are added to the residual by the thread that owns the channels, expert by expert in
// ascending order and the shared one last: no second buffer, no atomics, and a token's sum does not depend on the batch.
#pragma once
#include <cmath>
#include <vector>

#include "product.h"

namespace sprat {

struct Routing {
    Index experts = 0, top_k = 0, groups = 1, topk_groups = 1;
    bool sigmoid = true, sum_top2 = true, normalize = true;  // sum_top2: a group's rank is the sum of its two best
    float scale = 1.0f;
};

// Choose experts for one token from its logits [experts] (which are overwritten); ties go to the lower index.
inline void route(const Routing& r, float* logits, const float* bias, std::int32_t* index, float* weight, float* scratch) {
    if (r.sigmoid) {
        for (Index e = 0; e < r.experts; ++e) logits[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    } else {
        float top = logits[0], sum = 0.0f;
        for (Index e = 1; e < r.experts; ++e) top = std::max(top, logits[e]);
        for (Index e = 0; e < r.experts; ++e) sum += logits[e] = std::exp(logits[e] - top);
        for (Index e = 0; e < r.experts; ++e) logits[e] /= sum;
    }
    for (Index e = 0; e < r.experts; ++e) scratch[e] = logits[e] + (bias ? bias[e] : 0.0f);
    if (r.topk_groups < r.groups) {
        const Index size = r.experts / r.groups;
        float* rank = scratch + r.experts;
        for (Index g = 0; g < r.groups; ++g) {
            float first = -INFINITY, second = -INFINITY;
            for (Index e = g * size; e < (g + 1) * size; ++e) {
                if (scratch[e] > first) second = first, first = scratch[e];
                else second = std::max(second, scratch[e]);
            }
            rank[g] = r.sum_top2 ? first + second : first;
        }
        for (Index g = 0; g < r.groups; ++g) {
            Index better = 0;
            for (Index o = 0; o < r.groups; ++o) better += rank[o] > rank[g] || (rank[o] == rank[g] && o < g);
            if (better >= r.topk_groups) std::fill(scratch + g * size, scratch + (g + 1) * size, -INFINITY);
        }
    }
    float sum = 0.0f;
    for (Index k = 0; k < r.top_k; ++k) {
        Index best = 0;
        for (Index e = 1; e < r.experts; ++e) best = scratch[e] > scratch[best] ? e : best;
        index[k] = static_cast<std::int32_t>(best);
        weight[k] = logits[best];
        sum += weight[k];
        scratch[best] = -INFINITY;
    }
    for (Index k = 0; k < r.top_k; ++k) weight[k] = (r.normalize ? weight[k] / (sum + 1e-20f) : weight[k]) * r.scale;
}

struct Expert {
    Matrix gate, up, down;
};

// The feed-forward part of a layer: experts at work in this step, each with its rows.
class FeedForward {
public:
    struct ExpertRows {
        const Expert* expert;
        const std::int32_t* rows;   // indices of tokens, or none: all tokens in order
        const float* weights;       // of those rows, or none: 1
        Index count;
    };

    // x[token] += sum of experts, for normed rows `normed` [tokens, hidden]. They are done in order. `next` tells the pool
    // what will be read after them.
    template <class F>
    void run(ThreadPool& pool, const std::vector<ExpertRows>& expert_rows, const float* normed, Index tokens, Index hidden, float* x, const Adapted& adapted, const F& next) {
        adapted_ = adapted;
        prepare(pool, expert_rows, normed, hidden, tokens == 1);
        if (adapted_.of) project_gate_up(pool, expert_rows);
        for (const ExpertRows& w : expert_rows) prefetch_next(pool, {&w.expert->down});
        gate_up(pool, expert_rows);
        if (adapted_.of) project_hidden(pool, expert_rows);
        list_all_outliers(pool, expert_rows);
        next();
        combine(pool, expert_rows, hidden, x);
    }
    std::size_t bytes() const {
        return codes_in_.bytes() + codes_out_.bytes() + rows_.bytes();
    }

private:
    struct Chunk {
        std::size_t index;
        Index first, last;  // of its groups of 32 hidden channels, or of its tiles of rows
    };

    // Lay the rows of each expert side by side as codes, and cut the hidden channels into chunks.
    void prepare(ThreadPool& pool, const std::vector<ExpertRows>& expert_rows, const float* normed, Index hidden, bool alone) {  // alone: a single token, the same row for all of its experts
        normed_ = normed, stride_ = hidden;
        Index wide = 0, deep = 0, floats = 0;
        for (const ExpertRows& w : expert_rows) {
            wide += w.count * w.expert->gate.padded(), deep += w.count * w.expert->down.padded();
            if (keeps_floats(w)) floats += w.count * w.expert->down.padded();
        }
        QuantizedRows in = codes_in_.need(wide / kGroup, 0), out = codes_out_.need(deep / kGroup, 0);
        float* rows = rows_.need(floats);
        in_.clear(), out_.clear(), float_rows_.clear(), tiles_.clear(), chunks_.clear();
        // A chunk is a part of one expert's channels; about six chunks a thread, and none below one group.
        const Index groups_per_chunk = std::max<Index>(1, deep / kGroup / (pool.threads() * 6));
        for (std::size_t i = 0; i < expert_rows.size(); ++i) {
            const Index count = expert_rows[i].count;
            in.padded = expert_rows[i].expert->gate.padded(), out.padded = expert_rows[i].expert->down.padded();
            in_.push_back(in), out_.push_back(out), float_rows_.push_back(rows);
            if (!alone) in = in.after(count);
            out = out.after(count);
            if (keeps_floats(expert_rows[i])) rows += count * out.padded;
            const Index groups = out.padded / kGroup;
            const Index step = pool.threads() == 1 ? groups : std::clamp<Index>(groups_per_chunk / count, 1, groups);
            for (Index g = 0; g < groups; g += step) chunks_.push_back({i, g, std::min(groups, g + step)});
            if ((i && alone) || (!expert_rows[i].expert->gate.quantized() && !expert_rows[i].expert->up.quantized())) continue;
            for (Index t = 0; t < Tiling(count, kTile).tiles; ++t) tiles_.push_back({i, t, t + 1});
        }
        const Index tiles = static_cast<Index>(tiles_.size()), chunks = wide > 8192 ? num_chunks(pool, tiles, 1) : 1;
        pool.run(chunks, [&](Index chunk, int) {
            for (Index n = tiles * chunk / chunks; n < tiles * (chunk + 1) / chunks; ++n) quantize_rows(expert_rows, tiles_[n]);
        });
    }

    // Whether the rows between are kept as floats: for weights that are floats, or for an adapter.
    bool keeps_floats(const ExpertRows& w) const { return !w.expert->down.quantized() || (adapted_.of && w.expert->down.adapters); }

    // A x of gate and up, of the rows that have an adapter: of each expert [2, rows, rank].
    void project_gate_up(ThreadPool& pool, const std::vector<ExpertRows>& expert_rows) {
        starts_.clear();
        Index count = 0;
        for (const ExpertRows& w : expert_rows) starts_.push_back(count), count += w.count;
        float* both = gate_up_scratch_.need(2 * count * adapted_.rank);
        gate_up_down_ = both;
        hidden_down_ = hidden_scratch_.need(count * adapted_.rank);
        over_experts(pool, expert_rows, stride_, [&](const ExpertRows& w, std::size_t i, Index from, Index to) {
            const auto inputs = [&](Index row) { return normed_ + (w.rows ? w.rows[row] : row) * stride_; };
            float* down = both + 2 * starts_[i] * adapted_.rank;
            project_down(w.expert->gate, adapted_, w.rows, from, to, inputs, down);
            project_down(w.expert->up, adapted_, w.rows, from, to, inputs, down + w.count * adapted_.rank);
        });
    }

    // The same of what gate and up made, for `down`: [rows, rank] of each expert.
    void project_hidden(ThreadPool& pool, const std::vector<ExpertRows>& expert_rows) {
        over_experts(pool, expert_rows, out_[0].padded, [&](const ExpertRows& w, std::size_t i, Index from, Index to) {
            const auto inputs = [&](Index row) { return float_rows_[i] + row * out_[i].padded; };
            project_down(w.expert->down, adapted_, w.rows, from, to, inputs, hidden_down_ + starts_[i] * adapted_.rank);
        });
    }

    // f(expert's rows, which, first row, last row), in chunks where it takes long; `width`: numbers of a row.
    template <class F>
    void over_experts(ThreadPool& pool, const std::vector<ExpertRows>& expert_rows, Index width, const F& f) {
        for (std::size_t i = 0; i < expert_rows.size(); ++i) {
            const Index count = expert_rows[i].count, chunks = count * width * adapted_.rank > 65536 ? num_chunks(pool, count, count) : 1;
            pool.run(chunks, [&](Index chunk, int) { f(expert_rows[i], i, count * chunk / chunks, count * (chunk + 1) / chunks); });
        }
    }

    void quantize_rows(const std::vector<ExpertRows>& expert_rows, const Chunk& tile) const {
        const ExpertRows& w = expert_rows[tile.index];
        const Tiling tiling(w.count, kTile);
        const Index start = tiling.start(tile.first), size = tiling.size(tile.first);
        quantize_tile([&](Index r) { return normed_ + (w.rows ? w.rows[start + r] : start + r) * stride_; }, stride_, in_[tile.index], start, size);
    }

    // After all of a tile's channels are there.
    void list_all_outliers(ThreadPool& pool, const std::vector<ExpertRows>& expert_rows) const {
        Index num_groups = 0;
        for (const ExpertRows& w : expert_rows) num_groups += w.expert->down.quantized() ? w.count * w.expert->down.padded() / kGroup : 0;
        const Index chunks = num_groups > 8192 ? pool.threads() : 1;
        pool.run(chunks, [&](Index chunk, int) {
            for (std::size_t i = 0; i < expert_rows.size(); ++i) {
                if (!expert_rows[i].expert->down.quantized()) continue;
                const Tiling tiling(expert_rows[i].count, kTile);
                for (Index t = tiling.tiles * chunk / chunks; t < tiling.tiles * (chunk + 1) / chunks; ++t) list_outliers(out_[i], tiling.start(t), tiling.size(t));
            }
        });
    }

    // silu(gate) * up, and its codes for `down`.
    void gate_up(ThreadPool& pool, const std::vector<ExpertRows>& expert_rows) {
        pool.run(static_cast<Index>(chunks_.size()), [&](Index p, int) {
            const Chunk& chunk = chunks_[p];
            const std::size_t i = chunk.index;
            const ExpertRows& w = expert_rows[i];
            const Input in{normed_, stride_, w.count, w.rows, in_[i], {}};
            const bool coded = w.expert->down.quantized(), keeps = keeps_floats(w);
            const float* down = adapted_.of ? gate_up_down_ + 2 * starts_[i] * adapted_.rank : nullptr;
            const float* down_of_up = adapted_.of ? down + w.count * adapted_.rank : nullptr;
            const Index width = w.expert->gate.rows;
            over_rows(chunk.first, chunk.last, w.count, [&](Index g, Index start, Index size) {
                alignas(64) float both[kTile][kGroup];
                for (Index half = 0; half < 2; ++half) {
                    const Index at = 2 * g + half;
                    if (at * kLanes >= width) {
                        for (Index r = 0; r < size; ++r) store(both[r] + half * kLanes, zero());
                        continue;
                    }
                    Lane gate[kTile], up[kTile];
                    panel(w.expert->gate, at, in, start, size, gate);
                    panel(w.expert->up, at, in, start, size, up);
                    add_low_rank(w.expert->gate, at, adapted_, w.rows, down, start, size, gate);
                    add_low_rank(w.expert->up, at, adapted_, w.rows, down_of_up, start, size, up);
                    for (Index r = 0; r < size; ++r) store(both[r] + half * kLanes, mul(silu(gate[r]), up[r]));
                }
                for (Index r = 0; r < size; ++r) {
                    if (coded) quantize_group(both[r], width - g * kGroup, out_[i], start, g, r, size);
                    if (keeps) std::memcpy(float_rows_[i] + (start + r) * out_[i].padded + g * kGroup, both[r], sizeof both[r]);
                }
            });
        });
    }

    void combine(ThreadPool& pool, const std::vector<ExpertRows>& expert_rows, Index hidden, float* x) {
        const Index panels = (hidden + kLanes - 1) / kLanes;
        Index rows = 0;
        for (const ExpertRows& w : expert_rows) rows += w.count;
        const Index chunks = num_chunks(pool, panels, rows);
        pool.run(chunks, [&](Index chunk, int) {
            const Index first = panels * chunk / chunks, last = panels * (chunk + 1) / chunks;
            for (std::size_t i = 0; i < expert_rows.size(); ++i) {
                const ExpertRows& w = expert_rows[i];
                const Input in{float_rows_[i], out_[i].padded, w.count, nullptr, out_[i], {}};
                const float* down = adapted_.of ? hidden_down_ + starts_[i] * adapted_.rank : nullptr;
                over_rows(first, last, w.count, [&](Index at, Index start, Index size) {
                    Lane out[kTile];
                    panel(w.expert->down, at, in, start, size, out);
                    add_low_rank(w.expert->down, at, adapted_, w.rows, down, start, size, out);
                    for (Index r = 0; r < size; ++r) {
                        const Index token = w.rows ? w.rows[start + r] : start + r;
                        const Lane y = w.weights ? mul(out[r], all(w.weights[start + r])) : out[r];
                        store_lanes(x + token * hidden + at * kLanes, y, hidden - at * kLanes, true);
                    }
                });
            }
        });
    }

    QuantizedRowsScratch codes_in_, codes_out_;
    Scratch<float> rows_;
    std::vector<QuantizedRows> in_, out_;
    std::vector<float*> float_rows_;
    std::vector<Chunk> chunks_, tiles_;
    const float* normed_ = nullptr;
    Index stride_ = 0;
    Adapted adapted_;
    Scratch<float> gate_up_scratch_, hidden_scratch_;
    std::vector<Index> starts_;  // rows of the experts before each
    const float* gate_up_down_ = nullptr;
    float* hidden_down_ = nullptr;
};

}  // namespace sprat
