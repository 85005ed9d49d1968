// A whole step of a decoder: grouped-query or latent attention, dense or routed feed-forward, last norm and head, for the
// new tokens of many sequences over a paged KV cache. Driven from here because between two products of a small model
// Python, or even torch's dispatcher, takes longer than the product: the same kernels called from eager torch ran
// at a quarter of the speed.
//
// T tokens of the step, D hidden, H query heads, G key heads, R latent rank, r rotary, n/v channels without position / of values.
#pragma once
#include <memory>

#include "attention.h"
#include "experts.h"
#include "kv_cache.h"

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

struct MtpModule {
    const float *norm_embedding = nullptr, *norm_hidden = nullptr, *norm_last = nullptr;
    Matrix eh_proj;
    Layer layer;
};

class Model {
public:
    Model(Dims dims, int threads, KVFormat kv_format) : dims_(dims), kv_format_(kv_format), pool_(threads), attention_(dims_, kv_format, pool_) {}

    Dims dims_;
    KVFormat kv_format_;
    std::vector<Layer> layers;
    std::vector<MtpModule> mtp_modules;
    const float* norm_last = nullptr;
    Matrix embedding, head;
    const float* freqs_cis = nullptr;  // (cos, sin) of each position and channel pair
    Index num_positions = 0;

    Index block_bytes() const {
        return dims_.layer_bytes(kv_format_) * static_cast<Index>(layers.size() + mtp_modules.size());
    }
    void reserve(Index blocks) { kv_cache_.grow(static_cast<std::size_t>(blocks * block_bytes())); }
    std::uint8_t* block(Index at) const { return kv_cache_.at() + at * block_bytes(); }
    ThreadPool& pool() { return pool_; }

    // What a run gives for the tokens of `logits_indices`: logits [R, V], or the likeliest of the first `vocab` tokens [R].
    struct Outputs {
        float* logits;
        std::int64_t* argmax;
        Index vocab;
    };

    // Experts that a token takes, over all MoE layers.
    Index experts_per_token() const {
        Index count = 0;
        for (const Layer& l : layers) count += l.router.rows ? l.routing.top_k : 0;
        return count;
    }

    // The hidden states of all tokens stay for `draft`. `routes`: where the experts of each token go, [T, MoE layers, top_k];
    // or none.
    void run(const Batch& b, const Outputs& outputs, std::int16_t* routes = nullptr) {
        routes_ = routes, routes_stride_ = routes ? experts_per_token() : 0;
        find_adapted(b);
        float* x = x_.need(b.num_tokens * dims_.hidden);
        for (Index t = 0; t < b.num_tokens; ++t) read_row(embedding, b.tokens[t], x + t * dims_.hidden);
        for (std::size_t l = 0; l < layers.size(); ++l) {
            layer(layers[l], static_cast<Index>(l), b, x, l + 1 < layers.size() ? &layers[l + 1] : nullptr);
        }
        routes_ = nullptr;
        compute_logits(b, norm_last, x, outputs);
    }

    // Of the tokens of the last run, as long as no drafts were made from it: logits [count, V].
    void logits(const std::int32_t* tokens, Index count, float* out) {
        Batch b{};
        b.logits_indices = tokens, b.num_logits = count;
        compute_logits(b, norm_last, x_.data(), {out, nullptr, 0});
    }

    // The same before the head: [count, D].
    void hidden(const std::int32_t* tokens, Index count, float* out) {
        const Index wide = dims_.hidden;
        for (Index r = 0; r < count; ++r) rms_norm(x_.data() + tokens[r] * wide, norm_last, wide, dims_.eps, out + r * wide);
    }

