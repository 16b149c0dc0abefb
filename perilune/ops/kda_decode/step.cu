// One launch of the serving step: a block owns one key head of one sequence and every value head that reads it.
//
// Data movement. The memory of a value head, V x K float32, is read once into registers, advanced by all new tokens, and
// written once; beside it all is small. A block is over in a few times the latency of memory, so it asks for everything
// before it waits for anything, and waits for its other threads twice a token.
//
// Work. Of what is filtered, 2 K + V channels, a thread has a few: it alone reads and writes what the convolution
// remembers of them. Of the memory, a row of values has LANES threads, and a thread ROWS rows of them. With S' = S exp(a),
// both S' k and S' q are found in one pass, since q (S' + d k^T) = S' q + d (k q).
//
// Macros, all of them numbers: KEY_DIM, VALUE_DIM, TAPS (of the convolution, at least 2), THREADS, BLOCKS of a
// multiprocessor; QKV_TYPE, GATE_TYPE, BETA_TYPE, OUTPUT_GATE_TYPE, CONV_TYPE, WEIGHT_TYPE, NORM_TYPE, RATE_TYPE, BIAS_TYPE as
// in numbers.cuh; LONG_SLOTS and LONG_KEEP, whether those have 64 bits; SINGLE, whether there is one token, for which nothing
// that is read has to stay in registers.

#include "numbers.cuh"

constexpr int K = KEY_DIM, V = VALUE_DIM, W = TAPS;
constexpr int LANES = 8;
constexpr int GROUPS = THREADS / LANES;
constexpr int ROWS = V / GROUPS;
constexpr int VECTORS = K / (4 * LANES);
constexpr int CHANNELS = 2 * K + V;
constexpr int OWN = (CHANNELS + THREADS - 1) / THREADS;  // channels that a thread filters
constexpr int WARPS = THREADS / 32;
// Shared memory, in floats: queries, keys and values; decays; outputs; their squares of each warp.
constexpr int DECAYS_AT = CHANNELS;
constexpr int OUTPUTS_AT = DECAYS_AT + K;
constexpr int SQUARES_AT = OUTPUTS_AT + V;
constexpr int SHARED = 4 * (SQUARES_AT + WARPS);  // bytes, that the launcher asks for
static_assert(K % (4 * LANES) == 0 && V % GROUPS == 0 && K <= THREADS && V <= THREADS);

template <bool IS_LONG>
__device__ __forceinline__ i64 load_index(const void* x, i64 place) {
    return IS_LONG ? ((const i64*)x)[place] : (i64)((const int*)x)[place];
}

// What a thread reads for a token.
struct Token {
    float x[OWN], raw, beta, z;
};

struct Sources {
    const void *qkv, *g, *beta, *z;
    i64 width;            // channels of a token
    i64 channel[OWN];     // of the thread, among them; -1 for none

    // `at` is the number of the token among those of all sequences, times the number of value heads, plus the value head.
    __device__ __forceinline__ Token load(i64 token, i64 at) const {
        Token y;
#pragma unroll
        for (int i = 0; i < OWN; ++i) y.x[i] = channel[i] < 0 ? 0.0f : load_one<QKV_TYPE>(qkv, token * width + channel[i]);
        y.raw = (int)threadIdx.x < K ? load_one<GATE_TYPE>(g, at * K + threadIdx.x) : 0.0f;
        y.beta = load_one<BETA_TYPE>(beta, at);
        y.z = z && (int)threadIdx.x < V ? load_one<OUTPUT_GATE_TYPE>(z, at * V + threadIdx.x) : 0.0f;
        return y;
    }
};

__device__ __forceinline__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ __forceinline__ float4 times(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
__device__ __forceinline__ float4 plus(float4 a, float s, float4 b) {
    return make_float4(a.x + s * b.x, a.y + s * b.y, a.z + s * b.z, a.w + s * b.w);
}
// The sum over the lanes of a row.
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}

