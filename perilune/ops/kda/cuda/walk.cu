// The walks over the chunks of a sequence, forward with the state and backward with its gradient, for Hopper: those of
// the Triton kernels (scan.py), where the transposed state stays in the registers of one warpgroup.
//
// A block has 64 values of one value head of one sequence, or of one segment of one. Values are rows of all products and
// chunk rows or key channels their columns, so that sums are left operands of the next product as they stand, and
// nothing on the way from one state to the next passes through shared memory. A second warpgroup copies operands of the
// chunks to come there and stores results from there; the two meet twice a chunk.
//
// Macros, all of them numbers: KEY_DIM (64 or 128), VALUE_DIM (a multiple of 64); INPUT_TYPE of v, o and do (0 bfloat16, 1
// float16); LONG_LENGTHS, whether cu_seqlens has 64 bits; WITH_OUTPUTS, WITH_CORRECTIONS; STATE_TYPE of the states that are
// kept (0 none, 1 bfloat16, 2 float32).

#include "warpgroup.cuh"

constexpr int C = 64;
constexpr int K = KEY_DIM;
constexpr int V = VALUE_DIM;
constexpr int SLICES = V / 64;
constexpr int STEPS = K / 16;
constexpr int GROUP = 128;  // threads of a warpgroup
constexpr int WIDE_BYTES = C * K * 2;

// Shared memory: the operands of STAGES chunks, their decays, and results of one chunk, each [rows, 64 values].
constexpr bool WITH_STATES = STATE_TYPE == 1;
constexpr int STAGES = WITH_OUTPUTS && WITH_CORRECTIONS ? 2 : 3;
constexpr int READS = WIDE_BYTES;
constexpr int WRITES = READS + WITH_OUTPUTS * WIDE_BYTES;
constexpr int VALUES = WRITES + WIDE_BYTES;
constexpr int MIXES = VALUES + TILE_BYTES;
constexpr int SOLVES = MIXES + WITH_OUTPUTS * TILE_BYTES;
constexpr int STAGE_BYTES = SOLVES + WITH_CORRECTIONS * TILE_BYTES;
constexpr int OUTPUTS = STAGES * STAGE_BYTES;
constexpr int CORRECTIONS = OUTPUTS + WITH_OUTPUTS * TILE_BYTES;
constexpr int STATES = CORRECTIONS + WITH_CORRECTIONS * TILE_BYTES;
constexpr int DECAYS = STATES + WITH_STATES * WIDE_BYTES;
// Decays are there a chunk earlier, as a state decays while the last products of the chunk before are under way.
constexpr int DECAY_STAGES = STAGES + 1;
constexpr int DECAY_BYTES = 4 * (K + 16);

// What a block walks over: its head, the first token, chunk and number of chunks, and the token after the last one.
struct Walk {
    i64 head, number, first, end;
    int value, chunk, count;
};
__device__ __forceinline__ Walk find_walk(const void* lengths, const int* offsets, i64 heads) {
    Walk walk;
    walk.value = (int)(blockIdx.x % SLICES) * 64;
    i64 rest = blockIdx.x / SLICES;
    walk.head = rest % heads;
    int sequence = (int)(rest / heads);
    walk.number = rest;
#if LONG_LENGTHS
    const i64* starts = (const i64*)lengths;
#else
    const int* starts = (const int*)lengths;
#endif
    walk.first = starts[sequence], walk.end = starts[sequence + 1];
    walk.chunk = offsets[sequence], walk.count = offsets[sequence + 1] - walk.chunk;
    return walk;
}

// Copies of a warpgroup's thread. A chunk's [64, COLUMNS] operands go to one or two tiles; `from` is `start` of the first
// chunk, and follows the walk.
template <int COLUMNS>
struct RowCopies {
    static constexpr int UNITS = COLUMNS / 8, ROWS = GROUP / UNITS;  // a multiple of 8: all rows of a thread have one offset
    const u16* from;
    int to;

    __device__ __forceinline__ RowCopies(const u16* start, int thread)
        : from(start + 8 * thread), to(thread % UNITS / 8 * TILE_BYTES + tile_unit(thread / UNITS, thread % UNITS % 8)) {}
    template <int I = 0>
    __device__ __forceinline__ void begin(unsigned char* tiles) const {
        copy_async_at<I * 128 * ROWS, I * GROUP * 16>(tiles + to, from);
        if constexpr ((I + 1) * ROWS < C) begin<I + 1>(tiles);
    }
};
// 64 values of up to 64 tokens go to a tile, with zeros for the rest.
struct TokenCopies {
    const u16* from;
    i64 stride;
    int row, to;