    // What the modules of multi-token prediction expect behind each sequence, [S, modules]. `next` came to stand behind
    // each token; a sequence holds up to the first whose follower in the batch is another, a refused draft. Behind that
    // nobody asks for anything, and the next step overwrites what is stored.
    void draft(const Batch& b, const std::int64_t* next, Index vocab, std::int64_t* guesses) {
        const auto all = static_cast<Index>(mtp_modules.size());
        find_adapted(b);
        std::int32_t* tokens = mtp_tokens_.need(b.num_tokens + b.num_seqs);
        std::int32_t* ends = tokens + b.num_tokens;
        for (Index s = 0; s < b.num_seqs; ++s) {
            Index end = b.cu_seqlens[s];
            while (end + 1 < b.cu_seqlens[s + 1] && b.tokens[end + 1] == next[end]) ++end;
            ends[s] = static_cast<std::int32_t>(end);
        }
        Batch ahead = b;
        ahead.tokens = tokens, ahead.logits_indices = ends, ahead.num_logits = b.num_seqs;
        std::int64_t* found = mtp_guesses_.need(b.num_seqs);
        for (Index depth = 0; depth < all; ++depth) {
            for (Index s = 0; s < b.num_seqs; ++s) {
                for (Index t = b.cu_seqlens[s]; t < b.cu_seqlens[s + 1]; ++t) {
                    const Index at = t + depth, beyond = at - ends[s] - 1;
                    const std::int64_t token = beyond < 0 ? next[at] : beyond < depth ? guesses[s * all + beyond] : 0;
                    tokens[t] = static_cast<std::int32_t>(std::max<std::int64_t>(token, 0));  // -1: was not finite
                }
            }
            run_mtp_module(depth, ahead, {nullptr, found, vocab});
            for (Index s = 0; s < b.num_seqs; ++s) guesses[s * all + depth] = found[s];
        }
    }

    std::size_t bytes() const { return kv_cache_.size(); }

private:
    // Which tokens of a step have an adapter.
    void find_adapted(const Batch& b) {
        adapted_ = {nullptr, dims_.adapter_rank, &down_};
        if (!b.adapters) return;
        std::int32_t* of = adapter_of_.need(b.num_tokens);
        for (Index s = 0; s < b.num_seqs; ++s) std::fill(of + b.cu_seqlens[s], of + b.cu_seqlens[s + 1], b.adapters[s]);
        adapted_.of = of;
    }

    // One module over the rows of the last step, or of the module before it (DeepSeek-V3, section 2.2).
    void run_mtp_module(Index depth, const Batch& b, const Outputs& outputs) {
        const MtpModule& m = mtp_modules[depth];
        const Index wide = dims_.hidden;
        const float* last = depth ? mtp_modules[depth - 1].norm_last : norm_last;
        float *x = x_.data(), *pair = pair_.need(b.num_tokens * 2 * wide), *normed = normed_.need(b.num_tokens * wide);
        for (Index t = 0; t < b.num_tokens; ++t) {
            read_row(embedding, b.tokens[t], normed);
            rms_norm(normed, m.norm_embedding, wide, dims_.eps, pair + 2 * t * wide);
            rms_norm(x + t * wide, last, wide, dims_.eps, normed);
            rms_norm(normed, m.norm_hidden, wide, dims_.eps, pair + (2 * t + 1) * wide);
        }
        multiply(pool_, input(pair, 2 * wide, b.num_tokens, {&m.eh_proj}), {{&m.eh_proj, x, wide, false}});
        layer(m.layer, static_cast<Index>(layers.size()) + depth, b, x, nullptr);
        compute_logits(b, m.norm_last, x, outputs);
    }

    // Rows for products with `readers`: as codes too where one of them wants codes.
    Input input(const float* rows, Index width, Index count, std::initializer_list<const Matrix*> readers) {
        Input in{rows, width, count, nullptr, {}, adapted_};
        bool coded = false;
        for (const Matrix* w : readers) coded = coded || w->quantized();
        if (!coded) return in;
        const Index padded = (width + kGroup - 1) / kGroup * kGroup;
        in.codes = codes_.need(count * padded / kGroup, padded);
        const Tiling tiling(count, kTile);
        const Index chunks = count * width > 8192 ? num_chunks(pool_, tiling.tiles, count) : 1;
        pool_.run(chunks, [&](Index chunk, int) {
            for (Index t = tiling.tiles * chunk / chunks; t < tiling.tiles * (chunk + 1) / chunks; ++t) {
                const Index start = tiling.start(t);
                quantize_tile([&](Index r) { return rows + (start + r) * width; }, width, in.codes, start, tiling.size(t));
            }
        });
        return in;
    }

