// A whole step of a decoder: grouped-query or latent attention, dense or routed feed-forward, last norm and head, for the
// new tokens of many sequences over paged memory. Driven from here because between two products of a small model
// Python, or even torch's dispatcher, takes longer than the product: the same kernels called from eager torch ran
// at a quarter of the speed.
//
// T tokens of the step, D hidden, H query heads, G key heads, R latent rank, r rotary, n/v channels without position / of values.
#pragma once
#include <memory>

#include "attention.h"
#include "experts.h"
#include "memory.h"

namespace sprat {

struct Layer {
    const float *norm_in = nullptr, *norm_out = nullptr, *q_norm = nullptr, *k_norm = nullptr, *q_latent_norm = nullptr;
    const float* latent_norm = nullptr;
    Matrix q, q_down, k, v, kv_down, kv_up, o;  // q_down: the first half of a factored query, or no rows
    Routing routing;
    Matrix router;                              // no rows: dense
    const float* router_bias = nullptr;
    std::vector<Expert> experts;                // routed ones, then the shared one; or the dense one alone
    bool shared = false;
    Index window = 0;                           // keys that a token sees, its own included; 0: all before it
};

struct Drafter {
    const float *norm_embedding = nullptr, *norm_hidden = nullptr, *norm_last = nullptr;
    Matrix join;
    Layer layer;
};

class Model {
public:
    Model(Dims dims, int threads, Memory kept) : dims_(dims), kept_(kept), pool_(threads), attention_(dims_, kept, pool_) {}

    Dims dims_;
    Memory kept_;
    std::vector<Layer> layers;
    std::vector<Drafter> drafters;
    const float* norm_last = nullptr;
    Matrix embedding, head;
    const float* turns = nullptr;  // (cos, sin) of each position and channel pair
    Index turn_count = 0;

    Index block_bytes() const {
        return dims_.layer_bytes(kept_) * static_cast<Index>(layers.size() + drafters.size());
    }
    void reserve(Index blocks) { memory_.grow(static_cast<std::size_t>(blocks * block_bytes())); }
    std::uint8_t* block(Index at) const { return memory_.at() + at * block_bytes(); }
    Pool& pool() { return pool_; }

    // What is asked of the wanted tokens: their logits [R, V], or the likeliest of the first `vocab` tokens [R].
    struct Asked {
        float* logits;
        std::int64_t* best;
        Index vocab;
    };

    // The hidden states of all tokens stay for `draft`.
    void run(const Batch& b, const Asked& asked) {
        float* x = x_.need(b.count * dims_.hidden);
        for (Index t = 0; t < b.count; ++t) read_row(embedding, b.tokens[t], x + t * dims_.hidden);
        for (std::size_t l = 0; l < layers.size(); ++l) {
            layer(layers[l], static_cast<Index>(l), b, x, l + 1 < layers.size() ? &layers[l + 1] : nullptr);
        }
        answer(b, norm_last, x, asked);
    }

    // What the modules of multi-token prediction expect behind each sequence, [S, modules]. `next` came to stand behind
    // each token; a sequence holds up to the first whose follower in the batch is another, a refused draft. Behind that
    // nobody asks for anything, and the next step overwrites what is stored.
    void draft(const Batch& b, const std::int64_t* next, Index vocab, std::int64_t* guesses) {
        const auto all = static_cast<Index>(drafters.size());
        std::int32_t* tokens = ahead_.need(b.count + b.sequences);
        std::int32_t* ends = tokens + b.count;
        for (Index s = 0; s < b.sequences; ++s) {
            Index end = b.starts[s];
            while (end + 1 < b.starts[s + 1] && b.tokens[end + 1] == next[end]) ++end;
            ends[s] = static_cast<std::int32_t>(end);
        }
        Batch ahead = b;
        ahead.tokens = tokens, ahead.wanted = ends, ahead.wants = b.sequences;
        std::int64_t* found = found_.need(b.sequences);
        for (Index depth = 0; depth < all; ++depth) {
            for (Index s = 0; s < b.sequences; ++s) {
                for (Index t = b.starts[s]; t < b.starts[s + 1]; ++t) {
                    const Index at = t + depth, beyond = at - ends[s] - 1;
                    const std::int64_t token = beyond < 0 ? next[at] : beyond < depth ? guesses[s * all + beyond] : 0;
                    tokens[t] = static_cast<std::int32_t>(std::max<std::int64_t>(token, 0));  // -1: was not finite
                }
            }
            look_further(depth, ahead, {nullptr, found, vocab});
            for (Index s = 0; s < b.sequences; ++s) guesses[s * all + depth] = found[s];
        }
    }

