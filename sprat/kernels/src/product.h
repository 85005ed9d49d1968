// Matrix products of a batch of rows, cut into chunks of panels for the pool.
#pragma once
#include <initializer_list>
#include <vector>

#include "lora.h"

namespace sprat {

// Scratch memory for quantized rows.
class QuantizedRowsScratch {
public:
    // For `groups` groups of 32 inputs, over all rows.
    QuantizedRows need(Index groups, Index padded) {
        const auto count = static_cast<std::size_t>(groups);
        return {codes_.need(count * kGroup), stats_.need(count * 3), outliers_.need(count), outlier_bits_.need(count), lists_.need(count * QuantizedRows::kListed), padded};
    }
    std::size_t bytes() const { return codes_.bytes() + stats_.bytes() + outliers_.bytes() + outlier_bits_.bytes() + lists_.bytes(); }

private:
    Scratch<std::int8_t> codes_;
    Scratch<float> stats_, lists_;
    Scratch<Outlier> outliers_;
    Scratch<std::uint32_t> outlier_bits_;
};

// Rows on their way into a product: as floats, and as codes where a matrix wants them. `index` gathers rows of floats.
struct Input {
    const float* rows = nullptr;
    Index stride = 0, count = 0;
    const std::int32_t* index = nullptr;
    QuantizedRows codes{};
    Adapted adapted{};
};

// One panel of outputs for a tile of rows: out[row] holds 16 outputs, zero beyond the last.
inline void panel(const Matrix& w, Index at, const Input& in, Index start, Index size, Lane* out) {
    if (w.quantized()) {
        const QuantizedRows& codes = in.codes;
        panel_product_of(w.kind, size)(w, at, codes.tile_codes(start), codes.tile_stats(start), codes.tile_list(start), out);
    } else {
        alignas(64) float part[kTileF][kLanes], some[kTileF][4];
        for (Index r = 0; r < size; r += kTileF) {
            const Index n = std::min<Index>(kTileF, size - r);
            const float* x[kTileF];
            for (Index i = 0; i < n; ++i) {
                const Index row = start + r + i;
                x[i] = in.rows + (in.index ? in.index[row] : row) * in.stride;
            }
            for (Index o = 0; o < kLanes; o += 4) {
                const Index first = at * kLanes + o, count = std::min<Index>(4, w.rows - first);
                if (count > 0) float_tile(w, first, count, x, n, some);
                for (Index i = 0; i < n; ++i) {
                    for (Index k = 0; k < 4; ++k) part[i][o + k] = k < count ? some[i][k] : 0.0f;
                }
            }
            for (Index i = 0; i < n; ++i) out[r + i] = load(part[i]);
        }
    }
    if (w.bias) {
        const Index first = at * kLanes;
        const Lane b = w.rows - first >= kLanes ? load(w.bias + first) : load_some(w.bias + first, w.rows - first);
        for (Index r = 0; r < size; ++r) out[r] = add(out[r], b);
    }
}

// Add 16 outputs to a row, or write them; `have` of them exist.
inline void store_lanes(float* to, Lane x, Index have, bool add_to) {
    if (have >= kLanes) {
        store(to, add_to ? add(load(to), x) : x);
        return;
    }
    alignas(64) float part[kLanes];
    store(part, x);
    for (Index i = 0; i < have; ++i) to[i] = add_to ? to[i] + part[i] : part[i];
}

constexpr Index kRowsAtOnce = 192;  // rows whose codes stay near while a chunk's panels pass

// f(panel, tile start, tile size) for the panels of one chunk, over all rows.
template <class F>
void over_rows(Index first, Index last, Index rows, const F& f) {
    const Tiling tiling(rows, kTile);
    const Index together = kRowsAtOnce / kTile;
    for (Index from = 0; from < tiling.tiles; from += together) {
        const Index to = std::min(tiling.tiles, from + together);
        for (Index p = first; p < last; ++p) {
            for (Index t = from; t < to; ++t) f(p, tiling.start(t), tiling.size(t));
        }
    }
}

struct Product {
    const Matrix* w;
    float* out;       // [rows, stride]
    Index stride;
    bool add_to;
};

inline Index num_chunks(const ThreadPool& pool, Index units, Index rows) {
    if (pool.threads() == 1) return 1;
    return std::max<Index>(1, std::min<Index>(units, pool.threads() * (rows >= 32 ? 8 : 2)));
}

// The job after the next `run` will read these matrices, cut evenly by rows.
inline void prefetch_next(ThreadPool& pool, std::initializer_list<const Matrix*> next) {
    for (const Matrix* w : next) {
        if (w->rows == 0) continue;
        pool.prefetch_next(w->data, w->bytes());
        if (w->scales) pool.prefetch_next(w->scales, w->scale_bytes());
        if (w->minimums) pool.prefetch_next(w->minimums, w->scale_bytes());
    }
}

// A x of all products, for those rows that have an adapter: [products, rows, rank].
inline const float* project_down(ThreadPool& pool, const Input& in, std::initializer_list<Product> products) {
    const Adapted& adapted = in.adapted;
    float* down = adapted.scratch->need(static_cast<std::size_t>(products.size() * in.count * adapted.rank));
    const Index chunks = in.count * in.stride * adapted.rank > 65536 ? num_chunks(pool, in.count, in.count) : 1;
    pool.run(chunks, [&](Index chunk, int) {
        float* own = down;
        for (const Product& p : products) {
            const auto inputs = [&](Index row) { return in.rows + (in.index ? in.index[row] : row) * in.stride; };
            project_down(*p.w, adapted, in.index, in.count * chunk / chunks, in.count * (chunk + 1) / chunks, inputs, own);
            own += in.count * adapted.rank;
        }
    });
    return down;
}

// Several products of the same rows in one go; a chunk is a share of each.
inline void multiply(ThreadPool& pool, const Input& in, std::initializer_list<Product> products) {
    Index most = 0;
    for (const Product& p : products) most = std::max(most, p.w->panels());
    const Index each = in.adapted.of ? in.count * in.adapted.rank : 0;
    const float* down = each ? project_down(pool, in, products) : nullptr;
    const Index chunks = num_chunks(pool, most, in.count);
    pool.run(chunks, [&](Index chunk, int) {
        const float* own = down;
        for (const Product& p : products) {
            const Index panels = p.w->panels();
            over_rows(panels * chunk / chunks, panels * (chunk + 1) / chunks, in.count, [&](Index at, Index start, Index size) {
                Lane out[kTile];
                panel(*p.w, at, in, start, size, out);
                add_low_rank(*p.w, at, in.adapted, in.index, own, start, size, out);
                const Index have = p.w->rows - at * kLanes;
                for (Index r = 0; r < size; ++r) store_lanes(p.out + (start + r) * p.stride + at * kLanes, out[r], have, p.add_to);
            });
            own += each;
        }
    });
}

// The greatest of the first `vocab` outputs of each row, the first of equals; -1 where one is not finite. The outputs
// themselves are written nowhere.
inline void multiply_argmax(ThreadPool& pool, const Input& in, const Matrix& w, Index vocab, Scratch<float>& scratch, std::int64_t* best) {
    const Index panels = (std::min(vocab, w.rows) + kLanes - 1) / kLanes, chunks = num_chunks(pool, panels, in.count), wide = 2 + kLanes;
    float* held = scratch.need(chunks * in.count * wide);  // for each chunk and row: greatest, which, and 0 or NaN
    pool.run(chunks, [&](Index chunk, int) {
        float* mine = held + chunk * in.count * wide;
        for (Index r = 0; r < in.count; ++r) {
            mine[r * wide] = -INFINITY;
            store(mine + r * wide + 2, zero());
        }
        over_rows(panels * chunk / chunks, panels * (chunk + 1) / chunks, in.count, [&](Index at, Index start, Index size) {
            Lane out[kTile];
            panel(w, at, in, start, size, out);
            const Index first = at * kLanes, have = std::min<Index>(kLanes, std::min(vocab, w.rows) - first);
            for (Index r = 0; r < size; ++r) {
                float* row = mine + (start + r) * wide;
                const Lane asked = have == kLanes ? out[r] : first_lanes(out[r], have);
                store(row + 2, add(load(row + 2), sub(asked, asked)));
                if (have == kLanes && !(largest(out[r]) > row[0])) continue;
                alignas(64) float each[kLanes];
                store(each, out[r]);
                for (Index i = 0; i < have; ++i) {
                    const auto which = static_cast<std::int32_t>(first + i);
                    if (each[i] > row[0]) row[0] = each[i], std::memcpy(row + 1, &which, 4);
                }
            }
        });
    });
    for (Index r = 0; r < in.count; ++r) {
        float top = -INFINITY, fine = 0.0f;
        best[r] = -1;
        for (Index c = 0; c < chunks; ++c) {
            const float* row = held + (c * in.count + r) * wide;
            fine += total(load(row + 2));
            if (row[0] > top) top = row[0], best[r] = load_int(row + 1);
        }
        if (fine != 0.0f) best[r] = -1;
    }
}

// x / rms(x) * w
inline void rms_norm(const float* x, const float* w, Index width, float eps, float* out) {
    Lane sum = zero();
    Index c = 0;
    for (; c + kLanes <= width; c += kLanes) sum = fma(load(x + c), load(x + c), sum);
    float square = total(sum);
    for (Index t = c; t < width; ++t) square += x[t] * x[t];
    const float scale = 1.0f / std::sqrt(square / static_cast<float>(width) + eps);
    for (c = 0; c + kLanes <= width; c += kLanes) store(out + c, mul(mul(load(x + c), all(scale)), load(w + c)));
    for (; c < width; ++c) out[c] = x[c] * scale * w[c];
}

// Row `row` of a matrix as floats (an embedding).
inline void read_row(const Matrix& w, Index row, float* out) {
    const auto* halves = reinterpret_cast<const std::uint16_t*>(w.data) + row * w.cols;
    if (w.kind == WeightType::f32) std::memcpy(out, reinterpret_cast<const float*>(w.data) + row * w.cols, static_cast<std::size_t>(w.cols) * 4);
    if (w.kind == WeightType::bf16) for (Index c = 0; c < w.cols; ++c) out[c] = bfloat_to_float(halves[c]);
    if (w.kind == WeightType::f16) for (Index c = 0; c < w.cols; ++c) out[c] = half_to_float(halves[c]);
    if (!w.quantized()) return;
    const Index at = row / kLanes, lane = row % kLanes, groups = w.groups();
    const std::uint8_t* panel_at = w.data + at * w.panel_bytes();
    for (Index c = 0; c < w.cols; ++c) {
        const Index scale_at = (at * groups + c / w.group) * kLanes + lane;
        const float scale = half_to_float(w.scales[scale_at]);
        if (w.kind == WeightType::int8) {
            out[c] = scale * static_cast<float>(static_cast<int>(panel_at[c / 4 * 64 + lane * 4 + c % 4]) - 128);
        } else {
            const std::uint8_t byte = panel_at[c / 8 * 64 + lane * 4 + c % 4];
            const int code = c % 8 < 4 ? byte & 15 : byte >> 4;
            out[c] = w.kind == WeightType::int4 ? scale * static_cast<float>(code - 8)
                                          : scale * static_cast<float>(code) + half_to_float(w.minimums[scale_at]);
        }
    }
}

}  // namespace sprat
