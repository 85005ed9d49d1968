// Sixteen lanes, whatever the processor has: one register of AVX-512, two of AVX2, an array that the compiler may
// vectorise elsewhere. The kernels above this file are written once. A module is compiled for one instruction set as a
// whole (CMakeLists.txt), and Python loads the best one that the processor runs.
//
// Products and sums are never contracted or reordered by the compiler (-ffp-contract=off), so a row's result does not
// depend on how many rows share a tile.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace sprat {

using Index = std::int64_t;
constexpr int kLanes = 16;

inline void prefetch_l1(const void* at) { __builtin_prefetch(at, 0, 3); }
inline void prefetch_l2(const void* from, Index bytes) {  // into the second-level cache
    for (Index at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
}

#if defined(__F16C__)
inline float half_to_float(std::uint16_t h) { return _cvtsh_ss(h); }
inline std::uint16_t float_to_half(float f) { return static_cast<std::uint16_t>(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline float half_to_float(std::uint16_t h) {
    const std::uint32_t sign = (h & 0x8000u) << 16, body = h & 0x7fffu;
    std::uint32_t bits;
    if (body >= 0x7c00u) {
        bits = sign | 0x7f800000u | ((body & 0x3ffu) << 13);
    } else if (body >= 0x0400u) {
        bits = sign | ((body << 13) + 0x38000000u);
    } else {
        const float small = static_cast<float>(body) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline std::uint16_t float_to_half(float f) {  // round to nearest even
    std::uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const std::uint32_t sign = (bits >> 16) & 0x8000u, body = bits & 0x7fffffffu;
    if (body > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
    if (body >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
    if (body < 0x38800000u) {
        float magnitude;
        std::memcpy(&magnitude, &body, 4);
        const float scaled = magnitude * 16777216.0f;  // exact: a power of two
        return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(std::nearbyint(scaled)));
    }
    const std::uint32_t rounded = body + 0xfffu + ((body >> 13) & 1u);
    return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
#endif

inline float bfloat_to_float(std::uint16_t b) {
    const std::uint32_t bits = static_cast<std::uint32_t>(b) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

constexpr const char* kIsa = "avx512-vnni";
constexpr int kTile = 12;     // rows of integer products: 12 sums of integers, 12 of floats, 4 registers of weights
constexpr int kTileF = 6;     // rows of float products, by four rows of weights

struct Ints { __m512i v; };
struct Lane { __m512 v; };
struct Bytes { __m512i v; };

inline Lane zero() { return {_mm512_setzero_ps()}; }
inline Lane all(float x) { return {_mm512_set1_ps(x)}; }
inline Lane load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Lane load_some(const float* p, Index n) { return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)}; }
inline Lane load_half(const std::uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Lane load_bfloat(const std::uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline void store(float* p, Lane x) { _mm512_storeu_ps(p, x.v); }
inline Lane add(Lane a, Lane b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lane sub(Lane a, Lane b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lane mul(Lane a, Lane b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lane fma(Lane a, Lane b, Lane c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lane max(Lane a, Lane b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lane min(Lane a, Lane b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lane absolute(Lane a) { return {_mm512_abs_ps(a.v)}; }
inline Lane first_lanes(Lane a, Index n) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>((1u << n) - 1), a.v)}; }
inline Lane round_nearest(Lane a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Lane power_of_two(Lane whole) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(whole.v), _mm512_set1_epi32(127)), 23))};
}
inline float total(Lane a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Lane a) { return _mm512_reduce_max_ps(a.v); }
// Of 32 lanes, the first whose absolute value is x, cleared (none: nothing is); returns its index.
inline int clear_first(Lane& a, Lane& b, float x) {
    const __m512 to = _mm512_set1_ps(x);
    const unsigned low = _mm512_cmp_ps_mask(absolute(a).v, to, _CMP_EQ_OQ), high = _mm512_cmp_ps_mask(absolute(b).v, to, _CMP_EQ_OQ);
    const unsigned found = low | high << 16, first = found & -found;
    a.v = _mm512_maskz_mov_ps(static_cast<__mmask16>(~first), a.v);
    b.v = _mm512_maskz_mov_ps(static_cast<__mmask16>(~first >> 16), b.v);
    return found ? __builtin_ctz(found) : 32;
}
// Of 32 lanes, those whose absolute value is above x, as bits.
inline std::uint32_t lanes_above(Lane a, Lane b, float x) {
    const __m512 than = _mm512_set1_ps(x);
    return _mm512_cmp_ps_mask(absolute(a).v, than, _CMP_GT_OQ) | static_cast<std::uint32_t>(_mm512_cmp_ps_mask(absolute(b).v, than, _CMP_GT_OQ)) << 16;
}
inline Lane divide(Lane a, Lane b) { return {_mm512_div_ps(a.v, b.v)}; }
// The sums of four registers, in a third of the instructions of four sums.
inline void totals(Lane a, Lane b, Lane c, Lane d, float* out) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512 all4 = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all4), _mm512_extractf32x8_ps(all4, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
inline Ints nearest(Lane a) { return {_mm512_cvtps_epi32(a.v)}; }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline std::int32_t total(Ints a) { return _mm512_reduce_add_epi32(a.v); }
inline void store_codes(std::int8_t* p, Ints a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }

inline Ints repeat(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
// Of each four bytes the bits from `shift` on that `mask` lets through, as a number.
inline Lane field(const std::uint8_t* p, int shift, int mask) {
    const __m512i moved = _mm512_srlv_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(shift));
    return {_mm512_cvtepi32_ps(_mm512_and_si512(moved, _mm512_set1_epi32(mask)))};
}
inline Ints times16(Ints a) { return {_mm512_slli_epi32(a.v, 4)}; }
inline Lane to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Bytes load_bytes(const std::uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes low_nibbles(Bytes b) { return {_mm512_and_si512(b.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes b) { return {_mm512_and_si512(_mm512_srli_epi16(b.v, 4), _mm512_set1_epi8(15))}; }
// Lane i: sum + w[4i] a[0] + … + w[4i + 3] a[3]; w unsigned, a four signed bytes.
// The broadcast is part of the instruction: compilers make it one of its own, and four instructions a cycle is the limit here.
inline Ints dot(Ints sum, Bytes w, const std::int8_t* a) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(w.v), "m"(*reinterpret_cast<const std::int32_t (*)[1]>(a)));
    return sum;
}
// Four sets of 16 tokens x 4 channels to four of 16 channels x 4 tokens.
inline void transpose_bytes(const std::uint8_t* p, Bytes* out) {
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64), c = _mm512_loadu_si512(p + 128), d = _mm512_loadu_si512(p + 192);
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i ab0 = _mm512_shuffle_i32x4(a, b, 0x44), ab1 = _mm512_shuffle_i32x4(a, b, 0xee);
    const __m512i cd0 = _mm512_shuffle_i32x4(c, d, 0x44), cd1 = _mm512_shuffle_i32x4(c, d, 0xee);
    out[0].v = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(ab0, cd0, 0x88), order);
    out[1].v = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(ab0, cd0, 0xdd), order);
    out[2].v = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(ab1, cd1, 0x88), order);
    out[3].v = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(ab1, cd1, 0xdd), order);
}

#elif defined(__AVX2__)

constexpr const char* kIsa = "avx2";
constexpr int kTile = 2;
constexpr int kTileF = 2;

struct Ints { __m256i a, b; };
struct Lane { __m256 a, b; };
struct Bytes { __m256i a, b; };

inline Lane zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lane all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lane load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Lane load_some(const float* p, Index n) {
    float part[16] = {};
    std::memcpy(part, p, static_cast<std::size_t>(n) * 4);
    return load(part);
}
inline Lane load_half(const std::uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline Lane load_bfloat(const std::uint16_t* p) {
    const auto wide = [](const std::uint16_t* q) {
        const __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
    };
    return {wide(p), wide(p + 8)};
}
inline void store(float* p, Lane x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline Lane add(Lane x, Lane y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lane sub(Lane x, Lane y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Lane mul(Lane x, Lane y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Lane fma(Lane x, Lane y, Lane z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Lane max(Lane x, Lane y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Lane min(Lane x, Lane y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Lane absolute(Lane x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline Lane first_lanes(Lane x, Index n) {
    float part[16];
    store(part, x);
    return load_some(part, n);
}
inline Lane round_nearest(Lane x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Lane power_of_two(Lane w) {
    const auto half = [](__m256 x) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127)), 23));
    };
    return {half(w.a), half(w.b)};
}
inline float total(Lane x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float largest(Lane x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline std::uint32_t lanes_above(Lane x, Lane y, float z) {
    const __m256 than = _mm256_set1_ps(z);
    const auto bits = [&](__m256 a) { return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, than, _CMP_GT_OQ))); };
    const Lane p = absolute(x), q = absolute(y);
    return bits(p.a) | bits(p.b) << 8 | bits(q.a) << 16 | bits(q.b) << 24;
}
inline int clear_first(Lane& x, Lane& y, float z) {
    const __m256 to = _mm256_set1_ps(z);
    const auto bits = [&](__m256 a) { return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, to, _CMP_EQ_OQ))); };
    const Lane p = absolute(x), q = absolute(y);
    const unsigned found = bits(p.a) | bits(p.b) << 8 | bits(q.a) << 16 | bits(q.b) << 24;
    if (!found) return 32;
    const int at = __builtin_ctz(found);
    const __m256i here = _mm256_set1_epi32(at), lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto without = [&](__m256 a, int first) {
        return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(here, _mm256_add_epi32(lanes, _mm256_set1_epi32(first)))), a);
    };
    x = {without(x.a, 0), without(x.b, 8)}, y = {without(y.a, 16), without(y.b, 24)};
    return at;
}
inline Lane divide(Lane x, Lane y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline void totals(Lane a, Lane b, Lane c, Lane d, float* out) {
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(_mm256_add_ps(a.a, a.b), _mm256_add_ps(b.a, b.b)),
                                    _mm256_hadd_ps(_mm256_add_ps(c.a, c.b), _mm256_add_ps(d.a, d.b)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
inline Ints nearest(Lane x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline std::int32_t total(Ints x) {
    const __m256i s = _mm256_add_epi32(x.a, x.b);
    __m128i q = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
inline void store_codes(std::int8_t* p, Ints x) {
    const __m128i low = _mm_packs_epi32(_mm256_castsi256_si128(x.a), _mm256_extracti128_si256(x.a, 1));
    const __m128i high = _mm_packs_epi32(_mm256_castsi256_si128(x.b), _mm256_extracti128_si256(x.b, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(low, high));
}

inline Ints repeat(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Lane field(const std::uint8_t* p, int shift, int mask) {
    const __m128i by = _mm_cvtsi32_si128(shift);
    const __m256i keep = _mm256_set1_epi32(mask);
    const auto half = [&](const std::uint8_t* q) {
        return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)), by), keep));
    };
    return {half(p), half(p + 32)};
}
inline Ints times16(Ints x) { return {_mm256_slli_epi32(x.a, 4), _mm256_slli_epi32(x.b, 4)}; }
inline Lane to_float(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Bytes load_bytes(const std::uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline Bytes low_nibbles(Bytes x) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline Bytes high_nibbles(Bytes x) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), m)};
}
// Widened to 16 bits before they are added: maddubs would saturate for codes of eight bits.
inline __m256i dot_half(__m256i sum, __m256i w, __m256i a) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(a, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
inline Ints dot(Ints sum, Bytes w, const std::int8_t* a) {
    std::int32_t bits;
    std::memcpy(&bits, a, 4);
    const __m256i four = _mm256_set1_epi32(bits);
    return {dot_half(sum.a, w.a, four), dot_half(sum.b, w.b, four)};
}

#else

#if defined(__ARM_FEATURE_DOTPROD)
constexpr const char* kIsa = "neon-dotprod";
#else
constexpr const char* kIsa = "portable";
#endif
constexpr int kTile = 4;
constexpr int kTileF = 2;

struct Ints { std::int32_t v[16]; };
struct Lane { float v[16]; };
struct Bytes { std::uint8_t v[64]; };

#define SPRAT_EACH(expression)                        \
    Lane out;                                         \
    for (int i = 0; i < 16; ++i) out.v[i] = expression; \
    return out
inline Lane zero() { return {}; }
inline Lane all(float x) { SPRAT_EACH(x); }
inline Lane load(const float* p) { SPRAT_EACH(p[i]); }
inline Lane load_some(const float* p, Index n) { SPRAT_EACH(i < n ? p[i] : 0.0f); }
inline Lane load_half(const std::uint16_t* p) { SPRAT_EACH(half_to_float(p[i])); }
inline Lane load_bfloat(const std::uint16_t* p) { SPRAT_EACH(bfloat_to_float(p[i])); }
inline void store(float* p, Lane x) { std::memcpy(p, x.v, 64); }
inline Lane add(const Lane& a, const Lane& b) { SPRAT_EACH(a.v[i] + b.v[i]); }
inline Lane sub(const Lane& a, const Lane& b) { SPRAT_EACH(a.v[i] - b.v[i]); }
inline Lane mul(const Lane& a, const Lane& b) { SPRAT_EACH(a.v[i] * b.v[i]); }
inline Lane fma(const Lane& a, const Lane& b, const Lane& c) { SPRAT_EACH(a.v[i] * b.v[i] + c.v[i]); }
inline Lane max(const Lane& a, const Lane& b) { SPRAT_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Lane min(const Lane& a, const Lane& b) { SPRAT_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Lane absolute(const Lane& a) { SPRAT_EACH(std::fabs(a.v[i])); }
inline Lane first_lanes(const Lane& a, Index n) { SPRAT_EACH(i < n ? a.v[i] : 0.0f); }
inline Lane round_nearest(const Lane& a) { SPRAT_EACH(std::nearbyint(a.v[i])); }
inline Lane power_of_two(const Lane& w) { SPRAT_EACH(std::ldexp(1.0f, static_cast<int>(w.v[i]))); }
inline Lane divide(const Lane& a, const Lane& b) { SPRAT_EACH(a.v[i] / b.v[i]); }
#undef SPRAT_EACH
inline float total(const Lane& a) {
    float sum = 0.0f;
    for (int i = 0; i < 16; ++i) sum += a.v[i];
    return sum;
}
inline float largest(const Lane& a) {
    float top = a.v[0];
    for (int i = 1; i < 16; ++i) top = a.v[i] > top ? a.v[i] : top;
    return top;
}
inline std::uint32_t lanes_above(const Lane& a, const Lane& b, float x) {
    std::uint32_t found = 0;
    for (int i = 0; i < 32; ++i) found |= static_cast<std::uint32_t>(std::fabs(i < 16 ? a.v[i] : b.v[i - 16]) > x) << i;
    return found;
}
inline int clear_first(Lane& a, Lane& b, float x) {
    for (int i = 0; i < 32; ++i) {
        float& one = i < 16 ? a.v[i] : b.v[i - 16];
        if (std::fabs(one) != x) continue;
        one = 0.0f;
        return i;
    }
    return 32;
}
inline Lane field(const std::uint8_t* p, int shift, int mask) {
    Lane out;
    for (int i = 0; i < 16; ++i) out.v[i] = static_cast<float>(p[4 * i + shift / 8] >> shift % 8 & mask);
    return out;
}
inline void totals(const Lane& a, const Lane& b, const Lane& c, const Lane& d, float* out) {
    out[0] = total(a), out[1] = total(b), out[2] = total(c), out[3] = total(d);
}
inline Ints nearest(const Lane& a) {
    Ints out;
    for (int i = 0; i < 16; ++i) out.v[i] = static_cast<std::int32_t>(std::nearbyint(a.v[i]));
    return out;
}
inline Ints add(const Ints& a, const Ints& b) {
    Ints out;
    for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] + b.v[i];
    return out;
}
inline std::int32_t total(const Ints& a) {
    std::int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += a.v[i];
    return sum;
}
inline void store_codes(std::int8_t* p, const Ints& a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(a.v[i]);
}
inline Ints repeat(std::int32_t x) {
    Ints out;
    for (int i = 0; i < 16; ++i) out.v[i] = x;
    return out;
}
inline Ints times16(const Ints& a) {
    Ints out;
    for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] * 16;
    return out;
}
inline Lane to_float(const Ints& a) {
    Lane out;
    for (int i = 0; i < 16; ++i) out.v[i] = static_cast<float>(a.v[i]);
    return out;
}
inline Bytes load_bytes(const std::uint8_t* p) {
    Bytes out;
    std::memcpy(out.v, p, 64);
    return out;
}
inline Bytes low_nibbles(const Bytes& b) {
    Bytes out;
    for (int i = 0; i < 64; ++i) out.v[i] = b.v[i] & 15;
    return out;
}
inline Bytes high_nibbles(const Bytes& b) {
    Bytes out;
    for (int i = 0; i < 64; ++i) out.v[i] = b.v[i] >> 4;
    return out;
}
inline Ints dot(const Ints& sum, const Bytes& w, const std::int8_t* four) {
    Ints out;
#if defined(__ARM_FEATURE_DOTPROD)
    // Both operands signed: w - 128 as signed bytes, and 128 times the sum of a added back.
    std::int32_t bits;
    std::memcpy(&bits, four, 4);
    const int8x16_t by = vreinterpretq_s8_s32(vdupq_n_s32(bits));
    const int32x4_t back = vdupq_n_s32(128 * (four[0] + four[1] + four[2] + four[3]));
    for (int q = 0; q < 4; ++q) {
        const int8x16_t signed_w = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w.v + 16 * q), vdupq_n_u8(128)));
        vst1q_s32(out.v + 4 * q, vaddq_s32(vdotq_s32(vld1q_s32(sum.v + 4 * q), signed_w, by), back));
    }
#else
    for (int i = 0; i < 16; ++i) {
        std::int32_t s = sum.v[i];
        for (int j = 0; j < 4; ++j) s += static_cast<std::int32_t>(w.v[4 * i + j]) * four[j];
        out.v[i] = s;
    }
#endif
    return out;
}

#endif

#if !defined(__AVX512VNNI__)
inline void transpose_bytes(const std::uint8_t* p, Bytes* out) {
    for (int token = 0; token < 16; ++token) {
        auto* to = reinterpret_cast<std::uint8_t*>(&out[token / 4]) + token % 4;
        for (int channel = 0; channel < 16; ++channel) to[channel * 4] = p[channel / 4 * 64 + token * 4 + channel % 4];
    }
}
#endif

// e^x with a relative error below 3e-7; held to 2^-126 … 2^126.
inline Lane exponential(Lane x) {
    const Lane t = min(max(mul(x, all(1.44269504088896341f)), all(-126.0f)), all(126.0f));
    const Lane whole = round_nearest(t), rest = sub(t, whole);
    Lane p = all(1.5353362e-4f);
    p = fma(p, rest, all(1.3398874e-3f));
    p = fma(p, rest, all(9.6184373e-3f));
    p = fma(p, rest, all(5.5503324e-2f));
    p = fma(p, rest, all(2.4022648e-1f));
    p = fma(p, rest, all(6.9314720e-1f));
    p = fma(p, rest, all(1.0f));
    return mul(p, power_of_two(whole));
}


}  // namespace sprat
