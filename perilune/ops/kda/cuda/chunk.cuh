// What both KDA kernels share: where a chunk lies, and how raw inputs become operands.
//
// A block of 4 warps has one value head of one chunk of C = 64 rows; warp w owns rows 16w to 16w + 15. With r = lane / 4
// and c = lane % 4, a lane has rows r and r + 8 of its warp's, and of each group of 32 channels those from 8c to 8c + 7:
// 16 bytes of a row, whose words are operands of mma_bf16 as they are, as left ones and, transposed, as right ones, with
// its 16 summed up channels in the order of 4c, 4c + 1 (of 16 in a half group), then 4c + 2, 4c + 3.
//
// Macros, all of them numbers: KEY_DIM, VALUE_DIM (64, 128 or 256); INPUT_TYPE of q, k, v, o and do, GATE_TYPE, BETA_TYPE (0
// bfloat16, 1 float16, 2 float32); LONG_LENGTHS, whether cu_seqlens has 64 bits; GATE, BOUNDED, HAS_RATE, HAS_BIAS,
// UNIT, SIGMOID, DOUBLED as in the Triton kernels.
#pragma once

#include "numbers.cuh"

constexpr int C = 64;
constexpr int K = KEY_DIM;
constexpr int STEPS = K / 16;
constexpr int PITCH = K + 4;  // of rows of floats in shared memory: 4 banks apart
constexpr int GATE_BYTES = GATE_TYPE == 2 ? 4 : 2;
// Lowest base-2 log decay of a step. What it leaves, 2^-28, is lost in the rounding of a float32 sum.
constexpr float LOWEST = -28.0f;
// Half the base-2 range of decays that one anchor serves: 7 steps of 28, or of a bounded gate 15 of 8.6.
constexpr float CENTER = 98.0f;
constexpr float UNCENTER = 0x1p-98f;

// Where a block's chunk lies: its first token, its number of tokens (negative for an unused slot).
struct Place {
    i64 first;
    int length;
};

__device__ __forceinline__ Place find_place(const void* lengths, const int* offsets, const int* sequences,
                                            i64 num_sequences, i64 chunk) {
    int sequence = sequences[chunk];
    if (sequence >= num_sequences) return {0, -1};
#if LONG_LENGTHS
    const i64* starts = (const i64*)lengths;
#else
    const int* starts = (const int*)lengths;
#endif
    i64 first = (i64)starts[sequence] + (chunk - offsets[sequence]) * C;
    i64 rest = (i64)starts[sequence + 1] - first;
    return {first, (int)(rest < C ? rest : C)};
}

// Two values of a word.
template <int TYPE>
__device__ __forceinline__ void unpack(u32 word, float& low, float& high) {
    if (TYPE == 0) {
        low = bits_float(word << 16);
        high = bits_float(word & 0xffff0000u);
    } else {
        low = half_float((u16)word);
        high = half_float((u16)(word >> 16));
    }
}

// Four values, aligned.
__device__ __forceinline__ void load_four(float (&y)[4], const float* x) {
    float4 found = *(const float4*)x;
    y[0] = found.x, y[1] = found.y, y[2] = found.z, y[3] = found.w;
}

// A write strength.
__device__ __forceinline__ float beta_of(float x) {
#if SIGMOID
    x = sigmoid(x);
#if DOUBLED
    x *= 2.0f;
#endif
#endif
    return x;
}

// The gate of a channel: base-2 log decays of raw values, -rate log2(1 + e^z) or, if bounded, lower_bound log2(e) /
// (1 + e^(-rate z)) of z = raw + bias, or log2(e) raw where there is no gate.
struct Gate {
    float slope, shift, factor;

    __device__ __forceinline__ float log_decay(float raw) const {
        float x = raw * slope + shift;
#if !GATE
        return max(x, LOWEST);
#elif BOUNDED
        return factor * reciprocal(1.0f + exp2_(x));
#else
        return max(factor * log2_grown(x), LOWEST);
#endif
    }
};
// Not zero, so that no decay is what the lowest value of a raw gate has.
__device__ __forceinline__ float gate_rate(const float* log_rate, int head) {
    return HAS_RATE ? max(exp2_(log_rate[head] * LOG2E), 1e-20f) : 1.0f;
}
__device__ __forceinline__ Gate gate_of(float rate, float bias, float lower_bound) {
#if !GATE
    return {LOG2E, 0.0f, 0.0f};
#elif BOUNDED
    return {-rate * LOG2E, -rate * LOG2E * bias, lower_bound * LOG2E};
#else
    return {LOG2E, LOG2E * bias, -rate};
#endif
}

// Raw gates of rows past the last one, that do not decay: of bfloat16 -1e30, of float16 -inf.
constexpr float NO_DECAY = GATE ? -1e30f : 0.0f;
constexpr u32 NO_DECAY_WORD = !GATE ? 0 : GATE_TYPE == 0 ? 0xf149f149u : 0xfc00fc00u;