    std::size_t bytes() const { return memory_.size(); }

private:
    // One module over the rows of the last step, or of the module before it (DeepSeek-V3, section 2.2).
    void look_further(Index depth, const Batch& b, const Asked& asked) {
        const Drafter& m = drafters[depth];
        const Index wide = dims_.hidden;
        const float* last = depth ? drafters[depth - 1].norm_last : norm_last;
        float *x = x_.data(), *pair = pair_.need(b.count * 2 * wide), *normed = normed_.need(b.count * wide);
        for (Index t = 0; t < b.count; ++t) {
            read_row(embedding, b.tokens[t], normed);
            rms_norm(normed, m.norm_embedding, wide, dims_.eps, pair + 2 * t * wide);
            rms_norm(x + t * wide, last, wide, dims_.eps, normed);
            rms_norm(normed, m.norm_hidden, wide, dims_.eps, pair + (2 * t + 1) * wide);
        }
        multiply(pool_, input(pair, 2 * wide, b.count, {&m.join}), {{&m.join, x, wide, false}});
        layer(m.layer, static_cast<Index>(layers.size()) + depth, b, x, nullptr);
        answer(b, m.norm_last, x, asked);
    }

    // Rows for products with `readers`: as codes too where one of them wants codes.
    Input input(const float* rows, Index width, Index count, std::initializer_list<const Matrix*> readers) {
        Input in{rows, width, count, nullptr, {}};
        bool coded = false;
        for (const Matrix* w : readers) coded = coded || w->quantised();
        if (!coded) return in;
        const Index padded = (width + kGroup - 1) / kGroup * kGroup;
        in.codes = codes_.need(count * padded / kGroup, padded);
        const Tiling tiling(count, kTile);
        const Index chunks = count * width > 8192 ? pieces(pool_, tiling.tiles, count) : 1;
        pool_.run(chunks, [&](Index chunk, int) {
            for (Index t = tiling.tiles * chunk / chunks; t < tiling.tiles * (chunk + 1) / chunks; ++t) {
                const Index start = tiling.start(t);
                quantise_tile([&](Index r) { return rows + (start + r) * width; }, width, in.codes, start, tiling.size(t));
            }
        });
        return in;
    }

    // f(first token, last token, thread) for all of them, alone where that is quick.
    template <class F>
    void over_tokens(Index count, Index cost, const F& f) {
        const Index chunks = count * cost > 16384 ? pieces(pool_, count, 1) : 1;
        pool_.run(chunks, [&](Index c, int thread) { f(count * c / chunks, count * (c + 1) / chunks, thread); });
    }

    const float* normed(const float* x, const float* gain, Index count) {
        const Index wide = dims_.hidden;
        float* out = normed_.need(count * wide);
        over_tokens(count, wide, [&](Index from, Index to, int) {
            for (Index t = from; t < to; ++t) rms_norm(x + t * wide, gain, wide, dims_.eps, out + t * wide);
        });
        return out;
    }

    // `next` is the layer after this one; none: the head.
    void layer(const Layer& l, Index number, const Batch& b, float* x, const Layer* next) {
        const float* rows = normed(x, l.norm_in, b.count);
        attention(l, number, b, rows, x);
        feed_forward(l, b.count, normed(x, l.norm_out, b.count), x, [&] {
            if (next) begin(*next);
            else look_ahead(pool_, {&head});
        });
    }

    // What a layer reads first.
    void begin(const Layer& l) { look_ahead(pool_, {l.q_down.rows ? &l.q_down : &l.q, &l.k, &l.v, &l.kv_down}); }