// Source: Kimi Linear, eq. 1 and 10.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) advance_memories(
    const void* qkv, void* conv_states, const void* conv_weight, const void* g, const void* beta, const void* z,
    const void* norm_weight, const void* log_rate, const void* bias, float* states, const void* slots, const void* keep,
    void* o, i64 heads, i64 value_heads, i64 length, float scale, float lower_bound, float beta_factor, float norm_eps,
    float unit_eps) {
    SHARED_MEMORY(shared);
    if (SINGLE) length = 1;
    float* filtered = (float*)shared;
    float *decays = filtered + DECAYS_AT, *outputs = filtered + OUTPUTS_AT, *squares = filtered + SQUARES_AT;
    int thread = threadIdx.x, lane = thread % LANES, group = thread / LANES, members = (int)(value_heads / heads);
    i64 row = (i64)blockIdx.x / heads;
    int head = (int)((i64)blockIdx.x % heads);
    i64 slot = slots ? load_index<LONG_SLOTS>(slots, row) : row;
    i64 kept = keep ? load_index<LONG_KEEP>(keep, row) : length;
    if (slot < 0) {
        for (i64 token = 0; token < length; ++token) {
            i64 at = ((row * length + token) * value_heads + head * members) * V;
            for (int i = thread; i < members * V; i += THREADS) store_one<QKV_TYPE>(o, at + i, 0.0f);
        }
        return;
    }
    Sources sources = {qkv, g, beta, z, 2 * heads * K + value_heads * V, {}};
    i64 memory = slot * sources.width * (W - 1);
    for (int member = 0; member < members; ++member) {
        int value_head = head * members + member;
        float past[OWN][W - 1], weight[OWN][W];
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            int c = thread + i * THREADS;
            i64 channel = c < K ? (i64)head * K + c : c < 2 * K ? (heads + head - 1) * K + c
                                                                : 2 * heads * K + (i64)value_head * V + c - 2 * K;
            sources.channel[i] = c < CHANNELS ? channel : -1;
#pragma unroll
            for (int entry = 0; entry < W - 1; ++entry)
                past[i][entry] =
                    c < CHANNELS ? load_one<CONV_TYPE>(conv_states, memory + channel * (W - 1) + entry) : 0.0f;
#pragma unroll
            for (int tap = 0; tap < W; ++tap)
                weight[i][tap] = c < CHANNELS ? load_one<WEIGHT_TYPE>(conv_weight, channel * W + tap) : 0.0f;
        }
        Token ahead = sources.load(row * length, row * length * value_heads + value_head);
        float rate = load_one<RATE_TYPE>(log_rate, value_head);
        float shift = thread < K ? load_one<BIAS_TYPE>(bias, (i64)value_head * K + thread) : 0.0f;
        float gain = thread < V ? load_one<NORM_TYPE>(norm_weight, thread) : 0.0f;
        float4* tile = (float4*)(states + (slot * value_heads + value_head) * (K * V)) + lane;
        float4 state[ROWS][VECTORS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int j = 0; j < VECTORS; ++j) state[r][j] = tile[(r * GROUPS + group) * (K / 4) + j * LANES];
        rate = exp2_(rate * LOG2E);
        for (i64 token = 0; token < length; ++token) {
            i64 at = (row * length + token) * value_heads + value_head;
            Token now = ahead;
            if (token + 1 < length) ahead = sources.load(row * length + token + 1, at + value_heads);
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                float y = now.x[i] * weight[i][W - 1];
#pragma unroll
                for (int entry = 0; entry < W - 1; ++entry) y += past[i][entry] * weight[i][entry];
#pragma unroll
                for (int entry = 0; entry < W - 2; ++entry) past[i][entry] = past[i][entry + 1];
                past[i][W - 2] = now.x[i];
                if (thread + i * THREADS < CHANNELS) filtered[thread + i * THREADS] = y * sigmoid(y);
            }
            if (thread < K) {
                float x = now.raw + shift;
                decays[thread] = exp2_(lower_bound < 0.0f ? lower_bound * LOG2E * sigmoid(rate * x)
                                                          : -rate * log2_grown(x * LOG2E));
            }
            sync_block();
            float4 q[VECTORS], k[VECTORS];
            float qq = 0.0f, kk = 0.0f, qk = 0.0f, read[ROWS], found[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) read[r] = found[r] = 0.0f;
#pragma unroll
            for (int j = 0; j < VECTORS; ++j) {
                int c = 4 * (j * LANES + lane);
                q[j] = *(const float4*)(filtered + c), k[j] = *(const float4*)(filtered + K + c);
                float4 decay = *(const float4*)(decays + c);
                qq += dot(q[j], q[j]), kk += dot(k[j], k[j]), qk += dot(q[j], k[j]);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    state[r][j] = times(state[r][j], decay);
                    read[r] += dot(state[r][j], q[j]), found[r] += dot(state[r][j], k[j]);
                }
            }
            float q_unit = scale * reciprocal_root(sum_lanes(qq) + unit_eps);
            float k_unit = reciprocal_root(sum_lanes(kk) + unit_eps), strength = beta_factor * sigmoid(now.beta);
            qk = sum_lanes(qk);
            float square = 0.0f;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                int value = r * GROUPS + group;
                float wrong = filtered[2 * K + value] - k_unit * sum_lanes(found[r]);
                float change = strength * k_unit * wrong;  // of the memory, in units of the raw key
                float y = q_unit * (sum_lanes(read[r]) + change * qk);
#pragma unroll
                for (int j = 0; j < VECTORS; ++j) state[r][j] = plus(state[r][j], change, k[j]);
                if (lane == 0) outputs[value] = y;
                square += y * y;
            }
#pragma unroll
            for (int mask = LANES; mask < 32; mask *= 2) square += shuffle_xor(square, mask);
            if (thread % 32 == 0) squares[thread / 32] = square;
            sync_block();
            if (thread < V) {
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) sum += squares[w];
                float y = outputs[thread] * reciprocal_root(sum / V + norm_eps) * gain;
                store_one<QKV_TYPE>(o, at * V + thread, z ? y * sigmoid(now.z) : y);
            }
            if (token + 1 != kept) continue;
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int j = 0; j < VECTORS; ++j) tile[(r * GROUPS + group) * (K / 4) + j * LANES] = state[r][j];
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                int c = thread + i * THREADS;
                // the other value heads filter the same queries and keys
                if (c >= CHANNELS || (c < 2 * K && member + 1 < members)) continue;
#pragma unroll
                for (int entry = 0; entry < W - 1; ++entry)
                    store_one<CONV_TYPE>(conv_states, memory + sources.channel[i] * (W - 1) + entry, past[i][entry]);
            }
        }
    }
}
