// y = W x for weights of four kinds of class, one tile of rows at a time.
//
// Codes. A quantized matrix is cut into panels of 16 outputs. Inside a panel a group of 32 inputs lies together; four inputs
// of 16 outputs make the 64 bytes that one dot instruction eats (two such sets share 64 bytes at four bits: low nibbles
// the first, high nibbles the second). Codes are stored unsigned (+8 or +128). Inputs are rounded to signed bytes
// with one scale for every 32 (as llama.cpp's Q8_0 does), so a group's sum is an exact integer, and one product with
// both scales brings it back. What the offset of the codes adds is known before: it starts the sum.
//
// Outliers. Where one input of a group is so large that a scale for it would crush the other 31, it is left out of the scale
// and meets its weights as a float (after LLM.int8(), arXiv 2208.07339, which does so with whole channels). Few channels
// of a trained model are like that, in almost every row: it costs some per cent of a product and takes away two thirds or
// more of the divergence that rounding brings about. A row chooses by its own values only.
//
// Why integers also for prompts: with twelve rows to a tile, unpacking is paid once for twelve products, so
// four-bit weights in groups cost three instructions on top of eight products, and no second copy of the weights for long
// prompts (per-channel INT8, the usual way) is needed. Nor is there a second arithmetic: a row's result is
// the same alone or among 512.
//
// Floats. A float32, bfloat16 or float16 matrix is used where it lies, row by row: training weights need no packing.
#pragma once
#include <algorithm>
#include <cstddef>

#include "simd.h"

namespace sprat {

enum class WeightType : int { f32 = 0, bf16 = 1, f16 = 2, int8 = 3, int4 = 4, int4_min = 5 };

constexpr Index kGroup = 32;  // inputs that share a scale

// What one adapter adds to a product: B (A x), with the scale taken into B.
struct LowRank {
    Index rank = 0, stride = 0;  // rank 0: the adapter leaves the matrix alone; stride: outputs, up to whole panels
    const float *a = nullptr;    // [rank, inputs]
    const float *b = nullptr;    // the transpose of B, [rank, stride]
};

struct Matrix {
    WeightType kind = WeightType::f32;
    Index rows = 0, cols = 0, group = kGroup;   // group: inputs that share a scale of weights; a multiple of 32
    const std::uint8_t* data = nullptr;         // panels of codes, or rows of floats
    const std::uint16_t* scales = nullptr;      // float16 [panels, groups, 16]
    const std::uint16_t* minimums = nullptr;    // the same, for int4_min
    const float* bias = nullptr;                // [rows] or none
    const LowRank* adapters = nullptr;          // what each adapter adds, or none

    bool quantized() const { return kind >= WeightType::int8; }
    Index padded() const { return (cols + kGroup - 1) / kGroup * kGroup; }
    Index panels() const { return (rows + kLanes - 1) / kLanes; }
    Index groups() const { return (padded() + group - 1) / group; }
    Index panel_bytes() const { return padded() * kLanes / (kind == WeightType::int8 ? 1 : 2); }
    Index bytes() const { return quantized() ? panels() * panel_bytes() : rows * cols * (kind == WeightType::f32 ? 4 : 2); }
    Index scale_bytes() const { return panels() * groups() * kLanes * 2; }
};

// How rows are cut into tiles: as few as may be, of sizes that differ by one at most.
struct Tiling {
    Index rows, tiles;
    Tiling(Index rows, Index most) : rows(rows), tiles((rows + most - 1) / most) {}
    Index start(Index tile) const { return rows / tiles * tile + std::min(tile, rows % tiles); }
    Index size(Index tile) const { return rows / tiles + (tile < rows % tiles ? 1 : 0); }
};

// An input that its group's scale leaves out: its code is zero, and it meets its column of weights as a float.
struct Outlier {
    std::uint32_t bit;  // within the group, as a bit; 0: there is none
    float value;
};

// Rows rounded to bytes, tile by tile: codes as [input / 4][row][4]; for each group of 32 inputs the rows' scales, what
// the offset 8 of the codes starts a sum with, and the rows' sums (scaled), as [group][3][row]; outliers as [group][row],
// and the outlier bits of all rows as [group]. `list_outliers` makes a list of those: how many columns of weights they meet, then for
// each of them its input, ascending, and what each row has there: few columns are met by almost all rows.
struct QuantizedRows {
    static constexpr Index kListed = kTile + 2;  // numbers of the list for each group of a row; it never needs more
    std::int8_t* codes;
    float* stats;
    Outlier* outliers;
    std::uint32_t* outlier_bits;
    float* lists;
    Index padded;

