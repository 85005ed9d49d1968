// Attention over an int8 KV cache: scores and weighted values by integer dot products, four times the multiplications of
// floats at a quarter of the bytes of float32. This is what keeps decoding fast at long contexts, where a latent model on a CPU is
// bound by arithmetic: every head meets every latent.
//
// A token's latent (or key, or value) has one scale, the rotary part of a latent key its own. Four channels of 16 tokens
// make the 64 bytes of one dot instruction, as in weights. For the weighted values four *tokens* of 16 channels are
// needed: those are made on the way by turning 4 x 4 bytes, so that latents are kept once. Weights of a span are rounded to seven
// bits of their largest, each token's scale included. Rows do not depend on each other.
//
// Each span stands alone, with a largest score of its own, and spans are joined in the order of the keys. So bits do not depend
// on whether one thread walks over a sequence or several share its spans (arXiv 2311.01282, section 3).
#pragma once
#include "paged_attention.h"

namespace sprat {

constexpr int kInt8Queries = 8;

// One key head's tokens: channels [0, wide) and [wide, wide + more) have a scale each (more = 0: one scale). Values lie
// `values` bytes on with a scale of their own, or are the keys' first part (values = 0).
struct PagedKVInt8 {
    const std::uint8_t* data;
    Index block_stride, offset, values, wide, more, deep;
    const std::int32_t* table;
    Index window;  // keys that a row sees, up to its last one; 0: all

    static Index bytes(Index channels, Index scales) { return kBlock * channels + kBlock * scales * 4; }
    const std::uint8_t* block(Index at) const { return data + table[at] * block_stride + offset; }
};

// The scales of panel `panel` behind a block's codes: [panel][part][16] floats.
inline const float* scales_of(const std::uint8_t* codes, Index channels, Index parts, Index panel, Index part) {
    return reinterpret_cast<const float*>(codes + kBlock * channels) + (panel * parts + part) * kLanes;
}

inline float largest_of(const float* x, Index n) {
    Lane top = zero();
    Index c = 0;
    for (; c + kLanes <= n; c += kLanes) top = max(top, absolute(load(x + c)));
    if (c < n) top = max(top, absolute(load_some(x + c, n - c)));
    return largest(top);
}

// Round one part of a token into its slot.
inline void store_token_i8(std::uint8_t* codes, Index channels, Index parts, Index part, Index first, Index slot, const float* x, Index width) {
    const Index panel = slot / kLanes, lane = slot % kLanes;
    const float top = largest_of(x, width), inverse = top > 0.0f ? 127.0f / top : 0.0f;
    std::uint8_t* at = codes + panel * channels * kLanes + lane * 4;
    for (Index c = 0; c < width; ++c) {
        const Index to = first + c;
        at[to / 4 * 64 + to % 4] = static_cast<std::uint8_t>(128 + static_cast<int>(std::nearbyint(x[c] * inverse)));
    }
    const_cast<float*>(scales_of(codes, channels, parts, panel, part))[lane] = top / 127.0f;
}

// What keys give a row: the sum of values by weights exp(score - top), and the sum of these weights.
struct PartialSoftmax {
    float max_score, sum_exp;
    float* sums;  // [deep]
};

// Add what later keys give.
inline void merge(PartialSoftmax& to, const PartialSoftmax& more, Index deep) {
    if (more.sum_exp == 0.0f) return;  // none that the row may see
    if (to.sum_exp == 0.0f) {
        to.max_score = more.max_score, to.sum_exp = more.sum_exp;
        std::memcpy(to.sums, more.sums, static_cast<std::size_t>(deep) * sizeof(float));
        return;
    }
    const float top = std::max(to.max_score, more.max_score);
    const Lane old = exponential(all(to.max_score - top)), fresh = exponential(all(more.max_score - top));
    alignas(64) float mass[kLanes];
    store(mass, fma(all(to.sum_exp), old, mul(all(more.sum_exp), fresh)));
    to.max_score = top, to.sum_exp = mass[0];
    for (Index c = 0; c < deep; c += kLanes) store(to.sums + c, fma(load(to.sums + c), old, mul(load(more.sums + c), fresh)));
}

// Values weighted to a mass of one.
inline void normalize(const PartialSoftmax& part, Index deep, float* out) {
    const Lane inv_sum = all(1.0f / part.sum_exp);
    for (Index c = 0; c < deep; c += kLanes) store(out + c, mul(load(part.sums + c), inv_sum));
}

struct Int8AttentionScratch {
    std::int8_t *queries, *weights;  // [channel / 4, rows, 4], [token / 4, rows, 4]
    float *scores, *sums;            // [rows, kSpan], [rows, deep]
    static Index count(Index channels, Index deep) {
        return kInt8Queries * ((channels + kSpan) / 4 + kSpan + deep) + 4 * kLanes;
    }
    Int8AttentionScratch(float* at, Index channels) {
        scores = at;
        sums = nullptr;
        queries = reinterpret_cast<std::int8_t*>(scores + kInt8Queries * kSpan);
        weights = queries + kInt8Queries * channels;
        sums = reinterpret_cast<float*>(weights + kInt8Queries * kSpan);
    }
};

// Round `width` numbers (a multiple of 4), none above `top`, to [.. / 4, rows, 4] with one scale; what the offset 128 of
// the codes starts a sum with.
template <int rows>
inline std::int32_t round_part(const float* x, Index width, float top, int row, std::int8_t* out, float* scale) {
    const Lane inverse = all(top > 0.0f ? 127.0f / top : 0.0f);
    Ints sum = repeat(0);
    alignas(64) std::int8_t codes[kLanes];
    for (Index c = 0; c < width; c += kLanes) {
        const Index some = std::min<Index>(kLanes, width - c);
        const Ints whole = nearest(mul(some == kLanes ? load(x + c) : load_some(x + c, some), inverse));
        sum = add(sum, whole);
        store_codes(codes, whole);
        for (Index i = 0; i < some; i += 4) std::memcpy(out + ((c + i) / 4 * rows + row) * 4, codes + i, 4);
    }
    *scale = top / 127.0f;
    return -128 * total(sum);
}

template <int rows>
inline void dot_panels(const std::uint8_t* codes, Index channels, Index from, Index to, const std::int8_t* queries, const std::int32_t* start,
                       const std::uint8_t* ahead, Ints (*out)[2]) {
    Ints sum[rows][2];  // in registers: what is behind a pointer is stored in every iteration
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = repeat(start[r]);
    for (Index c = from; c < to; ++c) {
        const Bytes one = load_bytes(codes + c * 64), two = load_bytes(codes + channels * kLanes + c * 64);
        const std::int8_t* q = queries + c * rows * 4;
        prefetch_l2(ahead + c * 64, 64), prefetch_l2(ahead + channels * kLanes + c * 64, 64);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) sum[r][0] = dot(sum[r][0], one, q + 4 * r), sum[r][1] = dot(sum[r][1], two, q + 4 * r);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) out[r][0] = sum[r][0], out[r][1] = sum[r][1];
}