    __device__ __forceinline__ TokenCopies(const u16* start, i64 stride, int thread)
        : from(start + thread / 8 * stride + thread % 8 * 8), stride(stride), row(thread / 8),
          to(tile_unit(thread / 8, thread % 8)) {}
    __device__ __forceinline__ void begin(unsigned char* tile, int length) const {
        const u16* at = from;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            bool is_there = row + 16 * i < length;
            copy_async((uint4*)(tile + to + i * (128 * 16)), is_there ? at : start_of(from), is_there);
            at += 16 * stride;
        }
    }
    // Any address that may be read.
    __device__ __forceinline__ const u16* start_of(const u16* x) const { return x - row * stride; }
};
// A lane's decays, two channels of each 8, lie side by side, those of the next quarter of the channels' pairs apart by
// DECAY_PITCH.
constexpr int DECAY_PITCH = K + 16;
__device__ __forceinline__ unsigned char* decays_of(unsigned char* memory, int number) {
    return memory + DECAYS + number % DECAY_STAGES * DECAY_BYTES;
}
__device__ __forceinline__ void copy_decay(unsigned char* to, const float* from, int thread) {
    if (thread < K / 2) copy_async((uint2*)(to + thread % 4 * DECAY_PITCH + thread / 4 * 8), from + 2 * thread);
}
__device__ __forceinline__ int tokens_of(i64 rest) { return rest < C ? (int)rest : C; }
// Meets the other warpgroup once the oldest of STAGES - 1 chunks that are being copied is there; it has done with the one
// before.
__device__ __forceinline__ void hand_over_copies() {
    wait_for_copies<STAGES - 2>();
    publish_copies();
    sync_block();
}

// The warp's 16 values of all tokens of a tile: a left operand of four steps.
__device__ __forceinline__ void load_values(u32 (&a)[16], const unsigned char* tile, int warp, int lane) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        u32 found[4];
        int row = 16 * step + lane / 16 * 8 + lane % 8, unit = 2 * warp + lane / 8 % 2;
        load_matrices_transposed(found, tile + tile_unit(row, unit));
#pragma unroll
        for (int i = 0; i < 4; ++i) a[4 * step + i] = found[i];
    }
}

__device__ __forceinline__ void unpack_input(u32 word, float& low, float& high) {
#if INPUT_TYPE == 0
    low = bits_float(word << 16), high = bits_float(word & 0xffff0000u);
#else
    low = half_float((u16)word), high = half_float((u16)(word >> 16));
#endif
}
__device__ __forceinline__ u32 pack_input(float low, float high) {
#if INPUT_TYPE == 0
    return pack_bf16(low, high);
#else
    return (u32)float_half(low) | (u32)float_half(high) << 16;
#endif
}

// Sums as a left operand.
template <int N>
__device__ __forceinline__ void pack(u32 (&a)[N], const float (&d)[2 * N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) a[i] = pack_bf16(d[2 * i], d[2 * i + 1]);
}

// Writes words of columns to a result, of which word i has two neighbors for one value: a lane's are
// (8 (i / 2) + 2c, 16 warp + 8 (i % 2) + r) and the next column.
template <int N>
__device__ __forceinline__ void put_result(unsigned char* result, const u32 (&words)[N], int warp, int lane) {
    unsigned char* to = result + tile_unit(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < N; i += 4) store_matrices_transposed(to + i / 4 * (128 * 16), words + i);
}
// Stores up to ROWS rows of a result.
template <int ROWS>
__device__ __forceinline__ void store_result(u16* to, i64 stride, const unsigned char* result, int count, int thread) {
    int row = thread / 8, unit = thread % 8;
    const unsigned char* from = result + tile_unit(row, unit);
    to += row * stride + 8 * unit;
#pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) {
        if (row + 16 * i < count) *(uint4*)to = *(const uint4*)(from + i * (128 * 16));
        to += 16 * stride;
    }
}

// A state [K, V] of one head; a lane has the values r and r + 8 of its warp's, and two channels of each 8.
__device__ __forceinline__ void load_state(float (&state)[K / 2], const float* from, int lane) {
#pragma unroll
    for (int i = 0; i < K / 2; ++i)
        state[i] = from[(i64)(8 * (i / 4) + 2 * (lane % 4) + i % 2) * V + i / 2 % 2 * 8 + lane / 4];
}
__device__ __forceinline__ void store_state(float* to, const float (&state)[K / 2], int lane) {
#pragma unroll
    for (int i = 0; i < K / 2; ++i)
        to[(i64)(8 * (i / 4) + 2 * (lane % 4) + i % 2) * V + i / 2 % 2 * 8 + lane / 4] = state[i];
}

