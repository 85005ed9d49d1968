// The shape of a decoder, and what one step is given.
#pragma once
#include "paged_attention_i8.h"

namespace sprat {

enum class KVFormat : int { f32 = 0, f16 = 1, i8 = 2 };  // float32, float16, or int8 with scales

struct Dims {
    bool is_mla = false, interleave = false;
    Index adapters = 0, adapter_rank = 0;  // how many adapters there are, and the greatest rank of them
    Index hidden = 0, vocab = 0, heads = 0, kv_heads = 0, head_dim = 0;
    Index rank = 0, nope = 0, rope = 0, value = 0;
    float scale = 1.0f, eps = 1e-6f;
    static constexpr float latent_eps = 1e-6f;  // as DeepSeek's published code, whatever the config says

    Index key_width() const { return is_mla ? rank + rope : head_dim; }
    Index value_width() const { return is_mla ? rank : head_dim; }
    Index groups() const { return is_mla ? 1 : kv_heads; }
    Index query_width() const { return is_mla ? nope + rope : head_dim; }
    Index rotary() const { return is_mla ? rope : head_dim; }
    // Bytes that one block keeps for one layer.
    Index layer_bytes(KVFormat kv_format) const {
        if (kv_format == KVFormat::i8) return is_mla ? PagedKVInt8::bytes(rank + rope, 2) : 2 * kv_heads * PagedKVInt8::bytes(head_dim, 1);
        return kBlock * groups() * (is_mla ? key_width() : 2 * head_dim) * (kv_format == KVFormat::f16 ? 2 : 4);
    }
    bool supports_i8() const { return (is_mla ? rank % kLanes == 0 && rope % 4 == 0 : head_dim % kLanes == 0); }
};

struct Batch {
    const std::int32_t *tokens, *positions, *cu_seqlens, *block_tables, *logits_indices;
    Index num_tokens, num_seqs, blocks_per_seq, num_logits;  // T, S, W, R
    const std::int32_t* adapters = nullptr;                  // of each sequence, -1: none; null: none of them has one
};

}  // namespace sprat