    Index groups() const { return padded / kGroup; }
    QuantizedRows after(Index rows) const { return {tile_codes(rows), tile_stats(rows), tile_outliers(rows), tile_outlier_bits(rows), tile_list(rows), padded}; }
    std::int8_t* tile_codes(Index start) const { return codes + start * padded; }
    float* tile_stats(Index start) const { return stats + start * groups() * 3; }
    Outlier* tile_outliers(Index start) const { return outliers + start * groups(); }
    std::uint32_t* tile_outlier_bits(Index start) const { return outlier_bits + start * groups(); }
    float* tile_list(Index start) const { return lists + start * groups() * kListed; }
};

inline std::int32_t load_int(const float* p) {
    std::int32_t out;
    std::memcpy(&out, p, 4);
    return out;
}
inline void store_int(float* p, Index x) {
    const auto small = static_cast<std::int32_t>(x);
    std::memcpy(p, &small, 4);
}

// What the largest input of a group must stand above the others by to be left out of their scale: as a share of the squares
// of the row's groups (each its largest; error goes by that square, so this is the share of a row's error that the outlier
// would be to blame for), or, where only the group is known, all others must be within a fifth of it.
constexpr float kRowShare = 0.07f, kOwnShare = 0.2f;

// 32 inputs of a row, zero beyond `have`.
struct Group {
    Lane a, b;