__device__ __forceinline__ void load_decays(float4 (&decays)[K / 16], const unsigned char* from, int lane) {
#pragma unroll
    for (int j = 0; j < K / 16; ++j) decays[j] = *(const float4*)(from + lane % 4 * DECAY_PITCH + 16 * j);
}
__device__ __forceinline__ void decay_state(float (&state)[K / 2], const float4 (&decays)[K / 16]) {
#pragma unroll
    for (int j = 0; j < K / 16; ++j)
#pragma unroll
        for (int i = 0; i < 8; ++i)
            state[8 * j + i] *= i < 4 ? (i % 2 ? decays[j].y : decays[j].x) : (i % 2 ? decays[j].w : decays[j].z);
}

// Per chunk: r = v - key S, o = read S + mix r, S <- decay S + write^T r, and z = solve r for the backward.
//
// The matrix units are what a walk waits for, so they have work while sums are rounded: with read S while r is, with mix r
// while the state is. No product is at a loop's edge, where the compiler would let each wait for the one before.
extern "C" __global__ void __launch_bounds__(2 * GROUP, 1) walk_chunks(
    const u16* read_ptr, const u16* key_ptr, const u16* write_ptr, const u16* mix_ptr, const u16* solve_ptr,
    const float* decay_ptr, const u16* v_ptr, u16* o_ptr, u16* z_ptr, const float* initial_ptr, float* final_ptr,
    void* states_ptr, const void* lengths, const int* offsets, i64 heads, i64 v_stride) {
    SHARED_MEMORY(memory);
    int warp = warp_index(), lane = threadIdx.x % 32;
    Walk walk = find_walk(lengths, offsets, heads);
    if (warp >= GROUP / 32) {
        int thread = threadIdx.x - GROUP;
        i64 place = (i64)walk.chunk * heads + walk.head, out = (walk.first * heads + walk.head) * V + walk.value;
        RowCopies<K> keys(key_ptr + place * (C * K), thread), reads(read_ptr + place * (C * K), thread),
            writes(write_ptr + place * (C * K), thread);
        RowCopies<C> mixes(mix_ptr + place * (C * C), thread), solves(solve_ptr + place * (C * C), thread);
        TokenCopies values(v_ptr + walk.first * v_stride + walk.head * V + walk.value, v_stride, thread);
        auto begin_decay = [&](int number) {
            const float* from = decay_ptr + (place + number * heads) * K;
            if (number < walk.count) copy_decay(decays_of(memory, number), from, thread);
        };
        auto begin_copies = [&](int number) {
            if (number < walk.count) {
                unsigned char* stage = memory + number % STAGES * STAGE_BYTES;
                keys.begin(stage), writes.begin(stage + WRITES);
                values.begin(stage + VALUES, tokens_of(walk.end - walk.first - (i64)number * C));
                if (WITH_OUTPUTS) reads.begin(stage + READS), mixes.begin(stage + MIXES);
                if (WITH_CORRECTIONS) solves.begin(stage + SOLVES);
                keys.from += heads * (C * K), reads.from += heads * (C * K), writes.from += heads * (C * K);
                mixes.from += heads * (C * C), solves.from += heads * (C * C), values.from += C * v_stride;
            }
            begin_decay(number + 1);
            close_copies();
        };
        auto store_results = [&](int count) {
            if (WITH_OUTPUTS) store_result<C>(o_ptr + out, heads * V, memory + OUTPUTS, count, thread);
            if (WITH_CORRECTIONS) store_result<C>(z_ptr + out, heads * V, memory + CORRECTIONS, count, thread);
            out += C * heads * V;
        };
        begin_decay(0);
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) begin_copies(i);
        for (int number = 0; number < walk.count; ++number) {
            hand_over_copies();
            begin_copies(number + STAGES - 1);
            await_block();
            if (number > 0) store_results(C);
            if (WITH_STATES) {
                store_result<K>((u16*)states_ptr + (place + number * heads) * (K * V) + walk.value, V, memory + STATES, K, thread);
            }
        }
        if (walk.count > 0) sync_block();  // the results' place is free
        sync_block();
        if (walk.count > 0) store_results(tokens_of(walk.end - walk.first - (i64)(walk.count - 1) * C));
        return;
    }

    i64 corner = walk.number * (K * V) + walk.value + 16 * warp;
    float state[K / 2], wrong[32], found[32];
    u32 rounded[K / 4], outputs[16] = {}, corrections[16] = {}, words[16];
    float4 decays[K / 16];
    load_state(state, initial_ptr + corner, lane);
    auto keep_state = [&](int number) {
        i64 place = (i64)(walk.chunk + number) * heads + walk.head;
        if (STATE_TYPE == 2 && number < walk.count)
            store_state((float*)states_ptr + place * (K * V) + walk.value + 16 * warp, state, lane);
    };
    auto put_results = [&]() {
        if (WITH_OUTPUTS) put_result(memory + OUTPUTS, outputs, warp, lane);
        if (WITH_CORRECTIONS) put_result(memory + CORRECTIONS, corrections, warp, lane);
    };
    pack(rounded, state);
    keep_state(0);
    if (walk.count > 0) {
        sync_block();
        load_decays(decays, decays_of(memory, 0), lane);
        decay_state(state, decays);
    }
    for (int number = 0; number < walk.count; ++number) {
        const unsigned char* stage = memory + number % STAGES * STAGE_BYTES;
        TileAddress tiles = find_tiles(stage);
        open_products();
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
            mma_rows(wrong, rounded + 4 * i, tiles_at(tiles, i / 4 * TILE_BYTES), i % 4, i > 0);
        close_products();
        if (WITH_OUTPUTS) {
#pragma unroll
            for (int i = 0; i < STEPS; ++i)
                mma_rows(found, rounded + 4 * i, tiles_at(tiles, READS + i / 4 * TILE_BYTES), i % 4, i > 0);
            close_products();
        }
        load_values(words, stage + VALUES, warp, lane);
        put_results();  // of the chunk before; of the first there are none, and nobody stores them
        if (WITH_STATES) put_result(memory + STATES, rounded, warp, lane);
        arrive_block();
        // Those after the last chunk are not used: there are none.
        load_decays(decays, decays_of(memory, number + 1), lane);
        wait_for_products<WITH_OUTPUTS>();
        settle(wrong);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float low, high;
            unpack_input(words[i], low, high);
            words[i] = pack_bf16(low - wrong[2 * i], high - wrong[2 * i + 1]);
        }
        open_products();