// How base-2 log decays are summed up: a thread has 4 channels and ROWS rows.
constexpr int SPREAD = K / 4;
constexpr int GROUPS = 128 / SPREAD;
constexpr int ROWS = C / GROUPS;

// Raw gates of a thread's rows; past `length` such as do not decay.
struct Gates {
#if GATE_TYPE == 2
    float4 words[ROWS];
#else
    uint2 words[ROWS];
#endif
};
__device__ __forceinline__ void load_gates(Gates& gates, const void* g, i64 place, i64 stride, int length) {
    int channel = threadIdx.x % SPREAD * 4, row = threadIdx.x / SPREAD * ROWS;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        i64 at = place + (row + i) * stride + channel;
#if GATE_TYPE == 2
        gates.words[i] = make_float4(NO_DECAY, NO_DECAY, NO_DECAY, NO_DECAY);
        if (row + i < length) gates.words[i] = *(const float4*)((const float*)g + at);
#else
        gates.words[i] = make_uint2(NO_DECAY_WORD, NO_DECAY_WORD);
        if (row + i < length) gates.words[i] = *(const uint2*)((const u16*)g + at);
#endif
    }
}

// Write base-2 log decays, summed up from the first row, to `total` [C, PITCH]. `sums` has room for [GROUPS, K]. The
// whole block calls it and may read at its end.
__device__ __forceinline__ void sum_log_decays(float* total, float* sums, const Gates& gates, const float* log_rate,
                                               const float* bias, int head, float lower_bound) {
    int channel = threadIdx.x % SPREAD * 4, group = threadIdx.x / SPREAD;
    float found[ROWS][4], shift[4] = {0.0f, 0.0f, 0.0f, 0.0f}, rate = gate_rate(log_rate, head);
#if HAS_BIAS
    load_four(shift, bias + head * K + channel);
#endif
    Gate gate[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) gate[j] = gate_of(rate, shift[j], lower_bound);
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float raw[4];
#if GATE_TYPE == 2
        raw[0] = gates.words[i].x, raw[1] = gates.words[i].y, raw[2] = gates.words[i].z, raw[3] = gates.words[i].w;
#else
        unpack<GATE_TYPE>(gates.words[i].x, raw[0], raw[1]);
        unpack<GATE_TYPE>(gates.words[i].y, raw[2], raw[3]);
#endif
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            sum[j] += gate[j].log_decay(raw[j]);
            found[i][j] = sum[j];
        }
    }
    *(float4*)(sums + group * K + channel) = make_float4(sum[0], sum[1], sum[2], sum[3]);
    sync_block();
    float before[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < GROUPS - 1; ++i) {
        float4 x = *(const float4*)(sums + i * K + channel);
        if (i < group) before[0] += x.x, before[1] += x.y, before[2] += x.z, before[3] += x.w;
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
        *(float4*)(total + (group * ROWS + i) * PITCH + channel) = make_float4(
            found[i][0] + before[0], found[i][1] + before[1], found[i][2] + before[2], found[i][3] + before[3]);
    sync_block();
}

// Four words of a lane's two rows of q or k, `x` the address of those of the first; zeros past `length`.
__device__ __forceinline__ void load_rows(uint4 (&words)[2], const u16* x, i64 stride, int row, int length) {
    words[0] = words[1] = make_uint4(0, 0, 0, 0);
    if (row < length) words[0] = *(const uint4*)x;
    if (row + 8 < length) words[1] = *(const uint4*)(x + 8 * stride);
}

template <int TYPE>
__device__ __forceinline__ void multiply_add(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (TYPE == 0) mma_bf16(d, a0, a1, a2, a3, b0, b1);
    else mma_f16(d, a0, a1, a2, a3, b0, b1);
}

// Add the products of rows of x with rows of y, of a lane's four words of each: [16, 8] and [16, 8] more.
template <int TYPE>
__device__ __forceinline__ void add_products(float (&d)[2][4], const uint4 (&x)[2], const uint4 (&y)[2]) {
    multiply_add<TYPE>(d[0], x[0].x, x[1].x, x[0].y, x[1].y, y[0].x, y[0].y);
    multiply_add<TYPE>(d[1], x[0].x, x[1].x, x[0].y, x[1].y, y[1].x, y[1].y);
    multiply_add<TYPE>(d[0], x[0].z, x[1].z, x[0].w, x[1].w, y[0].z, y[0].w);
    multiply_add<TYPE>(d[1], x[0].z, x[1].z, x[0].w, x[1].w, y[1].z, y[1].w);
}

// The diagonal of what was added up: of a lane's two rows.
__device__ __forceinline__ void diagonal(float (&y)[2], const float (&d)[2][4], int lane) {
    int r = lane / 4, from = 4 * r + r / 2;
    bool is_odd = r % 2;
    float low = shuffle(d[0][0], from), low_odd = shuffle(d[0][1], from);
    float high = shuffle(d[1][2], from), high_odd = shuffle(d[1][3], from);
    y[0] = is_odd ? low_odd : low;
    y[1] = is_odd ? high_odd : high;
}