    Group(const float* x, Index have)
        : a(have >= 16 ? load(x) : load_some(x, std::max<Index>(have, 0))),
          b(have >= 32 ? load(x + 16) : have > 16 ? load_some(x + 16, have - 16) : zero()) {}
    float top() const { return largest(max(absolute(a), absolute(b))); }
};

// Round a group, whose largest absolute value is `top`, into row `row` of a tile of `size` rows. `out`: what it leaves out.
// Inlined by order: handed over in memory its lanes take twice the time.
[[gnu::always_inline]] inline void round_group(const Group& x, float top, const Outlier& out, const QuantizedRows& to, Index tile_start, Index group, Index row, Index size) {
    to.tile_outliers(tile_start)[group * size + row] = out;
    std::uint32_t& outlier_bits = to.tile_outlier_bits(tile_start)[group];
    outlier_bits = row ? outlier_bits | out.bit : out.bit;
    const float scale = top * (1.0f / 127.0f), inverse = top > 0.0f ? 127.0f / top : 0.0f;
    alignas(64) std::int8_t small[32];
    const Ints a = nearest(mul(x.a, all(inverse))), b = nearest(mul(x.b, all(inverse)));
    store_codes(small, a), store_codes(small + 16, b);
    const std::int32_t sum = total(add(a, b));
    std::int8_t* codes = to.tile_codes(tile_start) + (group * 8 * size + row) * 4;
    for (int i = 0; i < 8; ++i) std::memcpy(codes + i * size * 4, small + 4 * i, 4);
    float* stat = to.tile_stats(tile_start) + group * 3 * size;
    stat[row] = scale;
    store_int(stat + size + row, -8 * sum);
    stat[2 * size + row] = scale * static_cast<float>(sum);
}

// A group whose row is not known as a whole.
inline void quantize_group(const float* from, Index have, const QuantizedRows& to, Index tile_start, Index group, Index row, Index size) {
    Group x(from, have);
    Outlier out{0, 0.0f};
    float top = x.top();
    if (const std::uint32_t above = lanes_above(x.a, x.b, kOwnShare * top); above && !(above & (above - 1))) {
        out = {above, from[clear_first(x.a, x.b, top)]};
        top = x.top();
    }
    round_group(x, top, out, to, tile_start, group, row, size);
}

inline void quantize_row(const float* x, Index cols, const QuantizedRows& to, Index tile_start, Index row, Index size) {
    float* tops = to.tile_stats(tile_start) + row;  // where the stats come afterwards
    float squares = 0.0f;
    for (Index g = 0; g < to.groups(); ++g) {
        const float top = tops[g * 3 * size] = Group(x + g * kGroup, cols - g * kGroup).top();
        squares += top * top;
    }
    const float bar = kRowShare * squares;
    for (Index g = 0; g < to.groups(); ++g) {
        Group one(x + g * kGroup, cols - g * kGroup);
        Outlier out{0, 0.0f};
        float top = tops[g * 3 * size];
        if (top * top > bar) {  // at most 1 / kRowShare groups of a row
            Group rest = one;
            const int at = clear_first(rest.a, rest.b, top);
            const float next = rest.top();
            if (top * top - next * next > bar) out = {1u << at, x[g * kGroup + at]}, one = rest, top = next;
        }
        round_group(one, top, out, to, tile_start, g, row, size);
    }
}

// The list of a tile's outliers. A row meets its own in ascending order, whoever is beside it: what others bring it is
// a product with zero.
inline void list_outliers(const QuantizedRows& to, Index tile_start, Index size) {
    const std::uint32_t* outlier_bits = to.tile_outlier_bits(tile_start);
    float *list = to.tile_list(tile_start), *at = list + 1;
    Index columns = 0;
    for (Index g = 0; g < to.groups(); ++g) {
        const Outlier* row = to.tile_outliers(tile_start) + g * size;
        for (std::uint32_t left = outlier_bits[g]; left; left &= left - 1, ++columns) {
            store_int(at++, g * kGroup + __builtin_ctz(left));
            for (Index r = 0; r < size; ++r) *at++ = row[r].bit == (left & -left) ? row[r].value : 0.0f;
        }
    }
    store_int(list, columns);
}

// Round a tile of rows; `row_at(r)` is where row `r` of it lies.
template <class F>
void quantize_tile(const F& row_at, Index cols, const QuantizedRows& to, Index start, Index size) {
    for (Index r = 0; r < size; ++r) quantize_row(row_at(r), cols, to, start, r, size);
    list_outliers(to, start, size);
}

// Few rows wait for memory: weights are asked for this far ahead, across the pages at which processors stop looking.
constexpr Index kAhead = 2048;
constexpr int kFew = 8;

// Where a panel begins.
struct PanelAt {
    const std::uint8_t* codes;
    const std::uint16_t *scales, *minimums;
    std::uint32_t per;  // groups of inputs to a scale
};

// What the weights of one input are, for the 16 outputs of a panel.
template <WeightType kind>
inline Lane column(const PanelAt& w, std::uint32_t input) {
    const std::uint32_t group = input / kGroup, scale_at = (w.per == 1 ? group : group / w.per) * kLanes;
    const Lane scale = load_half(w.scales + scale_at);
    const std::uint32_t shift = input % 4 * 8;
    if constexpr (kind == WeightType::int8) return mul(sub(field(w.codes + input / 4 * 64, shift, 255), all(128.0f)), scale);
    const Lane code = field(w.codes + input / 8 * 64, shift + (input & 4), 15);
    if constexpr (kind == WeightType::int4) return mul(sub(code, all(8.0f)), scale);
    return fma(code, scale, load_half(w.minimums + scale_at));
}

// What outliers add to the outputs of a tile. Kept apart from the loop over all inputs, whose registers it would take.
template <WeightType kind, int rows>
[[gnu::noinline]] void add_outliers(const PanelAt& w, const float* list, Lane* out) {
    Lane sum[rows];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) sum[r] = out[r];
    for (std::int32_t columns = load_int(list++); columns; --columns, list += rows) {
        const Lane weights = column<kind>(w, load_int(list++));
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) sum[r] = fma(weights, all(list[r]), sum[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) out[r] = sum[r];
}

// 16 outputs of `rows` rows; out[row] holds one panel.
template <WeightType kind, int rows>
inline void panel_product(const Matrix& w, Index panel, const std::int8_t* codes, const float* stats, const float* outliers, Lane* out) {
    const Index groups = w.padded() / kGroup, per = w.group / kGroup, wide = w.groups();
    const std::uint8_t* at = w.data + panel * w.panel_bytes();
    const std::uint16_t* scale = w.scales + panel * wide * kLanes;
    const std::uint16_t* minimum = kind == WeightType::int4_min ? w.minimums + panel * wide * kLanes : nullptr;
    const PanelAt from{at, scale, minimum, static_cast<std::uint32_t>(per)};
    Lane sum[rows];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) sum[r] = zero();
    Index left = per;
    for (Index g = 0; g < groups; ++g, stats += 3 * rows) {
        Ints acc[rows];
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            acc[r] = kind == WeightType::int4_min ? repeat(0) : repeat(load_int(stats + rows + r));
            if (kind == WeightType::int8) acc[r] = times16(acc[r]);
        }
        if constexpr (kind == WeightType::int8) {
            for (int c = 0; c < 8; ++c, at += 64, codes += 4 * rows) {
                if (rows <= kFew) prefetch_l1(at + kAhead);
                const Bytes bytes = load_bytes(at);
#pragma GCC unroll 16
                for (int r = 0; r < rows; ++r) acc[r] = dot(acc[r], bytes, codes + 4 * r);
            }
        } else {
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c, at += 64, codes += 8 * rows) {
                if (rows <= kFew) prefetch_l1(at + kAhead);
                const Bytes bytes = load_bytes(at);
                const Bytes low = low_nibbles(bytes), high = high_nibbles(bytes);
#pragma GCC unroll 16
                for (int r = 0; r < rows; ++r) acc[r] = dot(acc[r], low, codes + 4 * r);
#pragma GCC unroll 16
                for (int r = 0; r < rows; ++r) acc[r] = dot(acc[r], high, codes + 4 * (rows + r));
            }
        }
        if (rows <= kFew) prefetch_l1(scale + kAhead / 8);
        const Lane s = load_half(scale);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) sum[r] = fma(mul(to_float(acc[r]), s), all(stats[r]), sum[r]);
        if constexpr (kind == WeightType::int4_min) {
            const Lane m = load_half(minimum);
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) sum[r] = fma(m, all(stats[2 * rows + r]), sum[r]);
        }
        if (--left == 0) left = per, scale += kLanes, minimum += kind == WeightType::int4_min ? kLanes : 0;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) out[r] = sum[r];
    if (load_int(outliers)) add_outliers<kind, rows>(from, outliers, out);
}

