// Loads and stores of numbers of any type (0 bfloat16, 1 float16, 2 float32), and functions that gates are made of.
#pragma once

#include "primitives.cuh"

constexpr float LOG2E = 1.4426950408889634f;

template <int TYPE>
__device__ __forceinline__ float load_one(const void* x, i64 place) {
    if (TYPE == 2) return ((const float*)x)[place];
    u16 bits = ((const u16*)x)[place];
    return TYPE == 0 ? bits_float((u32)bits << 16) : half_float(bits);
}

template <int TYPE>
__device__ __forceinline__ void store_one(void* x, i64 place, float value) {
    if (TYPE == 2) ((float*)x)[place] = value;
    else ((u16*)x)[place] = TYPE == 0 ? (u16)pack_bf16(value, 0.0f) : float_half(value);
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp2_(-x * LOG2E)); }

// log2(1 + 2^x), by its series where 1 would swallow 2^x.
__device__ __forceinline__ float log2_grown(float x) {
    float e = exp2_(x), small = e * (LOG2E + e * (-0.5f * LOG2E + e * (LOG2E / 3.0f)));
    float y = e < 0x1p-6f ? small : log2_(1.0f + e);
    return x > 24.0f ? x : y;
}