    // f(first token, last token, thread) for all of them, alone where that is quick.
    template <class F>
    void over_tokens(Index count, Index cost, const F& f) {
        const Index chunks = count * cost > 16384 ? num_chunks(pool_, count, 1) : 1;
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
        const float* rows = normed(x, l.norm_in, b.num_tokens);
        attention(l, number, b, rows, x);
        feed_forward(l, b.num_tokens, normed(x, l.norm_out, b.num_tokens), x, [&] {
            if (next) prefetch_layer(*next);
            else prefetch_next(pool_, {&head});
        });
    }

    // What a layer reads first.
    void prefetch_layer(const Layer& l) { prefetch_next(pool_, {l.q_down.rows ? &l.q_down : &l.q, &l.k, &l.v, &l.kv_down}); }

    void rope(float* x, Index position) const {
        const Index wide = dims_.rotary();
        const float* by = freqs_cis + position * wide;
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

    // x += o(attention(rows)); stores keys and values of the new tokens.
    void attention(const Layer& l, Index number, const Batch& b, const float* rows, float* x) {
        const Index count = b.num_tokens, wide = dims_.query_width(), all_q = dims_.heads * wide;
        float* q = q_.need(count * all_q);
        const Index kv_wide = dims_.is_mla ? dims_.key_width() : 2 * dims_.kv_heads * dims_.head_dim;
        float* kv = kv_.need(count * kv_wide);
        prefetch_next(pool_, {dims_.is_mla ? (l.q_down.rows ? &l.q : &l.kv_up) : &l.o});
        const Index key_all = dims_.kv_heads * dims_.head_dim;
        if (!dims_.is_mla) {
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
            prefetch_next(pool_, {&l.kv_up});
            multiply(pool_, input(half, low, count, {&l.q}), {{&l.q, q, all_q, false}});
        }
        rope_and_store_kv(l, number, b, q, kv);
        const Index out_wide = dims_.heads * (dims_.is_mla ? dims_.value : dims_.head_dim);
        float* out = out_.need(count * out_wide);
        if (dims_.is_mla) {
            float* absorbed = absorbed_.need(count * dims_.heads * dims_.key_width());
            float* mixed = mixed_.need(count * dims_.heads * dims_.rank);
            if (count == 1 && attention_.num_spans(b, 0) == 1) {
                // One token: a thread takes its heads all the way, and nobody waits in between.
                attention_.prepare();
                prefetch_next(pool_, {&l.o});
                const Index chunks = std::min<Index>(pool_.threads(), dims_.heads);
                pool_.run(chunks, [&](Index part, int thread) {
                    const Index first = dims_.heads * part / chunks, last = dims_.heads * (part + 1) / chunks;
                    for (Index h = first; h < last; ++h) absorb_queries(l, h, 1, q, absorbed);
                    attention_.rows(kv_view(l, number), b, first, last, absorbed, mixed, thread);
                    for (Index h = first; h < last; ++h) up_project_values(l, h, 1, mixed, out);
                });
            } else {
                pool_.run(dims_.heads, [&](Index h, int) { absorb_queries(l, h, count, q, absorbed); });
                attention_.run(kv_view(l, number), b, absorbed, mixed);
                pool_.run(dims_.heads, [&](Index h, int) { up_project_values(l, h, count, mixed, out); });
            }
        } else {
            prefetch_next(pool_, {&l.o});
            attention_.run(kv_view(l, number), b, q, out);
        }
        const Input in = input(out, out_wide, count, {&l.o});
        if (l.router.rows) prefetch_next(pool_, {&l.router});
        else prefetch_next(pool_, {&l.experts[0].gate, &l.experts[0].up});
        multiply(pool_, in, {{&l.o, x, dims_.hidden, true}});
    }

    // Rotate and scale queries, rotate keys, and store keys and values in their blocks.
    void rope_and_store_kv(const Layer& l, Index number, const Batch& b, float* q, float* kv) {
        const Index wide = dims_.query_width(), dim = dims_.head_dim;
        const Index kv_wide = dims_.is_mla ? dims_.key_width() : 2 * dims_.kv_heads * dim;
        over_tokens(b.num_tokens, (dims_.heads * wide + kv_wide) * 2, [&](Index from, Index to, int) {
            Index s = 0;
            for (Index t = from; t < to; ++t) {
                while (b.cu_seqlens[s + 1] <= t) ++s;
                const Index position = b.positions[t];
                std::uint8_t* at = block(b.block_tables[s * b.blocks_per_seq + position / kBlock]) + number * dims_.layer_bytes(kv_format_);
                float* row = kv + t * kv_wide;
                for (Index h = 0; h < dims_.heads; ++h) {
                    float* one = q + (t * dims_.heads + h) * wide;
                    if (l.q_norm) rms_norm(one, l.q_norm, wide, dims_.eps, one);
                    rope(one + (dims_.is_mla ? dims_.nope : 0), position);
                    for (Index c = 0; c < wide; ++c) one[c] *= dims_.scale;
                }
                if (dims_.is_mla) {
                    rms_norm(row, l.latent_norm, dims_.rank, Dims::latent_eps, row);
                    rope(row + dims_.rank, position);
                    store_kv(at, 0, position % kBlock, row, dims_.rank, dims_.rope);
                    continue;
                }
                for (Index g = 0; g < dims_.kv_heads; ++g) {
                    float* key = row + g * dim;
                    if (l.k_norm) rms_norm(key, l.k_norm, dim, dims_.eps, key);
                    rope(key, position);
                    store_kv(at, 2 * g, position % kBlock, key, dim, 0);
                    store_kv(at, 2 * g + 1, position % kBlock, row + (dims_.kv_heads + g) * dim, dim, 0);
                }
            }
        });
    }

    // Store one token's `wide` and `more` channels as part `part` of its layer in a block.
    void store_kv(std::uint8_t* at, Index part, Index slot, const float* x, Index wide, Index more) const {
        const Index all_wide = wide + more;
        if (kv_format_ == KVFormat::i8) {
            const Index scales = more ? 2 : 1;
            at += part * PagedKVInt8::bytes(all_wide, scales);
            store_token_i8(at, all_wide, scales, 0, 0, slot, x, wide);
            if (more) store_token_i8(at, all_wide, scales, 1, wide, slot, x + wide, more);
        } else if (kv_format_ == KVFormat::f16) {
            store_token<Float16>(reinterpret_cast<std::uint16_t*>(at) + part * kBlock * all_wide, all_wide * kLanes, slot, x, all_wide);
        } else {
            store_token<Float32>(reinterpret_cast<float*>(at) + part * kBlock * all_wide, all_wide * kLanes, slot, x, all_wide);
        }
    }

    KVView kv_view(const Layer& l, Index number) const { return {kv_cache_.at(), block_bytes(), number * dims_.layer_bytes(kv_format_), l.window}; }

    // Queries of one head against latents: W_uk^T q beside the rotated part, in [T, H, R + r].
    void absorb_queries(const Layer& l, Index h, Index count, const float* q, float* out) const {
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
            for (Index i = 0; i < some; ++i) {
                const LowRank* adapter = adapted_.find(l.kv_up, t + i);
                if (adapter) add_transposed(*adapter, h * (n + dims_.value), n, in[i], rank, to[i]);
            }
        }
    }

