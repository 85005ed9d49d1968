// Attention over a paged KV cache, grouped heads and latents alike: a tile of query rows walks over the blocks of one
// sequence once, with the softmax carried along (FlashAttention, arXiv 2205.14135).
//
// Layout. A block holds 64 tokens in four panels of 16; a panel holds one channel of its 16 tokens side by side. So scores
// need no sums across lanes (a channel of the query meets 16 keys), and neither do the weighted values: each lane sums the
// tokens of its own slot, and lanes are added once, after the last block. Latent attention reads the same numbers as keys
// and as values, with no second copy turned the other way.
//
// Each row does the same operations in the same order whichever rows inv_sum its tile.
#pragma once
#include <algorithm>
#include <cmath>

#include "simd.h"

namespace sprat {

constexpr Index kBlock = 64, kPanels = kBlock / kLanes;
constexpr int kQueries = 6;  // query rows of a tile: 24 sums of scores

struct Float32 {
    using Type = float;
    static Lane get(const Type* p) { return load(p); }
    static Type make(float x) { return x; }
};
struct Float16 {
    using Type = std::uint16_t;
    static Lane get(const Type* p) { return load_half(p); }
    static Type make(float x) { return float_to_half(x); }
};

// Where one key head's tokens lie: block b at blocks[table[b]] + offset; keys [panel][key channel][16], values the same
// from `values` on, with `value_width` channels to a panel (for latents: the keys themselves, values = 0).
template <class Format>
struct PagedKV {
    const typename Format::Type* data;
    Index block_stride, offset, values;
    Index key_width, value_width, value_panel;  // value_panel: elements from one panel of values to the next
    const std::int32_t* table;
    Index window;  // keys that a row sees, up to its last one; 0: all

    const typename Format::Type* keys(Index block) const { return data + table[block] * block_stride + offset; }
};

// Store the channel values of one token in its slot; `panel` elements from one panel to the next.
template <class Format>
inline void store_token(typename Format::Type* at, Index panel, Index slot, const float* x, Index width) {
    at += slot / kLanes * panel + slot % kLanes;
    for (Index c = 0; c < width; ++c) at[c * kLanes] = Format::make(x[c]);
}

constexpr Index kSpan = 512;  // keys whose scores are held at once; the softmax is carried from span to span

// Scratch memory of one tile.
struct AttentionScratch {
    float* queries;  // [key_width, rows], channel by channel
    float* scores;   // [rows, kSpan]
    float* sums;     // [value_width, rows, 16], between spans
    static Index count(Index key_width, Index value_width) {
        return kQueries * (key_width + kSpan + value_width * kLanes) + 3 * kLanes;
    }
    AttentionScratch(float* at, Index key_width)
        : queries(at), scores(at + (kQueries * key_width + kLanes - 1) / kLanes * kLanes), sums(scores + kQueries * kSpan) {}
};

// Scores of the first `panels` panels of a block: scratch.scores[r][from …] = q . k.
template <class Format, int rows, int panels>
inline void score_panels(const typename Format::Type* keys, Index wide, const AttentionScratch& scratch, Index from) {
    Lane sum[rows][panels];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < panels; ++p) sum[r][p] = zero();
    }
    for (Index c = 0; c < wide; ++c) {
        Lane key[panels];
#pragma GCC unroll 4
        for (int p = 0; p < panels; ++p) key[p] = Format::get(keys + (p * wide + c) * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Lane q = all(scratch.queries[c * rows + r]);
#pragma GCC unroll 4
            for (int p = 0; p < panels; ++p) sum[r][p] = fma(q, key[p], sum[r][p]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < panels; ++p) store(scratch.scores + r * kSpan + from + p * kLanes, sum[r][p]);
    }
}

template <class Format, int rows>
inline void score_block(const typename Format::Type* keys, Index wide, const AttentionScratch& scratch, Index from, Index held) {
    switch ((held + kLanes - 1) / kLanes) {
        case 1: return score_panels<Format, rows, 1>(keys, wide, scratch, from);
        case 2: return score_panels<Format, rows, 2>(keys, wide, scratch, from);
        case 3: return score_panels<Format, rows, 3>(keys, wide, scratch, from);
        default: return score_panels<Format, rows, 4>(keys, wide, scratch, from);
    }
}

// Scores of one row, which sees keys hidden … valid - 1 of them, to unnormalized weights; returns the factor that brings
// earlier spans to the new largest score.
inline float softmax_row(float* score, Index hidden, Index valid, Index held, float& max_score, Lane& sum_exp) {
    if (valid <= hidden) {
        std::memset(score, 0, static_cast<std::size_t>(held) * sizeof(float));
        return 1.0f;
    }
    const Index full = (valid + kLanes - 1) / kLanes * kLanes;
    for (Index k = valid; k < full; ++k) score[k] = -INFINITY;
    for (Index k = 0; k < hidden; ++k) score[k] = -INFINITY;
    Lane most = load(score);
    for (Index k = kLanes; k < full; k += kLanes) most = max(most, load(score + k));
    const float peak = largest(most);
    float factor = 1.0f;
    if (peak > max_score) {
        alignas(64) float shrink[kLanes];
        store(shrink, exponential(all(max_score - peak)));
        factor = max_score == -INFINITY ? 0.0f : shrink[0];
        sum_exp = mul(sum_exp, all(factor));
        max_score = peak;
    }
    const Lane low = all(max_score);
    for (Index k = 0; k < full; k += kLanes) {
        Lane e = exponential(sub(load(score + k), low));
        if (valid - k < kLanes) e = first_lanes(e, valid - k);
        if (k < hidden) e = sub(e, first_lanes(e, std::min<Index>(hidden - k, kLanes)));
        store(score + k, e);
        sum_exp = add(sum_exp, e);
    }
    if (held > full) std::memset(score + full, 0, static_cast<std::size_t>(held - full) * sizeof(float));
    return factor;
}