#pragma unroll
        for (int i = 0; i < 4; ++i) mma_columns(state, words + 4 * i, tiles_at(tiles, WRITES), i);
        close_products();
        if (WITH_OUTPUTS) {
#pragma unroll
            for (int i = 0; i < 4; ++i) mma_rows(found, words + 4 * i, tiles_at(tiles, MIXES), i);
        }
        if (WITH_CORRECTIONS) {
#pragma unroll
            for (int i = 0; i < 4; ++i) mma_rows(wrong, words + 4 * i, tiles_at(tiles, SOLVES), i, i > 0);
        }
        close_products();
        wait_for_products<1>();
        settle(state);
        pack(rounded, state);
        keep_state(number + 1);
        if (number + 1 < walk.count) decay_state(state, decays);
        wait_for_products<0>();
        settle(found), settle(wrong);
        if (WITH_OUTPUTS) {
#pragma unroll
            for (int i = 0; i < 16; ++i) outputs[i] = pack_input(found[2 * i], found[2 * i + 1]);
        }
        if (WITH_CORRECTIONS) pack(corrections, wrong);
        sync_block();
    }
    if (walk.count > 0) put_results();
    sync_block();
    store_state(final_ptr + corner, state, lane);
}

// From the last chunk to the first, with dS the gradient of the state after it: dv = mix^T do + write dS, and
// dS <- decay dS + read^T do - key^T dv. The macros are those of a walk with outputs, which are dv here, and states.
extern "C" __global__ void __launch_bounds__(2 * GROUP, 1) walk_chunks_back(
    const u16* read_ptr, const u16* key_ptr, const u16* write_ptr, const u16* mix_ptr, const float* decay_ptr,
    const u16* do_ptr, u16* dv_ptr, const float* dfinal_ptr, float* dinitial_ptr, u16* dstates_ptr, const void* lengths,
    const int* offsets, i64 heads) {
    SHARED_MEMORY(memory);
    int warp = warp_index(), lane = threadIdx.x % 32;
    Walk walk = find_walk(lengths, offsets, heads);
    if (warp >= GROUP / 32) {
        int thread = threadIdx.x - GROUP;
        i64 place = (i64)walk.chunk * heads + walk.head, last = (i64)(walk.count - 1) * heads;
        i64 token = walk.first + (i64)(walk.count - 1) * C;
        RowCopies<K> keys(key_ptr + (place + last) * (C * K), thread), reads(read_ptr + (place + last) * (C * K), thread),
            writes(write_ptr + (place + last) * (C * K), thread);
        RowCopies<C> mixes(mix_ptr + (place + last) * (C * C), thread);
        TokenCopies pulls(do_ptr + (token * heads + walk.head) * V + walk.value, heads * V, thread);
        auto begin_decay = [&](int number) {
            const float* from = decay_ptr + (place + number * heads) * K;
            if (number >= 0) copy_decay(decays_of(memory, number), from, thread);
        };
        auto begin_copies = [&](int number) {
            if (number >= 0) {
                unsigned char* stage = memory + number % STAGES * STAGE_BYTES;
                writes.begin(stage + WRITES), mixes.begin(stage + MIXES);
                pulls.begin(stage + VALUES, tokens_of(walk.end - walk.first - (i64)number * C));
                reads.begin(stage + READS), keys.begin(stage);
                keys.from -= heads * (C * K), reads.from -= heads * (C * K), writes.from -= heads * (C * K);
                mixes.from -= heads * (C * C), pulls.from -= C * heads * V;
            }
            begin_decay(number - 1);
            close_copies();
        };
        auto store_values = [&](int number) {
            i64 token = walk.first + (i64)number * C;
            store_result<C>(dv_ptr + (token * heads + walk.head) * V + walk.value, heads * V, memory + OUTPUTS,
                            tokens_of(walk.end - token), thread);
        };
        begin_decay(walk.count - 1);
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) begin_copies(walk.count - 1 - i);
        for (int number = walk.count - 1; number >= 0; --number) {
            hand_over_copies();
            begin_copies(number - (STAGES - 1));
            await_block();
            if (number + 1 < walk.count) store_values(number + 1);
            store_result<K>(dstates_ptr + (place + number * heads) * (K * V) + walk.value, V, memory + STATES, K, thread);
        }
        if (walk.count > 0) sync_block();
        sync_block();
        if (walk.count > 0) store_values(0);
        return;
    }

    i64 corner = walk.number * (K * V) + walk.value + 16 * warp;
    float state[K / 2], found[32];
    u32 rounded[K / 4], pulled[16], dv[16], taken[16];
    float4 decays[K / 16];
    load_state(state, dfinal_ptr + corner, lane);
    pack(rounded, state);
    if (walk.count > 0) {
        sync_block();
        load_decays(decays, decays_of(memory, walk.count - 1), lane);
        decay_state(state, decays);
    }
    for (int number = walk.count - 1; number >= 0; --number) {
        const unsigned char* stage = memory + number % STAGES * STAGE_BYTES;
        TileAddress tiles = find_tiles(stage);
        open_products();
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
            mma_rows(found, rounded + 4 * i, tiles_at(tiles, WRITES + i / 4 * TILE_BYTES), i % 4, i > 0);
        load_values(pulled, stage + VALUES, warp, lane);
#if INPUT_TYPE == 1
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float low, high;
            unpack_input(pulled[i], low, high);
            pulled[i] = pack_bf16(low, high);
        }