// scratch.scores[r][…] of the keys from `start` on, a span of them or up to `last`.
template <int rows>
inline void score_span(const PagedKVInt8& at, const std::int32_t (*offset)[rows], const float (*scale)[rows], Index start, Index last, const Int8AttentionScratch& scratch) {
    const Index channels = at.wide + at.more, parts = at.more ? 2 : 1, held = std::min(last - start, kSpan);
    for (Index from = 0; from < held; from += 2 * kLanes) {
        const std::uint8_t* block = at.block((start + from) / kBlock);
        const Index panel = from % kBlock / kLanes;
        const std::uint8_t* codes = block + panel * channels * kLanes;
        // The next block may lie anywhere, so no processor looks that far.
        const bool more = start + from + kBlock < last;
        const std::uint8_t* ahead = more ? at.block((start + from) / kBlock + 1) + panel * channels * kLanes : codes;
        if (more && at.values) prefetch_l2(ahead + at.values - panel * (channels - at.deep) * kLanes, 2 * at.deep * kLanes);
        Ints sum[rows][2];
        dot_panels<rows>(codes, channels, 0, at.wide / 4, scratch.queries, offset[0], ahead, sum);
        for (int k = 0; k < 2; ++k) {
            const Lane by = load(scales_of(block, channels, parts, panel + k, 0));
            for (int r = 0; r < rows; ++r) store(scratch.scores + r * kSpan + from + k * kLanes, mul(mul(to_float(sum[r][k]), by), all(scale[0][r])));
        }
        if (!at.more) continue;
        dot_panels<rows>(codes, channels, at.wide / 4, channels / 4, scratch.queries, offset[1], ahead, sum);
        for (int k = 0; k < 2; ++k) {
            const Lane by = load(scales_of(block, channels, parts, panel + k, 1));
            for (int r = 0; r < rows; ++r) {
                float* score = scratch.scores + r * kSpan + from + k * kLanes;
                store(score, fma(mul(to_float(sum[r][k]), by), all(scale[1][r]), load(score)));
            }
        }
    }
}