    // Weighted latents to values of one head, in [T, H, v].
    void up_project_values(const Layer& l, Index h, Index count, const float* mixed, float* out) const {
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
            for (Index i = 0; i < rows; ++i) {
                const LowRank* adapter = adapted_.find(l.kv_up, t + i);
                if (adapter) add_outputs(*adapter, first, v, in[i], rank, out + ((t + i) * dims_.heads + h) * v);
            }
        }
    }

    template <class F>
    void feed_forward(const Layer& l, Index count, const float* rows, float* x, const F& next) {
        expert_rows_.clear();
        if (l.router.rows == 0) {
            expert_rows_.push_back({&l.experts[0], nullptr, nullptr, count});
            return feed_forward_.run(pool_, expert_rows_, rows, count, dims_.hidden, x, adapted_, next);
        }
        const Routing& r = l.routing;
        std::int32_t* index = index_.need(count * r.top_k * 2);
        float* weight = weight_.need(count * r.top_k * 2);
        float* logits = logits_.need(count * r.experts + pool_.threads() * (r.experts + r.groups));
        if (l.shared) prefetch_next(pool_, {&l.experts[r.experts].gate, &l.experts[r.experts].up});
        multiply(pool_, {rows, dims_.hidden, count, nullptr, {}, {}}, {{&l.router, logits, r.experts, false}});
        over_tokens(count, r.experts * r.top_k, [&](Index from, Index to, int thread) {
            float* scratch = logits + count * r.experts + thread * (r.experts + r.groups);
            for (Index t = from; t < to; ++t) route(r, logits + t * r.experts, l.router_bias, index + t * r.top_k, weight + t * r.top_k, scratch);
        });
        if (routes_) {
            for (Index t = 0; t < count; ++t) {
                for (Index k = 0; k < r.top_k; ++k) routes_[t * routes_stride_ + k] = static_cast<std::int16_t>(index[t * r.top_k + k]);
            }
            routes_ += r.top_k;  // the next MoE layer's
        }
        // Tokens sorted by expert, in their own order within each (a counting sort).
        std::int32_t* sorted = index + count * r.top_k;
        float* sorted_weight = weight + count * r.top_k;
        ends_.assign(static_cast<std::size_t>(r.experts) + 1, 0);
        for (Index i = 0; i < count * r.top_k; ++i) ++ends_[index[i] + 1];
        for (Index e = 0; e < r.experts; ++e) ends_[e + 1] += ends_[e];
        for (Index e = 0; e < r.experts; ++e) {
            const Index rows_of = ends_[e + 1] - ends_[e];
            if (rows_of) expert_rows_.push_back({&l.experts[e], sorted + ends_[e], sorted_weight + ends_[e], rows_of});
        }
        for (Index i = 0; i < count * r.top_k; ++i) {
            const Index to = ends_[index[i]]++;
            sorted[to] = static_cast<std::int32_t>(i / r.top_k), sorted_weight[to] = weight[i];
        }
        if (l.shared) expert_rows_.push_back({&l.experts[r.experts], nullptr, nullptr, count});
        feed_forward_.run(pool_, expert_rows_, rows, count, dims_.hidden, x, adapted_, next);
    }

    void compute_logits(const Batch& b, const float* gain, const float* x, const Outputs& outputs) {
        if (b.num_logits == 0) return;
        const Index wide = dims_.hidden;
        float* rows = normed_.need(b.num_logits * wide);
        for (Index r = 0; r < b.num_logits; ++r) rms_norm(x + b.logits_indices[r] * wide, gain, wide, dims_.eps, rows + r * wide);
        const Input in = input(rows, wide, b.num_logits, {&head});
        prefetch_layer(layers[0]);  // of the next step
        if (outputs.argmax) multiply_argmax(pool_, in, head, outputs.vocab, logits_, outputs.argmax);
        else multiply(pool_, in, {{&head, outputs.logits, dims_.vocab, false}});
    }

    Adapted adapted_;  // of this step
    std::int16_t* routes_ = nullptr;  // of the MoE layer that comes next
    Index routes_stride_ = 0;         // experts of a token, over all layers
    KVCacheBuffer kv_cache_;
    ThreadPool pool_;
    Attention attention_;
    FeedForward feed_forward_;
    Scratch<float> x_, pair_, normed_, q_, kv_, out_, absorbed_, mixed_, logits_, weight_, down_;
    QuantizedRowsScratch codes_;
    Scratch<std::int32_t> index_, mtp_tokens_, adapter_of_;
    Scratch<std::int64_t> mtp_guesses_;
    std::vector<Index> ends_;
    std::vector<FeedForward::ExpertRows> expert_rows_;
};

}  // namespace sprat