    void turn(float* x, Index position) const {
        const Index wide = dims_.rotary();
        const float* by = turns + position * wide;
        if (dims_.interleave) {
            for (Index c = 0; c < wide; c += 2) {
                const float a = x[c], z = x[c + 1], cosine = by[c], sine = by[c + 1];
                x[c] = a * cosine - z * sine, x[c + 1] = a * sine + z * cosine;
            }
        } else {
            for (Index c = 0; c < wide / 2; ++c) {
                const float a = x[c], z = x[c + wide / 2], cosine = by[2 * c], sine = by[2 * c + 1];
                x[c] = a * cosine - z * sine, x[c + wide / 2] = z * cosine + a * sine;
            }
        }
    }

    // x += o(attention(rows)); stores what the new tokens will be remembered by.
    void attention(const Layer& l, Index number, const Batch& b, const float* rows, float* x) {
        const Index count = b.count, wide = dims_.query_width(), all_q = dims_.heads * wide;
        float* q = q_.need(count * all_q);
        const Index kv_wide = dims_.latent ? dims_.key_width() : 2 * dims_.kv_heads * dims_.head_dim;
        float* kv = kv_.need(count * kv_wide);
        look_ahead(pool_, {dims_.latent ? (l.q_down.rows ? &l.q : &l.kv_up) : &l.o});
        const Index key_all = dims_.kv_heads * dims_.head_dim;
        if (!dims_.latent) {
            const Input in = input(rows, dims_.hidden, count, {&l.q, &l.k, &l.v});
            multiply(pool_, in, {{&l.q, q, all_q, false}, {&l.k, kv, kv_wide, false}, {&l.v, kv + key_all, kv_wide, false}});
        } else if (l.q_down.rows == 0) {
            const Input in = input(rows, dims_.hidden, count, {&l.q, &l.kv_down});
            multiply(pool_, in, {{&l.q, q, all_q, false}, {&l.kv_down, kv, kv_wide, false}});
        } else {
            const Index low = l.q_down.rows;
            float* half = pair_.need(count * low);
            const Input in = input(rows, dims_.hidden, count, {&l.q_down, &l.kv_down});
            multiply(pool_, in, {{&l.q_down, half, low, false}, {&l.kv_down, kv, kv_wide, false}});
            for (Index t = 0; t < count; ++t) rms_norm(half + t * low, l.q_latent_norm, low, Dims::latent_eps, half + t * low);
            look_ahead(pool_, {&l.kv_up});
            multiply(pool_, input(half, low, count, {&l.q}), {{&l.q, q, all_q, false}});
        }
        remember(l, number, b, q, kv);
        const Index out_wide = dims_.heads * (dims_.latent ? dims_.value : dims_.head_dim);
        float* out = out_.need(count * out_wide);
        if (dims_.latent) {
            float* absorbed = absorbed_.need(count * dims_.heads * dims_.key_width());
            float* mixed = mixed_.need(count * dims_.heads * dims_.rank);
            if (count == 1 && attention_.spans(b, 0) == 1) {
                // One token: a thread takes its heads all the way, and nobody waits in between.
                attention_.prepare();
                look_ahead(pool_, {&l.o});
                const Index parts = std::min<Index>(pool_.threads(), dims_.heads);
                pool_.run(parts, [&](Index part, int thread) {
                    const Index first = dims_.heads * part / parts, last = dims_.heads * (part + 1) / parts;
                    for (Index h = first; h < last; ++h) absorb(l, h, 1, q, absorbed);
                    attention_.rows(kept(l, number), b, first, last, absorbed, mixed, thread);
                    for (Index h = first; h < last; ++h) give_values(l, h, 1, mixed, out);
                });
            } else {
                pool_.run(dims_.heads, [&](Index h, int) { absorb(l, h, count, q, absorbed); });
                attention_.run(kept(l, number), b, absorbed, mixed);
                pool_.run(dims_.heads, [&](Index h, int) { give_values(l, h, count, mixed, out); });
            }
        } else {
            look_ahead(pool_, {&l.o});
            attention_.run(kept(l, number), b, q, out);
        }
        const Input in = input(out, out_wide, count, {&l.o});
        if (l.router.rows) look_ahead(pool_, {&l.router});
        else look_ahead(pool_, {&l.experts[0].gate, &l.experts[0].up});
        multiply(pool_, in, {{&l.o, x, dims_.hidden, true}});
    }