#endif
        open_products();
#pragma unroll
        for (int i = 0; i < 4; ++i) mma_columns(found, pulled + 4 * i, tiles_at(tiles, MIXES), i);
        close_products();
#pragma unroll
        for (int i = 0; i < 4; ++i) mma_columns(state, pulled + 4 * i, tiles_at(tiles, READS), i);
        close_products();
        if (number + 1 < walk.count) put_result(memory + OUTPUTS, dv, warp, lane);
        put_result(memory + STATES, rounded, warp, lane);
        arrive_block();
        load_decays(decays, decays_of(memory, number > 0 ? number - 1 : 0), lane);
        wait_for_products<1>();
        settle(found);
        pack(dv, found);
#pragma unroll
        for (int i = 0; i < 16; ++i) taken[i] = dv[i] ^ 0x80008000u;
        open_products();
#pragma unroll
        for (int i = 0; i < 4; ++i) mma_columns(state, taken + 4 * i, tiles, i);
        close_products();
        wait_for_products<0>();
        settle(state);
        pack(rounded, state);
        if (number > 0) decay_state(state, decays);
        sync_block();
    }
    if (walk.count > 0) put_result(memory + OUTPUTS, dv, warp, lane);
    sync_block();
    store_state(dinitial_ptr + corner, state, lane);
}
