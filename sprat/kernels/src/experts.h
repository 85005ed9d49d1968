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
    Index experts = 0, chosen = 0, groups = 1, top_groups = 1;
    bool sigmoid = true, two_best = true, normalise = true;  // two_best: a group's rank is the sum of its two best
    float scale = 1.0f;
};

// Choose experts for one token from its logits [experts] (which are overwritten); ties go to the lower index.
inline void route(const Routing& r, float* logits, const float* bias, std::int32_t* index, float* weight, float* room) {
    if (r.sigmoid) {
        for (Index e = 0; e < r.experts; ++e) logits[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    } else {
        float top = logits[0], sum = 0.0f;
        for (Index e = 1; e < r.experts; ++e) top = std::max(top, logits[e]);
        for (Index e = 0; e < r.experts; ++e) sum += logits[e] = std::exp(logits[e] - top);
        for (Index e = 0; e < r.experts; ++e) logits[e] /= sum;
    }
    for (Index e = 0; e < r.experts; ++e) room[e] = logits[e] + (bias ? bias[e] : 0.0f);
    if (r.top_groups < r.groups) {
        const Index size = r.experts / r.groups;
        float* rank = room + r.experts;
        for (Index g = 0; g < r.groups; ++g) {
            float first = -INFINITY, second = -INFINITY;
            for (Index e = g * size; e < (g + 1) * size; ++e) {
                if (room[e] > first) second = first, first = room[e];
                else second = std::max(second, room[e]);
            }
            rank[g] = r.two_best ? first + second : first;
        }
        for (Index g = 0; g < r.groups; ++g) {
            Index better = 0;
            for (Index o = 0; o < r.groups; ++o) better += rank[o] > rank[g] || (rank[o] == rank[g] && o < g);
            if (better >= r.top_groups) std::fill(room + g * size, room + (g + 1) * size, -INFINITY);
        }
    }
    float sum = 0.0f;
    for (Index k = 0; k < r.chosen; ++k) {
        Index best = 0;
        for (Index e = 1; e < r.experts; ++e) best = room[e] > room[best] ? e : best;
        index[k] = static_cast<std::int32_t>(best);
        weight[k] = logits[best];
        sum += weight[k];
        room[best] = -INFINITY;
    }
    for (Index k = 0; k < r.chosen; ++k) weight[k] = (r.normalise ? weight[k] / (sum + 1e-20f) : weight[k]) * r.scale;
}

struct Expert {
    Matrix gate, up, down;
};

// The feed-forward part of a layer: experts at work in this step, each with its rows.
class FeedForward {
public:
    struct Work {
        const Expert* expert;
        const std::int32_t* rows;   // indices of tokens, or none: all tokens in order
        const float* weights;       // of those rows, or none: 1
        Index count;
    };

    // x[token] += sum of experts, for normed rows `normed` [tokens, hidden]. Works are done in order. `next` tells the pool
    // what will be read after them.
    template <class F>
    void run(Pool& pool, const std::vector<Work>& works, const float* normed, Index tokens, Index hidden, float* x, const F& next) {
        plan(pool, works, normed, hidden, tokens == 1);
        for (const Work& w : works) look_ahead(pool, {&w.expert->down});
        activate(pool, works);
        settle_all(pool, works);
        next();
        combine(pool, works, hidden, x);
    }
    std::size_t bytes() const {
        return codes_in_.bytes() + codes_out_.bytes() + rows_.bytes();
    }

private:
    struct Piece {
        std::size_t work;
        Index first, last;  // of its groups of 32 hidden channels, or of its tiles of rows
    };

    // Lay the rows of each expert side by side as codes, and cut the hidden channels into pieces.
    void plan(Pool& pool, const std::vector<Work>& works, const float* normed, Index hidden, bool alone) {  // alone: a single token, the same row for all of its experts
        normed_ = normed, stride_ = hidden;
        Index wide = 0, deep = 0, floats = 0;
        for (const Work& w : works) {
            wide += w.count * w.expert->gate.padded(), deep += w.count * w.expert->down.padded();
            if (!w.expert->down.quantised()) floats += w.count * w.expert->down.padded();
        }
        Codes in = codes_in_.need(wide / kGroup, 0), out = codes_out_.need(deep / kGroup, 0);
        float* rows = rows_.need(floats);
        in_.clear(), out_.clear(), float_rows_.clear(), tiles_.clear(), pieces_.clear();
        // A piece is a share of one expert's channels; about six pieces a thread, and no piece below one group.
        const Index share = std::max<Index>(1, deep / kGroup / (pool.threads() * 6));
        for (std::size_t i = 0; i < works.size(); ++i) {
            const Index count = works[i].count;
            in.padded = works[i].expert->gate.padded(), out.padded = works[i].expert->down.padded();
            in_.push_back(in), out_.push_back(out), float_rows_.push_back(rows);
            if (!alone) in = in.after(count);
            out = out.after(count);
            if (!works[i].expert->down.quantised()) rows += count * out.padded;
            const Index groups = out.padded / kGroup;
            const Index step = pool.threads() == 1 ? groups : std::clamp<Index>(share / count, 1, groups);
            for (Index g = 0; g < groups; g += step) pieces_.push_back({i, g, std::min(groups, g + step)});
            if ((i && alone) || (!works[i].expert->gate.quantised() && !works[i].expert->up.quantised())) continue;
            for (Index t = 0; t < Tiling(count, kTile).tiles; ++t) tiles_.push_back({i, t, t + 1});
        }
        const Index tiles = static_cast<Index>(tiles_.size()), chunks = wide > 8192 ? pieces(pool, tiles, 1) : 1;
        pool.run(chunks, [&](Index chunk, int) {
            for (Index n = tiles * chunk / chunks; n < tiles * (chunk + 1) / chunks; ++n) lay(works, tiles_[n]);
        });
    }

    void lay(const std::vector<Work>& works, const Piece& tile) const {
        const Work& w = works[tile.work];
        const Tiling tiling(w.count, kTile);
        const Index start = tiling.start(tile.first), size = tiling.size(tile.first);
        quantise_tile([&](Index r) { return normed_ + (w.rows ? w.rows[start + r] : start + r) * stride_; }, stride_, in_[tile.work], start, size);
    }

    // After all of a tile's channels are there.
    void settle_all(Pool& pool, const std::vector<Work>& works) const {
        Index places = 0;
        for (const Work& w : works) places += w.expert->down.quantised() ? w.count * w.expert->down.padded() / kGroup : 0;
        const Index chunks = places > 8192 ? pool.threads() : 1;
        pool.run(chunks, [&](Index chunk, int) {
            for (std::size_t i = 0; i < works.size(); ++i) {
                if (!works[i].expert->down.quantised()) continue;
                const Tiling tiling(works[i].count, kTile);
                for (Index t = tiling.tiles * chunk / chunks; t < tiling.tiles * (chunk + 1) / chunks; ++t) settle(out_[i], tiling.start(t), tiling.size(t));
            }
        });
    }

    // silu(gate) * up, and its codes for `down`.
    void activate(Pool& pool, const std::vector<Work>& works) {
        pool.run(static_cast<Index>(pieces_.size()), [&](Index p, int) {
            const Piece& piece = pieces_[p];
            const std::size_t i = piece.work;
            const Work& w = works[i];
            const Input in{normed_, stride_, w.count, w.rows, in_[i]};
            const bool coded = w.expert->down.quantised();
            const Index width = w.expert->gate.rows;
            over_rows(piece.first, piece.last, w.count, [&](Index g, Index start, Index size) {
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
                    for (Index r = 0; r < size; ++r) store(both[r] + half * kLanes, mul(silu(gate[r]), up[r]));
                }
                for (Index r = 0; r < size; ++r) {
                    if (coded) quantise_group(both[r], width - g * kGroup, out_[i], start, g, r, size);
                    else std::memcpy(float_rows_[i] + (start + r) * out_[i].padded + g * kGroup, both[r], sizeof both[r]);
                }
            });
        });
    }

    void combine(Pool& pool, const std::vector<Work>& works, Index hidden, float* x) {
        const Index panels = (hidden + kLanes - 1) / kLanes;
        Index rows = 0;
        for (const Work& w : works) rows += w.count;
        const Index chunks = pieces(pool, panels, rows);
        pool.run(chunks, [&](Index chunk, int) {
            const Index first = panels * chunk / chunks, last = panels * (chunk + 1) / chunks;
            for (std::size_t i = 0; i < works.size(); ++i) {
                const Work& w = works[i];
                const Input in{float_rows_[i], out_[i].padded, w.count, nullptr, out_[i]};
                over_rows(first, last, w.count, [&](Index at, Index start, Index size) {
                    Lane out[kTile];
                    panel(w.expert->down, at, in, start, size, out);
                    for (Index r = 0; r < size; ++r) {
                        const Index token = w.rows ? w.rows[start + r] : start + r;
                        const Lane y = w.weights ? mul(out[r], all(w.weights[start + r])) : out[r];
                        put_lanes(x + token * hidden + at * kLanes, y, hidden - at * kLanes, true);
                    }
                });
            }
        });
    }

    CodeRoom codes_in_, codes_out_;
    Room<float> rows_;
    std::vector<Codes> in_, out_;
    std::vector<float*> float_rows_;
    std::vector<Piece> pieces_, tiles_;
    const float* normed_ = nullptr;
    Index stride_ = 0;
};

}  // namespace sprat