    // Turn and scale queries, turn keys, and put keys and values in their blocks.
    void remember(const Layer& l, Index number, const Batch& b, float* q, float* kv) {
        const Index wide = dims_.query_width(), dim = dims_.head_dim;
        const Index kv_wide = dims_.latent ? dims_.key_width() : 2 * dims_.kv_heads * dim;
        over_tokens(b.count, (dims_.heads * wide + kv_wide) * 2, [&](Index from, Index to, int) {
            Index s = 0;
            for (Index t = from; t < to; ++t) {
                while (b.starts[s + 1] <= t) ++s;
                const Index position = b.positions[t];
                std::uint8_t* at = block(b.tables[s * b.width + position / kBlock]) + number * dims_.layer_bytes(kept_);
                float* row = kv + t * kv_wide;
                for (Index h = 0; h < dims_.heads; ++h) {
                    float* one = q + (t * dims_.heads + h) * wide;
                    if (l.q_norm) rms_norm(one, l.q_norm, wide, dims_.eps, one);
                    turn(one + (dims_.latent ? dims_.nope : 0), position);
                    for (Index c = 0; c < wide; ++c) one[c] *= dims_.scale;
                }
                if (dims_.latent) {
                    rms_norm(row, l.latent_norm, dims_.rank, Dims::latent_eps, row);
                    turn(row + dims_.rank, position);
                    keep(at, 0, position % kBlock, row, dims_.rank, dims_.rope);
                    continue;
                }
                for (Index g = 0; g < dims_.kv_heads; ++g) {
                    float* key = row + g * dim;
                    if (l.k_norm) rms_norm(key, l.k_norm, dim, dims_.eps, key);
                    turn(key, position);
                    keep(at, 2 * g, position % kBlock, key, dim, 0);
                    keep(at, 2 * g + 1, position % kBlock, row + (dims_.kv_heads + g) * dim, dim, 0);
                }
            }
        });
    }

    // Put one token's `wide` and `more` channels in part `part` of its layer's share of a block.
    void keep(std::uint8_t* at, Index part, Index place, const float* x, Index wide, Index more) const {
        const Index all_wide = wide + more;
        if (kept_ == Memory::bytes) {
            const Index scales = more ? 2 : 1;
            at += part * PagedBytes::bytes(all_wide, scales);
            put_bytes(at, all_wide, scales, 0, 0, place, x, wide);
            if (more) put_bytes(at, all_wide, scales, 1, wide, place, x + wide, more);
        } else if (kept_ == Memory::half) {
            put<Float16>(reinterpret_cast<std::uint16_t*>(at) + part * kBlock * all_wide, all_wide * kLanes, place, x, all_wide);
        } else {
            put<Float32>(reinterpret_cast<float*>(at) + part * kBlock * all_wide, all_wide * kLanes, place, x, all_wide);
        }
    }

    Kept kept(const Layer& l, Index number) const { return {memory_.at(), block_bytes(), number * dims_.layer_bytes(kept_), l.window}; }

    // Queries of one head against latents: W_uk^T q beside the turned part, in [T, H, R + r].
    void absorb(const Layer& l, Index h, Index count, const float* q, float* out) const {
        const Index n = dims_.nope, wide = dims_.query_width(), key_wide = dims_.key_width(), rank = dims_.rank;
        for (Index t = 0; t < count; t += kTileF) {
            const Index some = std::min<Index>(kTileF, count - t);
            const float* in[kTileF];
            float* to[kTileF];
            for (Index i = 0; i < some; ++i) {
                in[i] = q + ((t + i) * dims_.heads + h) * wide;
                to[i] = out + ((t + i) * dims_.heads + h) * key_wide;
                std::memcpy(to[i] + rank, in[i] + n, static_cast<std::size_t>(dims_.rope) * sizeof(float));
            }
            transposed(l.kv_up, h * (n + dims_.value), n, in, to, some);
        }
    }

