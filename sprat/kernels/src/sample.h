// From a row of logits to a token: the arithmetic of engine/sample.py (its reference) without its temporaries.
// One uniform number picks the token by the inverse of the cumulative weights; truncation is top-k, then top-p, then
// min-p. Only what a truncation may keep is ever sorted.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace sprat {

struct Dials {
    float temperature, top_p, min_p;
    Index top_k;
    double noise;  // of [0, 1)
};
struct Pick {
    Index token;    // -1: the row is not finite
    float logprob;  // at the row's temperature, over all of its logits
};

class Sampler {
public:
    // `vocab` ids may be picked; `width` ids count for the log-probability.
    Pick pick(const float* logits, Index vocab, Index width, const Dials& d, bool logprob) {
        const Index best = argmax(logits, vocab);
        if (!std::isfinite(logits[best])) return {-1, 0.0f};
        const float heat = d.temperature == 0.0f ? 1.0f : 1.0f / d.temperature, top = logits[best];
        if (d.temperature == 0.0f && !logprob) return {best, 0.0f};
        const double total = weigh(logits, width, heat, top);
        if (!(total > 0.0) || !std::isfinite(total)) return {-1, 0.0f};
        Index token = best;
        if (d.temperature != 0.0f) token = d.top_k > 0 || d.top_p < 1.0f || d.min_p > 0.0f ? among_kept(vocab, d) : among_all(vocab, d.noise);
        return {token, static_cast<float>((logits[token] - top) * heat - std::log(total))};
    }

private:
    static Index argmax(const float* x, Index n) {
        Lane most = all(-INFINITY);
        Index i = 0;
        for (; i + kLanes <= n; i += kLanes) most = max(most, load(x + i));
        float top = i ? largest(most) : -INFINITY;
        for (Index t = i; t < n; ++t) top = x[t] > top ? x[t] : top;
        bool odd = false;  // a NaN hides from max
        for (Index t = 0; t < n; ++t) odd |= x[t] != x[t];
        if (odd) {
            for (Index t = 0; t < n; ++t) if (x[t] != x[t]) return t;
        }
        for (Index t = 0; t < n; ++t) if (x[t] == top) return t;
        return 0;
    }

    // weights_ = e^((x - top) * heat), zero for -infinity; their sum.
    double weigh(const float* x, Index n, float heat, float top) {
        weights_.resize(static_cast<std::size_t>((n + kLanes - 1) / kLanes * kLanes));
        double sum = 0.0;
        for (Index i = 0; i < n; i += kLanes) {
            const Index have = std::min<Index>(kLanes, n - i);
            const Lane in = have == kLanes ? load(x + i) : load_some(x + i, have);
            Lane e = exponential(mul(sub(in, all(top)), all(heat)));
            if (have < kLanes) e = first_lanes(e, have);
            store(weights_.data() + i, e);
            float part = 0.0f;
            for (Index k = i; k < i + have; ++k) {
                if (x[k] == -INFINITY) weights_[k] = 0.0f;
                part += weights_[k];
            }
            sum += part;
        }
        return sum;
    }

    Index among_all(Index n, double noise) {
        double sum = 0.0;
        for (Index i = 0; i < n; ++i) sum += weights_[i];
        const double goal = noise * sum;
        double reached = 0.0;
        Index last = 0;
        for (Index i = 0; i < n; ++i) {
            if (weights_[i] <= 0.0f) continue;
            reached += weights_[i], last = i;
            if (reached > goal) return i;
        }
        return last;
    }

    Index among_kept(Index n, const Dials& d) {
        const Index most = d.top_k > 0 ? std::min(d.top_k, n) : n;
        double mass = 0.0;
        for (Index i = 0; i < n; ++i) mass += weights_[i];
        const auto before = [&](Index a, Index b) { return weights_[a] != weights_[b] ? weights_[a] > weights_[b] : a < b; };
        // Lower the bar until what lies above it is enough for top-k and top-p.
        for (float bar = 1.0f / 1024.0f;; bar = bar > 1e-30f ? bar / 256.0f : -1.0f) {
            kept_.clear();
            double above = 0.0;
            for (Index i = 0; i < n; ++i) {
                if (weights_[i] >= bar && weights_[i] > 0.0f) kept_.push_back(i), above += weights_[i];
            }
            const bool all_that_count = bar < 0.0f || bar <= d.min_p;
            if (all_that_count || static_cast<Index>(kept_.size()) >= most || (d.top_k == 0 && above >= d.top_p * mass)) break;
        }
        const auto count = std::min<std::size_t>(static_cast<std::size_t>(most), kept_.size());
        std::partial_sort(kept_.begin(), kept_.begin() + static_cast<Index>(count), kept_.end(), before);
        kept_.resize(count);
        if (d.top_k > 0) {
            mass = 0.0;
            for (Index i : kept_) mass += weights_[i];
        }
        double reached = 0.0;
        std::size_t keep = 0;
        while (keep < kept_.size() && (keep == 0 || ((d.top_p >= 1.0f || reached < d.top_p * mass) && weights_[kept_[keep]] >= d.min_p * weights_[kept_[0]]))) {
            reached += weights_[kept_[keep++]];
        }
        kept_.resize(keep);
        std::sort(kept_.begin(), kept_.end());  // in the order of ids, as the reference picks
        const double goal = d.noise * reached;
        double sum = 0.0;
        for (Index i : kept_) {
            sum += weights_[i];
            if (sum > goal) return i;
        }
        return kept_.back();
    }

    std::vector<float> weights_;
    std::vector<Index> kept_;
};

}  // namespace sprat
