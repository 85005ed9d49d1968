// From a row of logits to a token: the arithmetic of engine/sampling/ops.py (its reference) without its temporaries.
// One uniform number picks the token by the inverse of the cumulative weights; truncation is top-k, then top-p, then
// min-p. Only what a truncation may keep is ever sorted.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "simd.h"

namespace sprat {

struct SamplingParams {
    float temperature, top_p, min_p;  // temperature above 0
    Index top_k;
    double noise;  // of [0, 1)
};
struct Sampled {
    Index token;  // -1: the row is not finite
    float top;    // the greatest logit of the vocabulary
    float sum;    // the logarithm of the sum of e^((logit - top) / temperature)
};

class Sampler {
public:
    // `vocab` ids may be picked; all `width` ids count for the sum. The greatest logit is subtracted before anything is
    // divided, so no temperature is too low; ids behind the vocabulary, however likely, take nothing from the others.
    Sampled sample(const float* logits, Index vocab, Index width, const SamplingParams& d) {
        const float inv_temperature = std::min(1.0f / d.temperature, FLT_MAX), top = max_of(logits, vocab);
        if (!std::isfinite(top)) return {-1, 0.0f, 0.0f};
        double beyond = -INFINITY;
        if (width > vocab) {
            const float high = max_of(logits + vocab, width - vocab), base = high > -INFINITY ? high : 0.0f;
            const double rest = exp_weights(logits + vocab, width - vocab, inv_temperature, base);
            if (!std::isfinite(high) && high > 0.0f) return {-1, 0.0f, 0.0f};
            if (!std::isfinite(rest)) return {-1, 0.0f, 0.0f};
            beyond = std::log(rest) + (static_cast<double>(base) - top) / d.temperature;
        }
        const double total = exp_weights(logits, vocab, inv_temperature, top);
        if (!std::isfinite(total)) return {-1, 0.0f, 0.0f};
        const double own = std::log(total), most = std::max(own, beyond);
        const double sum = most + std::log(std::exp(own - most) + std::exp(beyond - most));
        const bool truncated = d.top_k > 0 || d.top_p < 1.0f || d.min_p > 0.0f;
        return {truncated ? sample_truncated(vocab, d) : sample_all(vocab, d.noise), top, static_cast<float>(sum)};
    }

private:
    static float max_of(const float* x, Index n) {
        Lane most = all(-INFINITY);
        Index i = 0;
        for (; i + kLanes <= n; i += kLanes) most = max(most, load(x + i));
        float top = largest(most);
        for (; i < n; ++i) top = x[i] > top ? x[i] : top;
        return top;
    }

    // weights_ = e^((x - top) * inv_temperature), zero for -infinity; their sum, NaN if one of x is.
    double exp_weights(const float* x, Index n, float inv_temperature, float top) {
        weights_.resize(static_cast<std::size_t>((n + kLanes - 1) / kLanes * kLanes));
        double sum = 0.0;
        for (Index i = 0; i < n; i += kLanes) {
            const Index have = std::min<Index>(kLanes, n - i);
            const Lane in = have == kLanes ? load(x + i) : load_some(x + i, have);
            Lane e = exponential(mul(sub(in, all(top)), all(inv_temperature)));
            if (have < kLanes) e = first_lanes(e, have);
            store(weights_.data() + i, e);
            float part = 0.0f;
            for (Index k = i; k < i + have; ++k) {
                if (!(x[k] > -INFINITY)) weights_[k] = x[k] == -INFINITY ? 0.0f : x[k];  // NaN stays NaN
                part += weights_[k];
            }
            sum += part;
        }
        return sum;
    }

    Index sample_all(Index n, double noise) {
        double sum = 0.0;
        for (Index i = 0; i < n; ++i) sum += weights_[i];
        const double goal = noise * sum;
        double reached = 0.0;
        Index last = -1;  // nothing that may be picked weighs anything
        for (Index i = 0; i < n; ++i) {
            if (weights_[i] <= 0.0f) continue;
            reached += weights_[i], last = i;
            if (reached > goal) return i;
        }
        return last;
    }

    Index sample_truncated(Index n, const SamplingParams& d) {
        const Index most = d.top_k > 0 ? std::min(d.top_k, n) : n;
        double mass = 0.0;
        for (Index i = 0; i < n; ++i) mass += weights_[i];
        const auto before = [&](Index a, Index b) { return weights_[a] != weights_[b] ? weights_[a] > weights_[b] : a < b; };
        // Lower the bar until what lies above it is enough for top-k and top-p.
        for (float bar = 1.0f / 1024.0f;; bar = bar > 1e-30f ? bar / 256.0f : -1.0f) {
            candidates_.clear();
            double above = 0.0;
            for (Index i = 0; i < n; ++i) {
                if (weights_[i] >= bar && weights_[i] > 0.0f) candidates_.push_back(i), above += weights_[i];
            }
            const bool all_that_count = bar < 0.0f || (d.top_k == 0 && bar <= d.min_p);
            if (all_that_count || static_cast<Index>(candidates_.size()) >= most || (d.top_k == 0 && above >= d.top_p * mass)) break;
        }
        if (candidates_.empty()) return -1;
        const auto count = std::min<std::size_t>(static_cast<std::size_t>(most), candidates_.size());
        std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<Index>(count), candidates_.end(), before);
        candidates_.resize(count);
        if (d.top_k > 0) {
            mass = 0.0;
            for (Index i : candidates_) mass += weights_[i];
        }
        double reached = 0.0;
        std::size_t num_kept = 0;
        while (num_kept < candidates_.size() && (num_kept == 0 || ((d.top_p >= 1.0f || reached < d.top_p * mass) && weights_[candidates_[num_kept]] >= d.min_p * weights_[candidates_[0]]))) {
            reached += weights_[candidates_[num_kept++]];
        }
        candidates_.resize(num_kept);
        std::sort(candidates_.begin(), candidates_.end());  // in the order of ids, as the reference picks
        const double goal = d.noise * reached;
        double sum = 0.0;
        for (Index i : candidates_) {
            sum += weights_[i];
            if (sum > goal) return i;
        }
        return candidates_.back();
    }

    std::vector<float> weights_;
    std::vector<Index> candidates_;
};

}  // namespace sprat
