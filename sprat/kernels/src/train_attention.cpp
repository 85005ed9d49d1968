// Latent attention document by document: what a token may not see is never computed, and no score goes to memory.
// For each document and head, queries and keys are rotated and laid out once; then eight queries at a time meet the keys
// before them. Backwards, probabilities are computed again from one number a row (FlashAttention, arXiv 2205.14135).
// C++17 with GCC's vectors, float32, one thread. The bindings are in sprat/kernels/ops.py, the torch form is the
// masked one of sprat/model/mla.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "exponential.h"

namespace {

using Index = std::int64_t;
typedef float Lane __attribute__((vector_size(64), aligned(4), may_alias));
constexpr Index kLane = 16, kRows = 8, kKeys = 32;

inline Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }
inline Lane load(const float* at) { return *reinterpret_cast<const Lane*>(at); }
inline void store(float* at, Lane value) { *reinterpret_cast<Lane*>(at) = value; }

// out[r][0 .. 16 lanes) = sum over c < depth of a[r][c] * b[c][...], eight rows in registers.
template <int lanes>
inline void product_block(const float* a, Index lda, const float* b, Index ldb, Index depth, float* out, Index ldo) {
    Lane sum[kRows][lanes] = {};
    for (Index c = 0; c < depth; ++c, b += ldb) {
        Lane row[lanes];
#pragma GCC unroll 8
        for (int l = 0; l < lanes; ++l) row[l] = load(b + l * kLane);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const float s = a[r * lda + c];
#pragma GCC unroll 8
            for (int l = 0; l < lanes; ++l) sum[r][l] += s * row[l];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int l = 0; l < lanes; ++l) store(out + r * ldo + l * kLane, sum[r][l]);
    }
}

void product(const float* a, Index lda, const float* b, Index ldb, Index depth, Index width, float* out, Index ldo) {
    Index at = 0;
    for (; at + kKeys <= width; at += kKeys) product_block<2>(a, lda, b + at, ldb, depth, out + at, ldo);
    if (at < width) product_block<1>(a, lda, b + at, ldb, depth, out + at, ldo);
}

// m[j][...] += sum over eight rows of p[r][j] * g[r][...] for j < count.
template <int lanes>
inline void update_block(const float* p, Index ldp, const float* g, Index ldg, Index count, float* m, Index ldm) {
    Lane rows[kRows][lanes];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int l = 0; l < lanes; ++l) rows[r][l] = load(g + r * ldg + l * kLane);
    }
    for (Index j = 0; j < count; ++j, m += ldm) {
#pragma GCC unroll 8
        for (int l = 0; l < lanes; ++l) {
            Lane sum = load(m + l * kLane);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) sum += p[r * ldp + j] * rows[r][l];
            store(m + l * kLane, sum);
        }
    }
}

void update(const float* p, Index ldp, const float* g, Index ldg, Index count, Index width, float* m, Index ldm) {
    Index at = 0;
    for (; at + kKeys <= width; at += kKeys) update_block<2>(p, ldp, g + at, ldg, count, m + at, ldm);
    if (at < width) update_block<1>(p, ldp, g + at, ldg, count, m + at, ldm);
}

// Pairs of channels rotated by (cos, sin); `back` rotates the other way (the gradient of a rotation).
inline void rotate(const float* from, const float* by, Index width, float* to, bool back) {
    for (Index c = 0; c < width; c += 2) {
        const float x = from[c], y = from[c + 1], cosine = by[c], sine = back ? -by[c + 1] : by[c + 1];
        to[c] = x * cosine - y * sine;
        to[c + 1] = x * sine + y * cosine;
    }
}

struct Shape {
    Index heads, nope, rope, value, row_length;  // row_length: rows of freqs_cis, one for each position in a packed row
    float scale;
    Index query() const { return nope + rope; }
    Index kv_width() const { return nope + value; }
};

// One head of one document, laid out for the products above. Padding is zero.
struct Head {
    Index length, rows, keys, depth, width;
    std::vector<float> query, key, key_t, value, value_t, scores, grads, out;

    void prepare(const Shape& s, Index max_seqlen, bool backward) {
        depth = round_up(s.query(), kLane), width = round_up(s.value, kLane);
        const Index r = round_up(max_seqlen, kRows), k = round_up(max_seqlen, kKeys);
        query.assign(r * depth, 0), key_t.assign(depth * k, 0), value.assign(k * width, 0);
        scores.assign(kRows * k, 0), out.assign(kRows * std::max(depth, width), 0);
        if (backward) key.assign(k * depth, 0), value_t.assign(width * k, 0), grads.assign(kRows * k, 0);
    }

