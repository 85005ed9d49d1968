// The walks over activations that stock operators make many of, each in one function that reads its input once.
// C++17, float32, contiguous rows, one thread (the trainer splits rows between threads). The bindings are in
// sprat/kernels/ops.py, beside the torch form of each.
#include <cmath>
#include <cstdint>

#include "exponential.h"

namespace {

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// y = x / rms(x) * w, row by row; keeps 1 / rms(x).
void rms_forward(const float* __restrict x, const float* __restrict w, float eps, float* __restrict y,
                 float* __restrict scale, std::int64_t rows, std::int64_t width) {
    for (std::int64_t n = 0; n < rows; ++n, x += width, y += width) {
        float sum = 0.0f;
        for (std::int64_t d = 0; d < width; ++d) sum += x[d] * x[d];
        const float s = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
        scale[n] = s;
        for (std::int64_t d = 0; d < width; ++d) y[d] = x[d] * s * w[d];
    }
}

// Gradient of x, and that of w added to what gw holds.
void rms_backward(const float* __restrict g, const float* __restrict x, const float* __restrict w,
                  const float* __restrict scale, float* __restrict gx, float* __restrict gw, std::int64_t rows,
                  std::int64_t width) {
    for (std::int64_t n = 0; n < rows; ++n, g += width, x += width, gx += width) {
        const float s = scale[n];
        float dot = 0.0f;
        for (std::int64_t d = 0; d < width; ++d) {
            const float product = g[d] * x[d] * s;
            gw[d] += product;
            dot += product * w[d];
        }
        dot /= static_cast<float>(width);
        for (std::int64_t d = 0; d < width; ++d) gx[d] = s * (g[d] * w[d] - x[d] * s * dot);
    }
}

// h = silu(gate) * up; a row of `gate_up` holds gate and up, each `width` long.
void swiglu_forward(const float* __restrict gate_up, float* __restrict h, std::int64_t rows, std::int64_t width) {
    for (std::int64_t n = 0; n < rows; ++n, gate_up += 2 * width, h += width) {
        for (std::int64_t d = 0; d < width; ++d) h[d] = gate_up[d] * sigmoid(gate_up[d]) * gate_up[width + d];
    }
}

void swiglu_backward(const float* __restrict gate_up, const float* __restrict gh, float* __restrict grad_gate_up,
                     std::int64_t rows, std::int64_t width) {
    for (std::int64_t n = 0; n < rows; ++n, gate_up += 2 * width, gh += width, grad_gate_up += 2 * width) {
        for (std::int64_t d = 0; d < width; ++d) {
            const float s = sigmoid(gate_up[d]), silu = gate_up[d] * s;
            grad_gate_up[d] = gh[d] * gate_up[width + d] * (s + silu * (1.0f - s));
            grad_gate_up[width + d] = gh[d] * silu;
        }
    }
}

// Sum of the rows' softmax cross-entropies; the logits become its gradient. Targets lie in 0 .. vocabulary - 1.
double cross_entropy(float* __restrict logits, const std::int64_t* __restrict target, std::int64_t rows,
                     std::int64_t vocabulary) {
    double loss = 0.0;
    for (std::int64_t n = 0; n < rows; ++n, logits += vocabulary) {
        float top = logits[0];
#pragma omp simd reduction(max : top)
        for (std::int64_t v = 1; v < vocabulary; ++v) top = logits[v] > top ? logits[v] : top;
        const float picked = logits[target[n]] - top;
        float total = 0.0f;
        for (std::int64_t v = 0; v < vocabulary; ++v) {
            logits[v] = exponential(logits[v] - top);
            total += logits[v];
        }
        loss += static_cast<double>(std::log(total) - picked);
        const float inv_total = 1.0f / total;
        for (std::int64_t v = 0; v < vocabulary; ++v) logits[v] *= inv_total;
        logits[target[n]] -= 1.0f;
    }
    return loss;
}

}  // extern "C"
