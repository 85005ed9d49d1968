// The shape of a decoder, and what one step is given.
#pragma once
#include "attend_bytes.h"

namespace sprat {

enum class Memory : int { full = 0, half = 1, bytes = 2 };  // float32, float16, or bytes with scales

struct Dims {
    bool latent = false, interleave = false;
    Index hidden = 0, vocab = 0, heads = 0, kv_heads = 0, head_dim = 0;
    Index rank = 0, nope = 0, rope = 0, value = 0;
    float scale = 1.0f, eps = 1e-6f;
    static constexpr float latent_eps = 1e-6f;  // as DeepSeek's published code, whatever the config says

    Index key_width() const { return latent ? rank + rope : head_dim; }
    Index value_width() const { return latent ? rank : head_dim; }
    Index groups() const { return latent ? 1 : kv_heads; }
    Index query_width() const { return latent ? nope + rope : head_dim; }
    Index rotary() const { return latent ? rope : head_dim; }
    // Bytes that one block keeps for one layer.
    Index layer_bytes(Memory memory) const {
        if (memory == Memory::bytes) return latent ? PagedBytes::bytes(rank + rope, 2) : 2 * kv_heads * PagedBytes::bytes(head_dim, 1);
        return kBlock * groups() * (latent ? key_width() : 2 * head_dim) * (memory == Memory::half ? 2 : 4);
    }
    bool fits_bytes() const { return (latent ? rank % kLanes == 0 && rope % 4 == 0 : head_dim % kLanes == 0); }
};

struct Batch {
    const std::int32_t *tokens, *positions, *starts, *tables, *wanted;
    Index count, sequences, width, wants;  // T, S, W, R
};

}  // namespace sprat