    void fill(const Shape& s, const float* q, const float* kv, const float* rotated, const float* freqs_cis, Index start,
              Index count, Index head, bool backward) {
        length = count, rows = round_up(count, kRows), keys = round_up(count, kKeys);
        for (Index i = 0; i < keys; ++i) {
            const bool real = i < length;
            const Index n = start + i;
            const float* k = kv + (n * s.heads + head) * s.kv_width();
            for (Index c = 0; c < s.nope; ++c) key_t[c * keys + i] = real ? k[c] : 0.0f;
            for (Index c = 0; c < s.rope; ++c) key_t[(s.nope + c) * keys + i] = real ? rotated[i * s.rope + c] : 0.0f;
            for (Index c = s.query(); c < depth; ++c) key_t[c * keys + i] = 0.0f;
            if (real) std::copy(k + s.nope, k + s.kv_width(), &value[i * width]);
            if (backward) {
                for (Index c = 0; c < s.value; ++c) value_t[c * keys + i] = real ? k[s.nope + c] : 0.0f;
                if (real) std::copy(k, k + s.nope, &key[i * depth]);
                if (real) std::copy(rotated + i * s.rope, rotated + (i + 1) * s.rope, &key[i * depth + s.nope]);
            }
            if (i >= rows) continue;
            float* to = &query[i * depth];
            if (!real) {
                std::fill(to, to + depth, 0.0f);
                continue;
            }
            const float* from = q + (n * s.heads + head) * s.query();
            std::copy(from, from + s.nope, to);
            rotate(from + s.nope, freqs_cis + (n % s.row_length) * s.rope, s.rope, to + s.nope, false);
        }
    }
};

// A document's rotary keys, rotated; all heads share them.
void rotate_keys(const Shape& s, const float* rope_keys, const float* freqs_cis, Index start, Index length, float* rotated) {
    for (Index i = 0; i < length; ++i) {
        const Index n = start + i;
        rotate(rope_keys + n * s.rope, freqs_cis + (n % s.row_length) * s.rope, s.rope, rotated + i * s.rope, false);
    }
}