    // Weighted latents to values of one head, in [T, H, v].
    void give_values(const Layer& l, Index h, Index count, const float* mixed, float* out) const {
        const Index rank = dims_.rank, v = dims_.value, first = h * (dims_.nope + v) + dims_.nope;
        float some[kTileF][4];
        for (Index t = 0; t < count; t += kTileF) {
            const Index rows = std::min<Index>(kTileF, count - t);
            const float* in[kTileF];
            for (Index i = 0; i < rows; ++i) in[i] = mixed + ((t + i) * dims_.heads + h) * rank;
            for (Index c = 0; c < v; c += 4) {
                const Index outs = std::min<Index>(4, v - c);
                float_tile(l.kv_up, first + c, outs, in, rows, some);
                for (Index i = 0; i < rows; ++i) {
                    std::memcpy(out + ((t + i) * dims_.heads + h) * v + c, some[i], static_cast<std::size_t>(outs) * sizeof(float));
                }
            }
        }
    }

    template <class F>
    void feed_forward(const Layer& l, Index count, const float* rows, float* x, const F& next) {
        works_.clear();
        if (l.router.rows == 0) {
            works_.push_back({&l.experts[0], nullptr, nullptr, count});
            return forward_.run(pool_, works_, rows, count, dims_.hidden, x, next);
        }
        const Routing& r = l.routing;
        std::int32_t* index = index_.need(count * r.chosen * 2);
        float* weight = weight_.need(count * r.chosen * 2);
        float* logits = logits_.need(count * r.experts + pool_.threads() * (r.experts + r.groups));
        if (l.shared) look_ahead(pool_, {&l.experts[r.experts].gate, &l.experts[r.experts].up});
        multiply(pool_, {rows, dims_.hidden, count, nullptr, {}}, {{&l.router, logits, r.experts, false}});
        over_tokens(count, r.experts * r.chosen, [&](Index from, Index to, int thread) {
            float* room = logits + count * r.experts + thread * (r.experts + r.groups);
            for (Index t = from; t < to; ++t) route(r, logits + t * r.experts, l.router_bias, index + t * r.chosen, weight + t * r.chosen, room);
        });
        // Tokens sorted by expert, in their own order within each (a counting sort).
        std::int32_t* sorted = index + count * r.chosen;
        float* sorted_weight = weight + count * r.chosen;
        ends_.assign(static_cast<std::size_t>(r.experts) + 1, 0);
        for (Index i = 0; i < count * r.chosen; ++i) ++ends_[index[i] + 1];
        for (Index e = 0; e < r.experts; ++e) ends_[e + 1] += ends_[e];
        for (Index e = 0; e < r.experts; ++e) {
            const Index rows_of = ends_[e + 1] - ends_[e];
            if (rows_of) works_.push_back({&l.experts[e], sorted + ends_[e], sorted_weight + ends_[e], rows_of});
        }
        for (Index i = 0; i < count * r.chosen; ++i) {
            const Index to = ends_[index[i]]++;
            sorted[to] = static_cast<std::int32_t>(i / r.chosen), sorted_weight[to] = weight[i];
        }
        if (l.shared) works_.push_back({&l.experts[r.experts], nullptr, nullptr, count});
        forward_.run(pool_, works_, rows, count, dims_.hidden, x, next);
    }

    void answer(const Batch& b, const float* gain, const float* x, const Asked& asked) {
        if (b.wants == 0) return;
        const Index wide = dims_.hidden;
        float* rows = normed_.need(b.wants * wide);
        for (Index r = 0; r < b.wants; ++r) rms_norm(x + b.wanted[r] * wide, gain, wide, dims_.eps, rows + r * wide);
        const Input in = input(rows, wide, b.wants, {&head});
        begin(layers[0]);  // of the next step
        if (asked.best) multiply_best(pool_, in, head, asked.vocab, logits_, asked.best);
        else multiply(pool_, in, {{&head, asked.logits, dims_.vocab, false}});
    }

    Pages memory_;
    Pool pool_;
    Attention attention_;
    FeedForward forward_;
    Room<float> x_, pair_, normed_, q_, kv_, out_, absorbed_, mixed_, logits_, weight_;
    CodeRoom codes_;
    Room<std::int32_t> index_, ahead_;
    Room<std::int64_t> found_;
    std::vector<Index> ends_;
    std::vector<FeedForward::Work> works_;
};

}  // namespace sprat