// `some` channels of the weighted values, from channel c on, over the panels of one span.
template <class Format, int rows, int some>
inline void accumulate_values(const PagedKV<Format>& at, Index start, Index held, Index c, const float* factor, bool first, bool last,
                         const float* inv_sum, float* const* out, const AttentionScratch& scratch) {
    Lane sum[rows][some];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int k = 0; k < some; ++k) sum[r][k] = first ? zero() : mul(load(scratch.sums + ((c + k) * rows + r) * kLanes), all(factor[r]));
    }
    for (Index p = 0; p * kLanes < held; ++p) {
        const Index key = start + p * kLanes;
        const auto* values = at.keys(key / kBlock) + at.values + key % kBlock / kLanes * at.value_panel + c * kLanes;
        Lane value[some];
#pragma GCC unroll 4
        for (int k = 0; k < some; ++k) value[k] = Format::get(values + k * kLanes);
        if (held - p * kLanes < kLanes) {
            // What lies behind the last token was written by nobody, or by another request: it is not read.
            for (int k = 0; k < some; ++k) value[k] = first_lanes(value[k], held - p * kLanes);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Lane weight = load(scratch.scores + r * kSpan + p * kLanes);
#pragma GCC unroll 4
            for (int k = 0; k < some; ++k) sum[r][k] = fma(weight, value[k], sum[r][k]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        if (!last) {
#pragma GCC unroll 4
            for (int k = 0; k < some; ++k) store(scratch.sums + ((c + k) * rows + r) * kLanes, sum[r][k]);
            continue;
        }
        float four[4];
        totals(sum[r][0], sum[r][some > 1 ? 1 : 0], sum[r][some > 2 ? 2 : 0], sum[r][some > 3 ? 3 : 0], four);
        for (int k = 0; k < some; ++k) out[r][c + k] = four[k] * inv_sum[r];
    }
}

// The first key that the last of `visible` keys lets see through a window; 0: no window.
inline Index first_visible(Index visible, Index window) { return window && visible > window ? visible - window : 0; }

// Where the first span begins that holds a key of one of these rows. Spans begin at the same keys for all rows, so that a row's
// bits do not depend on who shares its tile.
inline Index first_span(const std::int32_t* visible, Index rows, Index window) {
    Index first = first_visible(visible[0], window);
    for (Index r = 1; r < rows; ++r) first = std::min(first, first_visible(visible[r], window));
    return first / kSpan * kSpan;
}

// out[r][value_width] of `rows` rows: softmax(q . k) v over keys first_visible … visible[r] - 1. Queries are scaled already.
template <class Format, int rows>
void paged_attention_rows(const PagedKV<Format>& at, const float* const* query, const std::int32_t* visible, float* const* out, const AttentionScratch& scratch) {
    const Index wide = at.key_width, deep = at.value_width, begin = first_span(visible, rows, at.window);
    Index last = 0;
    float max_score[rows], factor[rows], inv_sum[rows];
    Lane sum_exp[rows];
    for (int r = 0; r < rows; ++r) {
        last = visible[r] > last ? visible[r] : last;
        max_score[r] = -INFINITY, sum_exp[r] = zero();
        for (Index c = 0; c < wide; ++c) scratch.queries[c * rows + r] = query[r][c];
    }
    for (Index start = begin; start < last; start += kSpan) {
        const Index held = last - start < kSpan ? last - start : kSpan;
        for (Index from = 0; from < held; from += kBlock) {
            const auto* keys = at.keys((start + from) / kBlock);
            // Values are read a few channels at a time, across blocks: that order no processor foresees.
            if (at.values) prefetch_l2(keys + at.values, kBlock * deep * static_cast<Index>(sizeof *keys));
            score_block<Format, rows>(keys, wide, scratch, from, held - from);
        }
        const Index padded = (held + kLanes - 1) / kLanes * kLanes;
        for (int r = 0; r < rows; ++r) {
            const Index hidden = std::max<Index>(first_visible(visible[r], at.window) - start, 0);
            factor[r] = softmax_row(scratch.scores + r * kSpan, hidden, visible[r] - start < held ? visible[r] - start : held, padded, max_score[r], sum_exp[r]);
            inv_sum[r] = 1.0f / total(sum_exp[r]);
        }
        const bool ends = start + kSpan >= last;
        Index c = 0;
        for (; c + 4 <= deep; c += 4) accumulate_values<Format, rows, 4>(at, start, held, c, factor, start == begin, ends, inv_sum, out, scratch);
        for (; c < deep; ++c) accumulate_values<Format, rows, 1>(at, start, held, c, factor, start == begin, ends, inv_sum, out, scratch);
    }
}

template <class Format>
void paged_attention(const PagedKV<Format>& at, const float* const* query, const std::int32_t* visible, float* const* out, Index rows, const AttentionScratch& scratch) {
    switch (rows) {
        case 1: return paged_attention_rows<Format, 1>(at, query, visible, out, scratch);
        case 2: return paged_attention_rows<Format, 2>(at, query, visible, out, scratch);
        case 3: return paged_attention_rows<Format, 3>(at, query, visible, out, scratch);
        case 4: return paged_attention_rows<Format, 4>(at, query, visible, out, scratch);
        case 5: return paged_attention_rows<Format, 5>(at, query, visible, out, scratch);
        default: return paged_attention_rows<Format, 6>(at, query, visible, out, scratch);
    }
}

}  // namespace sprat