Index longest_length(const Index* lengths, Index num_docs) {
    return num_docs ? *std::max_element(lengths, lengths + num_docs) : 0;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// q [N, H, n + r], kv [N, H, n + v], rope_keys [N, r], freqs_cis [row_length, r] as (cos, sin) pairs; documents cover all tokens.
// Gives out [N, H, v] and the logarithm of each row's sum [N, H].
void varlen_attention_forward(const float* q, const float* kv, const float* rope_keys, const float* freqs_cis, const Index* starts,
                    const Index* lengths, Index num_docs, Index heads, Index nope, Index rope, Index value,
                    Index row_length, float scale, float* out, float* log_sum) {
    const Shape s{heads, nope, rope, value, row_length, scale};
    const Index max_seqlen = longest_length(lengths, num_docs);
    Head h;
    h.prepare(s, max_seqlen, false);
    std::vector<float> rotated(max_seqlen * rope);
    for (Index d = 0; d < num_docs; ++d) {
        const Index start = starts[d], length = lengths[d];
        rotate_keys(s, rope_keys, freqs_cis, start, length, rotated.data());
        for (Index head = 0; head < heads; ++head) {
            h.fill(s, q, kv, rotated.data(), freqs_cis, start, length, head, false);
            for (Index first = 0; first < length; first += kRows) {
                const Index count = std::min(first + kRows, length);
                product(&h.query[first * h.depth], h.depth, h.key_t.data(), h.keys, h.depth, round_up(count, kKeys),
                        h.scores.data(), h.keys);
                for (Index r = 0; r < kRows; ++r) {
                    float* p = &h.scores[r * h.keys];
                    const Index visible = first + r < length ? first + r + 1 : 0;
                    float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
                    for (Index j = 0; j < visible; ++j) top = p[j] > top ? p[j] : top;
                    for (Index j = 0; j < visible; ++j) {
                        p[j] = exponential((p[j] - top) * scale);
                        sum += p[j];
                    }
                    for (Index j = 0; j < visible; ++j) p[j] /= sum;
                    std::fill(p + visible, p + round_up(count, kKeys), 0.0f);
                    if (visible) log_sum[(start + first + r) * heads + head] = top * scale + std::log(sum);
                }
                product(h.scores.data(), h.keys, h.value.data(), h.width, count, h.width, h.out.data(), h.width);
                for (Index i = first; i < count; ++i) {
                    const float* from = &h.out[(i - first) * h.width];
                    std::copy(from, from + value, out + ((start + i) * heads + head) * value);
                }
            }
        }
    }
}

// Gradients of q, kv and rope_keys, each written whole, from that of out.
void varlen_attention_backward(const float* grad, const float* q, const float* kv, const float* rope_keys, const float* freqs_cis,
                     const Index* starts, const Index* lengths, Index num_docs, Index heads, Index nope, Index rope,
                     Index value, Index row_length, float scale, const float* log_sum, float* grad_q, float* grad_kv,
                     float* grad_rope_keys) {
    const Shape s{heads, nope, rope, value, row_length, scale};
    const Index max_seqlen = longest_length(lengths, num_docs);
    Head h;
    h.prepare(s, max_seqlen, true);
    std::vector<float> rotated(max_seqlen * rope), rotated_grad(max_seqlen * rope), out_grad(kRows * h.width);
    std::vector<float> key_grad(max_seqlen * h.depth), value_grad(max_seqlen * h.width);
    for (Index d = 0; d < num_docs; ++d) {
        const Index start = starts[d], length = lengths[d];
        rotate_keys(s, rope_keys, freqs_cis, start, length, rotated.data());
        std::fill(rotated_grad.begin(), rotated_grad.end(), 0.0f);
        for (Index head = 0; head < heads; ++head) {
            h.fill(s, q, kv, rotated.data(), freqs_cis, start, length, head, true);
            std::fill(key_grad.begin(), key_grad.end(), 0.0f);
            std::fill(value_grad.begin(), value_grad.end(), 0.0f);
            for (Index first = 0; first < length; first += kRows) {
                const Index count = std::min(first + kRows, length), wide = round_up(count, kKeys);
                std::fill(out_grad.begin(), out_grad.end(), 0.0f);
                for (Index i = first; i < count; ++i) {
                    const float* from = grad + ((start + i) * heads + head) * value;
                    std::copy(from, from + value, &out_grad[(i - first) * h.width]);
                }
                float* query = &h.query[first * h.depth];
                product(query, h.depth, h.key_t.data(), h.keys, h.depth, wide, h.scores.data(), h.keys);
                product(out_grad.data(), h.width, h.value_t.data(), h.keys, value, wide, h.grads.data(), h.keys);
                for (Index r = 0; r < kRows; ++r) {
                    float *p = &h.scores[r * h.keys], *g = &h.grads[r * h.keys];
                    const Index visible = first + r < length ? first + r + 1 : 0;
                    const float norm = visible ? log_sum[(start + first + r) * heads + head] : 0.0f;
                    float dot = 0.0f;
                    for (Index j = 0; j < visible; ++j) {
                        p[j] = exponential(p[j] * scale - norm);
                        dot += p[j] * g[j];
                    }
                    for (Index j = 0; j < visible; ++j) g[j] = p[j] * (g[j] - dot) * scale;
                    std::fill(p + visible, p + wide, 0.0f);
                    std::fill(g + visible, g + wide, 0.0f);
                }
                update(h.scores.data(), h.keys, out_grad.data(), h.width, count, h.width, value_grad.data(), h.width);
                update(h.grads.data(), h.keys, query, h.depth, count, h.depth, key_grad.data(), h.depth);
                product(h.grads.data(), h.keys, h.key.data(), h.depth, count, h.depth, h.out.data(), h.depth);
                for (Index i = first; i < count; ++i) {
                    const Index n = start + i;
                    const float* from = &h.out[(i - first) * h.depth];
                    float* to = grad_q + (n * heads + head) * s.query();
                    std::copy(from, from + nope, to);
                    rotate(from + nope, freqs_cis + (n % row_length) * rope, rope, to + nope, true);
                }
            }
            for (Index i = 0; i < length; ++i) {
                float* to = grad_kv + ((start + i) * heads + head) * s.kv_width();
                const float* from = &key_grad[i * h.depth];
                std::copy(from, from + nope, to);
                std::copy(&value_grad[i * h.width], &value_grad[i * h.width] + value, to + nope);
                for (Index c = 0; c < rope; ++c) rotated_grad[i * rope + c] += from[nope + c];
            }
        }
        for (Index i = 0; i < length; ++i) {
            const Index n = start + i;
            rotate(&rotated_grad[i * rope], freqs_cis + (n % row_length) * rope, rope, grad_rope_keys + n * rope, true);
        }
    }
}

}  // extern "C"
