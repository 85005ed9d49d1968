#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// e^x as 2^whole * 2^rest, the latter by a polynomial (relative error below 3e-7). Vectorizes; NaN stays NaN.
inline float exponential(float x) {
    float t = x * 1.44269504088896341f;
    t = t < -126.0f ? -126.0f : t;
    t = t > 126.0f ? 126.0f : t;
    const float whole = std::nearbyint(t), rest = t - whole;
    float p = 1.5353362e-4f;
    p = p * rest + 1.3398874e-3f;
    p = p * rest + 9.6184373e-3f;
    p = p * rest + 5.5503324e-2f;
    p = p * rest + 2.4022648e-1f;
    p = p * rest + 6.9314720e-1f;
    p = p * rest + 1.0f;
    const std::int32_t bits = (static_cast<std::int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}