using PanelProduct = void (*)(const Matrix&, Index, const std::int8_t*, const float*, const float*, Lane*);

template <WeightType kind>
inline PanelProduct panel_product_of(Index rows) {
    static constexpr PanelProduct table[] = {
        panel_product<kind, 1>,
        panel_product<kind, 2>,
#if defined(__AVX512VNNI__) || !defined(__AVX2__)
        panel_product<kind, 3>,
        panel_product<kind, 4>,
#endif
#if defined(__AVX512VNNI__)
        panel_product<kind, 5>, panel_product<kind, 6>, panel_product<kind, 7>, panel_product<kind, 8>,
        panel_product<kind, 9>, panel_product<kind, 10>, panel_product<kind, 11>, panel_product<kind, 12>,
#endif
    };
    static_assert(sizeof(table) / sizeof(table[0]) == kTile, "one function for each size of a tile");
    return table[rows - 1];
}

inline PanelProduct panel_product_of(WeightType kind, Index rows) {
    switch (kind) {
        case WeightType::int8: return panel_product_of<WeightType::int8>(rows);
        case WeightType::int4: return panel_product_of<WeightType::int4>(rows);
        default: return panel_product_of<WeightType::int4_min>(rows);
    }
}

template <WeightType kind>
inline Lane load_weights(const std::uint8_t* p, Index at) {
    if constexpr (kind == WeightType::f32) return load(reinterpret_cast<const float*>(p) + at);
    if constexpr (kind == WeightType::bf16) return load_bfloat(reinterpret_cast<const std::uint16_t*>(p) + at);
    return load_half(reinterpret_cast<const std::uint16_t*>(p) + at);
}
template <WeightType kind>
inline float one_weight(const std::uint8_t* p, Index at) {
    if constexpr (kind == WeightType::f32) return reinterpret_cast<const float*>(p)[at];
    if constexpr (kind == WeightType::bf16) return bfloat_to_float(reinterpret_cast<const std::uint16_t*>(p)[at]);
    return half_to_float(reinterpret_cast<const std::uint16_t*>(p)[at]);
}

// Four outputs (rows of a float matrix at `w`, `stride` elements apart) of `rows` rows of x, with inputs in lanes.
template <WeightType kind, int rows, int outs>
inline void float_product(const std::uint8_t* w, Index first, Index stride, Index cols, const float* const* x, float (*out)[4]) {
    Lane sum[rows][outs];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int o = 0; o < outs; ++o) sum[r][o] = zero();
    }
    Index c = 0;
    for (; c + kLanes <= cols; c += kLanes) {
        Lane weights[outs];
#pragma GCC unroll 4
        for (int o = 0; o < outs; ++o) weights[o] = load_weights<kind>(w, (first + o) * stride + c);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Lane in = load(x[r] + c);
#pragma GCC unroll 4
            for (int o = 0; o < outs; ++o) sum[r][o] = fma(weights[o], in, sum[r][o]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        totals(sum[r][0], sum[r][outs > 1 ? 1 : 0], sum[r][outs > 2 ? 2 : 0], sum[r][outs > 3 ? 3 : 0], out[r]);
        for (int o = 0; o < outs; ++o) {
            for (Index t = c; t < cols; ++t) out[r][o] += one_weight<kind>(w, (first + o) * stride + t) * x[r][t];
        }
    }
}