// What these keys give, by their scores.
template <int rows>
void accumulate_span(const PagedKVInt8& at, const std::int32_t* visible, Index start, Index last, PartialSoftmax* to, const Int8AttentionScratch& scratch) {
    const Index value_channels = at.values ? at.deep : at.wide + at.more, value_parts = at.values || !at.more ? 1 : 2;
    const Index held = std::min(last - start, kSpan), padded = (held + kLanes - 1) / kLanes * kLanes;
    std::int32_t begin[rows];
    float unit[rows];
    for (int r = 0; r < rows; ++r) {
        float* score = scratch.scores + r * kSpan;
        Lane mass = zero();
        to[r].max_score = -INFINITY;
        const Index hidden = std::max<Index>(first_visible(visible[r], at.window) - start, 0);
        softmax_row(score, hidden, std::min<Index>(visible[r] - start, held), padded, to[r].max_score, mass);
        to[r].sum_exp = total(mass);
        Lane most = zero();
        for (Index k = 0; k < padded; k += kLanes) {
            const Index panel = k % kBlock / kLanes;
            const std::uint8_t* block = at.block((start + k) / kBlock) + at.values;
            Lane by = load(scales_of(block, value_channels, value_parts, panel, 0));
            if (held - k < kLanes) by = first_lanes(by, held - k);
            const Lane weight = mul(load(score + k), by);
            most = max(most, weight);
            store(score + k, weight);
        }
        begin[r] = round_part<rows>(score, padded, largest(most), r, scratch.weights, &unit[r]);
    }
    for (Index c = 0; c < at.deep; c += kLanes) {
        Ints sum[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) sum[r] = repeat(begin[r]);
        for (Index k = 0; k < padded; k += kLanes) {
            const std::uint8_t* block = at.block((start + k) / kBlock) + at.values;
            Bytes transposed[4];
            transpose_bytes(block + k % kBlock * value_channels + c * kLanes, transposed);
            const std::int8_t* weights = scratch.weights + k * rows;
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 8
                for (int r = 0; r < rows; ++r) sum[r] = dot(sum[r], transposed[q], weights + (q * rows + r) * 4);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) store(to[r].sums + c, mul(to_float(sum[r]), all(unit[r])));
    }
}

template <int rows>
void paged_attention_i8_rows(const PagedKVInt8& at, const float* const* query, const std::int32_t* visible, Index first, Index last, PartialSoftmax* to,
                       const Int8AttentionScratch& scratch) {
    std::int32_t offset[2][rows];
    float scale[2][rows];
    for (int r = 0; r < rows; ++r) {
        offset[0][r] = round_part<rows>(query[r], at.wide, largest_of(query[r], at.wide), r, scratch.queries, &scale[0][r]);
        if (!at.more) continue;
        const float* rest = query[r] + at.wide;
        offset[1][r] = round_part<rows>(rest, at.more, largest_of(rest, at.more), r, scratch.queries + at.wide * rows, &scale[1][r]);
    }
    score_span<rows>(at, offset, scale, first, last, scratch);
    accumulate_span<rows>(at, visible, first, last, to, scratch);
    for (Index start = first + kSpan; start < last; start += kSpan) {
        PartialSoftmax more[rows];
        for (int r = 0; r < rows; ++r) more[r].sums = scratch.sums + r * at.deep;
        score_span<rows>(at, offset, scale, start, last, scratch);
        accumulate_span<rows>(at, visible, start, last, more, scratch);
        for (int r = 0; r < rows; ++r) merge(to[r], more[r], at.deep);
    }
}

// What keys first … last - 1 give each row, of which row r may see those before visible[r], as far back as the window reaches;
// `first` begins a span.
inline void paged_attention_i8(const PagedKVInt8& at, const float* const* query, const std::int32_t* visible, Index first, Index last, PartialSoftmax* to,
                         Index rows, const Int8AttentionScratch& scratch) {
    switch (rows) {
        case 1: return paged_attention_i8_rows<1>(at, query, visible, first, last, to, scratch);
        case 2: return paged_attention_i8_rows<2>(at, query, visible, first, last, to, scratch);
        case 3: return paged_attention_i8_rows<3>(at, query, visible, first, last, to, scratch);
        case 4: return paged_attention_i8_rows<4>(at, query, visible, first, last, to, scratch);
        case 5: return paged_attention_i8_rows<5>(at, query, visible, first, last, to, scratch);
        case 6: return paged_attention_i8_rows<6>(at, query, visible, first, last, to, scratch);
        case 7: return paged_attention_i8_rows<7>(at, query, visible, first, last, to, scratch);
        default: return paged_attention_i8_rows<8>(at, query, visible, first, last, to, scratch);
    }
}

}  // namespace sprat
