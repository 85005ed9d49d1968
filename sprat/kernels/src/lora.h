// Adapters of single rows: y += B (A x) beside a product with weights that all rows share (LoRA, arXiv 2106.09685).
//
// The rows of one step may be of several adapters, or of none (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285). The product
// with the shared weights is made for all of them, each as ever; a row that has an adapter is then given what its own
// adds, by itself and in one order. So a row without one has the bits that it has where there are no adapters at
// all, and a row with one has the same bits alone and in company.
//
// First A makes `rank` numbers of a row (`project_down`), at once for a whole product; then each panel of 16 outputs adds
// its share of B (`add_low_rank`). Inputs are floats here, also where the weights are codes and their inputs rounded.
#pragma once
#include "linear.h"
#include "pool.h"

namespace sprat {

// A buffer that grows and is never shrunk; what it held is lost when it grows. 64-byte aligned.
template <class T>
class Scratch {
public:
    T* need(std::size_t count) {
        if (count + kSpare > held_.size()) held_.assign(count + count / 4 + kSpare, T{});
        return data();
    }
    T* data() { return reinterpret_cast<T*>((reinterpret_cast<std::uintptr_t>(held_.data()) + 63) / 64 * 64); }
    std::size_t bytes() const { return held_.size() * sizeof(T); }

private:
    static constexpr std::size_t kSpare = 64 / sizeof(T) + 1;
    std::vector<T> held_ = std::vector<T>(kSpare);
};

// Which tokens of a step have an adapter.
struct Adapted {
    const std::int32_t* of = nullptr;    // of each token, -1: none; null: no token has one
    Index rank = 0;                      // the greatest rank of all adapters
    Scratch<float>* scratch = nullptr;   // for one product at a time

    // The adapter of a token for `w`, or none.
    const LowRank* find(const Matrix& w, Index token) const {
        if (!of || !w.adapters || of[token] < 0) return nullptr;
        const LowRank& adapter = w.adapters[of[token]];
        return adapter.rank ? &adapter : nullptr;
    }
};

// down[0 … rank - 1] = A x
inline void project_down(const LowRank& adapter, const float* x, Index width, float* down) {
    const auto* a = reinterpret_cast<const std::uint8_t*>(adapter.a);
    float some[1][4];
    for (Index k = 0; k < adapter.rank; k += 4) {
        const Index count = std::min<Index>(4, adapter.rank - k);
        float_tile<WeightType::f32>(a, k, count, width, width, &x, 1, some);
        std::memcpy(down + k, some[0], static_cast<std::size_t>(count) * sizeof(float));
    }
}

// A x of rows `from` … `to` - 1 that have an adapter of `w`: down [rows, adapted.rank]. `tokens`: of each row, or none: all in
// order; inputs(row) is where its inputs are.
template <class F>
void project_down(const Matrix& w, const Adapted& adapted, const std::int32_t* tokens, Index from, Index to, const F& inputs, float* down) {
    for (Index row = from; row < to; ++row) {
        if (const LowRank* adapter = adapted.find(w, tokens ? tokens[row] : row)) project_down(*adapter, inputs(row), w.cols, down + row * adapted.rank);
    }
}

// out[row] += B down[row]: 16 outputs of those rows of a tile that have an adapter of `w`.
inline void add_low_rank(const Matrix& w, Index at, const Adapted& adapted, const std::int32_t* tokens, const float* down, Index start, Index size, Lane* out) {
    if (!adapted.of || !w.adapters) return;
    for (Index r = 0; r < size; ++r) {
        const LowRank* adapter = adapted.find(w, tokens ? tokens[start + r] : start + r);
        if (!adapter) continue;
        const float* row = down + (start + r) * adapted.rank;
        Lane sum = zero();
        for (Index k = 0; k < adapter->rank; ++k) sum = fma(all(row[k]), load(adapter->b + k * adapter->stride + at * kLanes), sum);
        out[r] = add(out[r], sum);
    }
}

// What an adapter adds to a product with the transpose: out [width] += A^T (B_part^T x), for outputs `first` … `first + count - 1`.
inline void add_transposed(const LowRank& adapter, Index first, Index count, const float* x, Index width, float* out) {
    for (Index k = 0; k < adapter.rank; ++k) {
        float sum = 0.0f;
        for (Index o = 0; o < count; ++o) sum += x[o] * adapter.b[k * adapter.stride + first + o];
        for (Index c = 0; c < width; ++c) out[c] += sum * adapter.a[k * width + c];
    }
}

// What an adapter adds to outputs `first` … `first + count - 1` of the product with x [width].
inline void add_outputs(const LowRank& adapter, Index first, Index count, const float* x, Index width, float* out) {
    for (Index k = 0; k < adapter.rank; ++k) {
        float sum = 0.0f;
        for (Index c = 0; c < width; ++c) sum += x[c] * adapter.a[k * width + c];
        for (Index o = 0; o < count; ++o) out[o] += sum * adapter.b[k * adapter.stride + first + o];
    }
}

}  // namespace sprat