template <WeightType kind, int rows>
inline void float_outputs(const std::uint8_t* w, Index first, Index count, Index stride, Index cols, const float* const* x, float (*out)[4]) {
    if (count == 4) return float_product<kind, rows, 4>(w, first, stride, cols, x, out);
    float one[rows][4];
    for (Index o = 0; o < count; ++o) {
        float_product<kind, rows, 1>(w, first + o, stride, cols, x, one);
        for (int r = 0; r < rows; ++r) out[r][o] = one[r][0];
    }
}

template <WeightType kind>
inline void float_tile(const std::uint8_t* w, Index first, Index count, Index stride, Index cols, const float* const* x, Index rows, float (*out)[4]) {
    switch (rows) {
        case 1: return float_outputs<kind, 1>(w, first, count, stride, cols, x, out);
        case 2: return float_outputs<kind, 2>(w, first, count, stride, cols, x, out);
#if defined(__AVX512VNNI__)
        case 3: return float_outputs<kind, 3>(w, first, count, stride, cols, x, out);
        case 4: return float_outputs<kind, 4>(w, first, count, stride, cols, x, out);
        case 5: return float_outputs<kind, 5>(w, first, count, stride, cols, x, out);
        default: return float_outputs<kind, 6>(w, first, count, stride, cols, x, out);
#else
        default: return;
#endif
    }
}

// Outputs first … first + count - 1 (count <= 4) of a float matrix for a tile of rows.
inline void float_tile(const Matrix& w, Index first, Index count, const float* const* x, Index rows, float (*out)[4]) {
    switch (w.kind) {
        case WeightType::f32: return float_tile<WeightType::f32>(w.data, first, count, w.cols, w.cols, x, rows, out);
        case WeightType::bf16: return float_tile<WeightType::bf16>(w.data, first, count, w.cols, w.cols, x, rows, out);
        default: return float_tile<WeightType::f16>(w.data, first, count, w.cols, w.cols, x, rows, out);
    }
}

// out[row] = sum over o < outs of x[row][o] * (row first + o of w): a product with the transpose, outputs in lanes.
template <WeightType kind, int rows>
inline void transposed_rows(const Matrix& w, Index first, Index outs, const float* const* x, float* const* out) {
    Index c = 0;
    for (; c + 4 * kLanes <= w.cols; c += 4 * kLanes) {
        Lane sum[rows][4];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) sum[r][k] = zero();
        }
        for (Index o = 0; o < outs; ++o) {
            Lane weights[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) weights[k] = load_weights<kind>(w.data, (first + o) * w.cols + c + k * kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const Lane by = all(x[r][o]);
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) sum[r][k] = fma(by, weights[k], sum[r][k]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) store(out[r] + c + k * kLanes, sum[r][k]);
        }
    }
    for (; c + kLanes <= w.cols; c += kLanes) {  // rounded twice, like the columns behind them
        Lane sum[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) sum[r] = zero();
        for (Index o = 0; o < outs; ++o) {
            const Lane weights = load_weights<kind>(w.data, (first + o) * w.cols + c);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) sum[r] = add(sum[r], mul(all(x[r][o]), weights));
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) store(out[r] + c, sum[r]);
    }
    for (; c < w.cols; ++c) {
        for (int r = 0; r < rows; ++r) {
            float s = 0.0f;
            for (Index o = 0; o < outs; ++o) s += x[r][o] * one_weight<kind>(w.data, (first + o) * w.cols + c);
            out[r][c] = s;
        }
    }
}

template <WeightType kind>
inline void transposed(const Matrix& w, Index first, Index outs, const float* const* x, float* const* out, Index rows) {
    switch (rows) {
        case 1: return transposed_rows<kind, 1>(w, first, outs, x, out);
        case 2: return transposed_rows<kind, 2>(w, first, outs, x, out);
#if defined(__AVX512VNNI__)
        case 3: return transposed_rows<kind, 3>(w, first, outs, x, out);
        case 4: return transposed_rows<kind, 4>(w, first, outs, x, out);
        case 5: return transposed_rows<kind, 5>(w, first, outs, x, out);
        default: return transposed_rows<kind, 6>(w, first, outs, x, out);
#else
        default: return;
#endif
    }
}

inline void transposed(const Matrix& w, Index first, Index outs, const float* const* x, float* const* out, Index rows) {
    switch (w.kind) {
        case WeightType::f32: return transposed<WeightType::f32>(w, first, outs, x, out, rows);
        case WeightType::bf16: return transposed<WeightType::bf16>(w, first, outs, x, out, rows);
        default: return transposed<WeightType::f16>(w, first, outs, x, out, rows);
    }
}

inline Lane silu(Lane x) {
    return divide(x, add(all(1.0f), exponential(sub(zero(), x))));
}

}  // namespace sprat
