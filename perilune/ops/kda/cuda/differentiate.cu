// The last KDA kernel: gradients of everything inside a chunk, for all chunks at once, down to the raw inputs.
//
// Everything here is turned: a matrix product has channels as its rows and rows of the chunk as its columns. A warp owns
// 32 channels and takes 16 at a time; of these, in tiles of 8 rows of the chunk, a lane has number
// 4 (r / 2) + 2h + r % 2 for h = 0, 1 with rows 2c and 2c + 1: values 2h, 2h + 1 of 4. What a product leaves is so the
// left operand of the next, and no value moves between warps.
//
// Macros beside those of chunk.cuh: VALUE_DIM, a multiple of 32; WIDE_KEYS, whether dq and dk are float32.

#include "chunk.cuh"

constexpr int V = VALUE_DIM;
constexpr int GRAM = 36;  // pitch, in words, of squares of bfloat16: 4 banks apart
// Rows of the table of what every row of the chunk has.
enum { Q_GAIN, K_GAIN, P_GAIN, BETA, OWN, ALONG_Q, ALONG_K, TABLE };

// Shared memory, in bytes: do, dv and z as right operands, gradients of products, the table.
constexpr int PIECES = C * V / 8;
constexpr int GRAMS_AT = 3 * PIECES * 16;
constexpr int TABLE_AT = GRAMS_AT + 2 * C * GRAM * 4;
constexpr int SHARED = TABLE_AT + TABLE * C * 4;  // that the launcher asks for

typedef float Tiles[8][4];
typedef u32 Words[8][2];

// Copy [C, V] of a head at `place` as right operands of products over values: pieces of 16 bytes, number
// (row / 8, values / 32, lane).
template <int TYPE>
__device__ __forceinline__ void copy_values(uint4* pieces, const void* x, i64 place, i64 stride, int length) {
    constexpr int ROWS_AT_ONCE = 8 * K / V;
    int row = threadIdx.x / (V / 8), piece = threadIdx.x % (V / 8);
    const u16* from = (const u16*)x + place + row * stride + 8 * piece;
    pieces += piece / 4 * 32 + piece % 4;
#pragma unroll
    for (int i = 0; i < C / ROWS_AT_ONCE; ++i) {
        uint4* to = pieces + row / 8 * V + row % 8 * 4;
        if (TYPE == 0) {
            copy_async(to, row < length ? from : (const u16*)x, row < length);
        } else {
            uint4 found = make_uint4(0, 0, 0, 0);
            if (row < length) found = *(const uint4*)from;
            float low, high;
            unpack<1>(found.x, low, high), found.x = pack_bf16(low, high);
            unpack<1>(found.y, low, high), found.y = pack_bf16(low, high);
            unpack<1>(found.z, low, high), found.z = pack_bf16(low, high);
            unpack<1>(found.w, low, high), found.w = pack_bf16(low, high);
            *to = found;
        }
        row += ROWS_AT_ONCE;
        from += ROWS_AT_ONCE * stride;
    }
}

// Copy squares [2, C, C].
__device__ __forceinline__ void copy_grams(u32* grams, const uint4* x) {
#pragma unroll
    for (int j = 0; j < 2 * C * 8 / K; ++j) {
        int i = threadIdx.x + j * K;
        copy_async((uint4*)(grams + i / 8 * GRAM + i % 8 * 4), x + i, true);
    }
}

// Words of a lane's row r of every tile, 4 channels; `x` is the address of the first.
template <bool AGAIN = false>
__device__ __forceinline__ void load_tiles(uint2 (&y)[8], const u16* x, i64 stride, int r, int length, u32 none) {
#pragma unroll
    for (int t = 0; t < 8; ++t) {
        y[t] = make_uint2(none, none);
        if (8 * t + r < length) y[t] = AGAIN ? load_again((const uint2*)x) : *(const uint2*)x;
        x += 8 * stride;
    }
}
__device__ __forceinline__ void turn(Words& y, const uint2 (&x)[8]) {
#pragma unroll
    for (int t = 0; t < 8; ++t) y[t][0] = transpose_matrix(x[t].x), y[t][1] = transpose_matrix(x[t].y);
}

// Four values of a tile, times what their two rows have in a row of the table.
__device__ __forceinline__ void scaled(float (&y)[4], const u32 (&words)[2], const float* gains) {
    float2 gain = load_again((const float2*)gains);
    unpack<INPUT_TYPE>(words[0], y[0], y[1]);
    unpack<INPUT_TYPE>(words[1], y[2], y[3]);
    y[0] *= gain.x, y[1] *= gain.y, y[2] *= gain.x, y[3] *= gain.y;
}

__device__ __forceinline__ void operand(u32 (&y)[2], const float (&x)[4], const float (&factor)[4]) {
    y[0] = pack_bf16(x[0] * factor[0], x[1] * factor[1]);
    y[1] = pack_bf16(x[2] * factor[2], x[3] * factor[3]);
}

// sum += x y, where x are the values of an operand.
__device__ __forceinline__ void add_product(float (&sum)[4], const u32 (&x)[2], const float (&y)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float low, high;
        unpack<0>(x[h], low, high);
        sum[2 * h] += low * y[2 * h];
        sum[2 * h + 1] += high * y[2 * h + 1];
    }
}

// Sum up over rows, up to each one, per channel; `sum` has what is before the first.
__device__ __forceinline__ void sum_up(Tiles& x, float (&sum)[2], int c) {
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float low = x[t][2 * h], pair = low + x[t][2 * h + 1];
            float other = shuffle_xor(pair, 1), four = pair + other, others = shuffle_xor(four, 2);
            float before = sum[h] + (c % 2 ? other : 0.0f) + (c / 2 ? others : 0.0f);
            x[t][2 * h] = before + low;
            x[t][2 * h + 1] = before + pair;
            sum[h] += four + others;
        }
}

// The same from each row on.
__device__ __forceinline__ void sum_down(Tiles& x, float (&sum)[2], int c) {
#pragma unroll
    for (int t = 7; t >= 0; --t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float high = x[t][2 * h + 1], pair = x[t][2 * h] + high;
            float other = shuffle_xor(pair, 1), four = pair + other, others = shuffle_xor(four, 2);
            float after = sum[h] + (c % 2 ? 0.0f : other) + (c / 2 ? 0.0f : others);
            x[t][2 * h + 1] = after + high;
            x[t][2 * h] = after + pair;
            sum[h] += four + others;
        }
}

// What a chunk's rows are to each other.
struct Chunk {
    Words q, k;                  // raw
    Tiles total;                 // base-2 log decays, summed up
    Tiles dq, dk, dp, dtotal;    // gradients of scaled queries, keys, write keys, and of `total`
    const float* table;          // at a lane's rows
    const u32* grams;            // at a lane's row and words
    int lane;

    __device__ __forceinline__ void queries(float (&y)[4], int t) const { scaled(y, q[t], table + Q_GAIN * C + 8 * t); }
    __device__ __forceinline__ void keys(float (&y)[4], int t) const { scaled(y, k[t], table + K_GAIN * C + 8 * t); }
    __device__ __forceinline__ void writes(float (&y)[4], int t) const { scaled(y, k[t], table + P_GAIN * C + 8 * t); }

    // Log decays up to the first row of a tile.
    __device__ __forceinline__ void first_total(float (&y)[2], int t) const {
#pragma unroll
        for (int h = 0; h < 2; ++h) y[h] = shuffle(total[t][2 * h], lane & ~3);
    }

    // A word of a gradient of products (0 of queries, 1 of keys) of rows of two tiles.
    __device__ __forceinline__ u32 word(int which, int t, int other) const {
        return grams[(which * C + 8 * t) * GRAM + 4 * other];
    }

    __device__ __forceinline__ void decays(float (&y)[4], int t, const float (&reference)[2]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = exp2_(-fabsf(total[t][i] - reference[i / 2]));
    }

    // sum += turned rows of HALF tiles times a gradient of products of theirs with rows of tile t.
    template <int HALF>
    __device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&x)[HALF][2], int which, int t, int tiles) const {
        if (HALF == 1) {
            mma_bf16_narrow(sum, x[0][0], x[0][1], word(which, t, tiles));
            return;
        }
#pragma unroll
        for (int s = 0; s + 1 < HALF; s += 2) {
            u32 b0 = word(which, t, tiles + s), b1 = word(which, t, tiles + s + 1);
            mma_bf16(sum, x[s][0], x[s][1], x[s + 1][0], x[s + 1][1], b0, b1);
        }
    }

    // Pairs of rows of both halves of blocks of 2 HALF tiles, which meet at the first row of the later half.
    //
    // What a pair has of the log decays between its rows is found twice, from the later and from the earlier row, and
    // with the very operands of the products: it cancels beyond the pair, as it must, whatever the operands' rounding.
    template <int HALF>
    __device__ __forceinline__ void add_split() {
#pragma unroll
        for (int block = 0; block < 8; block += 2 * HALF) {
            u32 early[HALF][2], late_q[HALF][2], late_k[HALF][2];
            float reference[2], x[4], factor[4];
            first_total(reference, block + HALF);
#pragma unroll
            for (int i = 0; i < HALF; ++i) {
                int t = block + i, later = t + HALF;
                decays(factor, t, reference);
                writes(x, t);
                operand(early[i], x, factor);
                decays(factor, later, reference);
                queries(x, later);
                operand(late_q[i], x, factor);
                keys(x, later);
#pragma unroll
                for (int j = 0; j < 4; ++j) x[j] = -x[j];
                operand(late_k[i], x, factor);
            }
#pragma unroll
            for (int i = 0; i < HALF; ++i) {
                int t = block + i, later = t + HALF;
                float reads[4] = {}, links[4] = {}, back[4] = {};
                multiply<HALF>(reads, early, 0, later, block);
                multiply<HALF>(links, early, 1, later, block);
                multiply<HALF>(back, late_q, 0, t, block + HALF);
                multiply<HALF>(back, late_k, 1, t, block + HALF);
                add_product(dtotal[later], late_q[i], reads);
                add_product(dtotal[later], late_k[i], links);
                decays(factor, later, reference);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    dq[later][j] += factor[j] * reads[j];
                    dk[later][j] -= factor[j] * links[j];
                    back[j] = -back[j];
                }
                add_product(dtotal[t], early[i], back);
                decays(factor, t, reference);
#pragma unroll
                for (int j = 0; j < 4; ++j) dp[t][j] -= factor[j] * back[j];
            }
        }
    }

    // Pairs of rows of blocks of TILES tiles that have one anchor, their first row. The later row's factor has the
    // earlier one's inverse: 2^(CENTER + apart) and 2^(-CENTER - apart), times a power of two and its inverse that leave
    // both no larger than the block's decay asks for. So large gradients do not overflow, and that power, which follows
    // later tokens, changes no bit.
    template <int TILES>
    __device__ __forceinline__ void add_anchored() {
        int r = lane / 4, c = lane % 4;
        u32 lower = (2 * c < r ? 0xffffu : 0u) | (2 * c + 1 < r ? 0xffff0000u : 0u);
#pragma unroll
        for (int block = 0; block < 8; block += TILES) {
            u32 early[TILES][2], late_q[TILES][2], late_k[TILES][2];
            float since[TILES][4], anchor[2], x[4], smaller[2], larger[2];
            first_total(anchor, block);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float apart = anchor[h] - shuffle(total[block + TILES - 1][2 * h + 1], lane | 3);
                u32 power = (u32)(CENTER - 0.5f * min(apart, 2.0f * CENTER)) << 23;
                smaller[h] = bits_float(0x3f800000u - power), larger[h] = bits_float(0x3f800000u + power);
            }
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                int t = block + i;
                float until[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    since[i][j] = total[t][j] - anchor[j / 2] + CENTER;
                    until[j] = exp2_(-since[i][j]) * larger[j / 2];
                    since[i][j] = exp2_(since[i][j]) * smaller[j / 2];
                }
                writes(x, t);
                operand(early[i], x, until);
                queries(x, t);
                operand(late_q[i], x, since[i]);
                keys(x, t);
#pragma unroll
                for (int j = 0; j < 4; ++j) x[j] = -x[j];
                operand(late_k[i], x, since[i]);
            }
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                int t = block + i;
                float reads[4] = {}, links[4] = {}, back[4] = {};
#pragma unroll
                for (int j = 0; j < TILES; ++j) {
                    u32 read = word(0, t, block + j), link = word(1, t, block + j);
                    u32 earlier = j < i ? ~0u : j > i ? 0u : lower;
                    if (j <= i) {
                        mma_bf16_narrow(reads, early[j][0], early[j][1], read & earlier);
                        mma_bf16_narrow(links, early[j][0], early[j][1], link & earlier);
                    }
                    if (j >= i) {
                        mma_bf16_narrow(back, late_q[j][0], late_q[j][1], read & ~earlier);
                        mma_bf16_narrow(back, late_k[j][0], late_k[j][1], link & ~earlier);
                    }
                }
                add_product(dtotal[t], late_q[i], reads);
                add_product(dtotal[t], late_k[i], links);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    dq[t][j] += since[i][j] * reads[j];
                    dk[t][j] -= since[i][j] * links[j];
                    back[j] = -back[j];
                }
                add_product(dtotal[t], early[i], back);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    dp[t][j] -= exp2_(-(total[t][j] - anchor[j / 2] + CENTER)) * larger[j / 2] * back[j];
            }
        }
    }
};

// Raw gates of 16 channels; values that do not decay past `length`.
struct RawGates {
#if GATE_TYPE == 2
    Tiles values;
#else
    uint2 words[8];
#endif

    // `g` is the address of the first row and channel.
    template <bool AGAIN = false>
    __device__ __forceinline__ void load(const void* g, i64 stride, int lane, int length) {
        int r = lane / 4, c = lane % 4;
#if GATE_TYPE == 2
        const float* x = (const float*)g + 2 * c * stride + 4 * (r / 2) + r % 2;
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                values[t][i] = 8 * t + 2 * c + i % 2 < length ? x[(8 * t + i % 2) * stride + i / 2 * 2] : NO_DECAY;
#else
        load_tiles<AGAIN>(words, (const u16*)g + r * stride + 4 * c, stride, r, length, NO_DECAY_WORD);
#endif
    }
    __device__ __forceinline__ void turned(Tiles& y) const {
#if GATE_TYPE == 2
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) y[t][i] = values[t][i];
#else
        Words found;
        turn(found, words);
#pragma unroll
        for (int t = 0; t < 8; ++t) {
            unpack<GATE_TYPE>(found[t][0], y[t][0], y[t][1]);
            unpack<GATE_TYPE>(found[t][1], y[t][2], y[t][3]);
        }
#endif
    }
};

// Store a tile of 16 channels, turned back; `first` is the place of the tile's first row and channel.
template <int TYPE>
__device__ __forceinline__ void store_turned(void* y, i64 first, i64 stride, const float (&x)[4], int lane, int rows) {
    int r = lane / 4, c = lane % 4;
    if (TYPE == 2) {
        float* to = (float*)y + first + 2 * c * stride + 4 * (r / 2) + r % 2;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (2 * c + i % 2 < rows) to[i % 2 * stride + i / 2 * 2] = x[i];
        return;
    }
    u32 words[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        u32 word = TYPE == 0 ? pack_bf16(x[2 * h], x[2 * h + 1])
                             : float_half(x[2 * h]) | (u32)float_half(x[2 * h + 1]) << 16;
        words[h] = transpose_matrix(word);
    }
    if (r < rows) *(uint2*)((u16*)y + first + r * stride + 4 * c) = make_uint2(words[0], words[1]);
}

// The sum over the four lanes that share channels.
__device__ __forceinline__ float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// One value head of one chunk, from the gradients of products and states to those of the inputs.
//
// What is summed over key channels leaves in parts, one of every warp: gradients of betas that are zero [K / 32, T, HV]
// and of the gate's rate [n, HV, K / 32].
//
// Source: derived in this project; Kimi Linear gives no backward.
extern "C" __global__ void __launch_bounds__(K, 256 / K) differentiate_chunks(
    const void* q_ptr, const void* k_ptr, const void* g_ptr, const void* beta_ptr, const float* rate_ptr,
    const float* bias_ptr, const void* lengths_ptr, const int* offsets_ptr, const int* sequences_ptr,
    const float* gain_ptr, const u16* states_ptr, const u16* dstates_ptr, const void* z_ptr, const void* do_ptr,
    const void* dv_ptr, const uint4* gram_ptr, const float* along_ptr, void* dq_ptr, void* dk_ptr, void* dg_ptr,
    float* dbeta_ptr, float* drate_ptr, float* dbias_ptr, i64 num_sequences, i64 heads, i64 group, i64 tokens,
    i64 q_stride, i64 k_stride, i64 g_stride, i64 beta_stride, float scale, float lower_bound) {
    SHARED_MEMORY(shared);
    uint4* pieces = (uint4*)shared;
    u32* grams = (u32*)(shared + GRAMS_AT);
    float* table = (float*)(shared + TABLE_AT);

    i64 number = blockIdx.x;
    int chunk = blockIdx.x / (u32)heads, head = blockIdx.x - chunk * (u32)heads, key_head = (u32)head / (u32)group;
    Place place = find_place(lengths_ptr, offsets_ptr, sequences_ptr, num_sequences, chunk);
    int length = place.length, warp = warp_index(), lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    if (length < 0) {
        if (GATE) {
            dbias_ptr[number * K + threadIdx.x] = 0.0f;
            if (threadIdx.x < K / 32) drate_ptr[number * (K / 32) + threadIdx.x] = 0.0f;
        }
        return;
    }

    const u16* q_head = (const u16*)q_ptr + place.first * q_stride + key_head * K;
    const u16* k_head = (const u16*)k_ptr + place.first * k_stride + key_head * K;
    const char* g_head = (const char*)g_ptr + (place.first * g_stride + head * K) * GATE_BYTES;
    float beta = 0.0f, gain[4], along[3] = {};
    if (threadIdx.x < C) {
        int i = threadIdx.x;
        if (i < length) beta = load_one<BETA_TYPE>(beta_ptr, (place.first + i) * beta_stride + head);
#pragma unroll
        for (int j = 0; j < 4; ++j) gain[j] = gain_ptr[number * (4 * C) + j * C + i];
#pragma unroll
        for (int j = 0; j < (UNIT ? 3 : 1); ++j) along[j] = along_ptr[number * (3 * C) + j * C + i];
    }
    i64 values = (place.first * heads + head) * V;
    copy_values<INPUT_TYPE>(pieces, do_ptr, values, heads * V, length);
    copy_values<0>(pieces + PIECES, dv_ptr, values, heads * V, length);
    copy_values<0>(pieces + 2 * PIECES, z_ptr, values, heads * V, length);
    copy_grams(grams, gram_ptr + number * (2 * C * 8));
    if (threadIdx.x < C) {
        int i = threadIdx.x;
        beta = i < length ? beta_of(beta) : 0.0f;
        table[Q_GAIN * C + i] = gain[2];
        table[K_GAIN * C + i] = gain[0];
        table[P_GAIN * C + i] = gain[0] * beta;
        table[BETA * C + i] = beta;
        table[OWN * C + i] = along[0];
        table[ALONG_Q * C + i] = gain[3] * gain[3] * along[1];
        table[ALONG_K * C + i] = along[2];
    }

    float rate = gate_rate(rate_ptr, head), drate = 0.0f, bound_part = BOUNDED ? 1.0f / lower_bound : 0.0f;
#if !SIGMOID
    float dbeta[8][2] = {};
#endif
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
        Chunk x;
        x.table = table + 2 * c, x.grams = grams + r * GRAM + c, x.lane = lane;
        int start = 32 * warp + 16 * half;
        // Of a lane's turned values: its two channels.
        int channels[2] = {start + 4 * (r / 2) + r % 2, start + 4 * (r / 2) + r % 2 + 2};

        // From the states: turned products with do, dv and z, and the states with their own gradients.
        float kept[2][4] = {};
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) x.dq[t][i] = x.dk[t][i] = x.dp[t][i] = 0.0f;
        uint4 state[2], dstate[2], next_state[2], next_dstate[2];
        const u16* states[2];
        i64 apart = (const u16*)dstates_ptr - states_ptr;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            states[h] = states_ptr + (number * K + channels[h]) * V + 8 * c;
            next_state[h] = *(const uint4*)states[h];
            next_dstate[h] = *(const uint4*)(states[h] + apart);
        }
        if (half == 0) {
            wait_for_copies();
            sync_block();
        }
#pragma unroll 1
        for (int m = 0; m < V / 32; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                state[h] = next_state[h], dstate[h] = next_dstate[h];
                states[h] += 32;
                if (m + 1 < V / 32) {
                    next_state[h] = *(const uint4*)states[h];
                    next_dstate[h] = *(const uint4*)(states[h] + apart);
                }
            }
            add_products<0>(kept, state, dstate);
#pragma unroll
            for (int t = 0; t < 8; ++t) {
                const uint4* at = pieces + (t * (V / 32) + m) * 32 + lane;
                uint4 b = at[0];
                mma_bf16(x.dq[t], state[0].x, state[1].x, state[0].y, state[1].y, b.x, b.y);
                mma_bf16(x.dq[t], state[0].z, state[1].z, state[0].w, state[1].w, b.z, b.w);
                b = at[PIECES];
                mma_bf16(x.dk[t], state[0].x, state[1].x, state[0].y, state[1].y, b.x, b.y);
                mma_bf16(x.dk[t], state[0].z, state[1].z, state[0].w, state[1].w, b.z, b.w);
                b = at[2 * PIECES];
                mma_bf16(x.dp[t], dstate[0].x, dstate[1].x, dstate[0].y, dstate[1].y, b.x, b.y);
                mma_bf16(x.dp[t], dstate[0].z, dstate[1].z, dstate[0].w, dstate[1].w, b.z, b.w);
            }
        }

        Gate gate[2];
        float bias[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            bias[h] = HAS_BIAS ? bias_ptr[head * K + channels[h]] : 0.0f;
            gate[h] = gate_of(rate, bias[h], lower_bound);
        }
        RawGates raw;
        uint2 words[8];
        const void* gates = g_head + start * GATE_BYTES;
        raw.load(gates, g_stride, lane, length);
        raw.turned(x.total);
        load_tiles(words, q_head + r * q_stride + start + 4 * c, q_stride, r, length, 0);
        turn(x.q, words);
        load_tiles(words, k_head + r * k_stride + start + 4 * c, k_stride, r, length, 0);
        turn(x.k, words);
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) x.total[t][i] = gate[i / 2].log_decay(x.total[t][i]);
        float sum[2] = {0.0f, 0.0f};
        sum_up(x.total, sum, c);
        float passed[2], written[2] = {0.0f, 0.0f};
        diagonal(passed, kept, lane);
#pragma unroll
        for (int t = 0; t < 8; ++t) {
            float q[4], k[4], p[4];
            x.queries(q, t);
            x.keys(k, t);
            x.writes(p, t);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float grown = exp2_(x.total[t][i]);
                x.dq[t][i] *= grown;
                x.dk[t][i] *= -grown;
                // sum has the log decays of the whole chunk.
                x.dp[t][i] *= exp2_(sum[i / 2] - x.total[t][i]);
                float write = p[i] * x.dp[t][i];
                written[i / 2] += write;
                x.dtotal[t][i] = q[i] * x.dq[t][i] + k[i] * x.dk[t][i] - write;
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) passed[h] = passed[h] * exp2_(sum[h]) + row_sum(written[h]);

        // Pairs of rows meet in a tree of halves, down to 8 rows (16 with a bounded gate), which have one anchor.
        if (is_running()) x.add_anchored<BOUNDED ? 2 : 1>();
        if (!BOUNDED && is_running()) x.add_split<1>();
        if (is_running()) x.add_split<2>();
        if (is_running()) x.add_split<4>();

        // Again: there are not registers enough to keep it.
        if (GATE) raw.load<true>(gates, g_stride, lane, length);
        // A row's log decay is in the totals of all rows from there on.
        sum_down(x.dtotal, passed, c);
        i64 out = (place.first * heads + head) * K + start;
        float dbias[2] = {0.0f, 0.0f};
        Tiles raw_gates;
        if (GATE) raw.turned(raw_gates);
#pragma unroll
        for (int t = 0; t < 8; ++t) {
            float q[4], k[4], found[4], row[TABLE][2];
            x.queries(q, t);
            x.keys(k, t);
#pragma unroll
            for (int j = 0; j < TABLE; ++j) {
                float2 found = load_again((const float2*)(x.table + j * C + 8 * t));
                row[j][0] = found.x, row[j][1] = found.y;
            }
            float raw_q[4];
            unpack<INPUT_TYPE>(x.q[t][0], raw_q[0], raw_q[1]);
            unpack<INPUT_TYPE>(x.q[t][1], raw_q[2], raw_q[3]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int e = i % 2;
                found[i] = x.dq[t][i] + row[OWN][e] * row[BETA][e] * k[i];
                found[i] = UNIT ? row[Q_GAIN][e] * found[i] - row[ALONG_Q][e] * raw_q[i] : found[i] * scale;
            }
            store_turned<WIDE_KEYS ? 2 : INPUT_TYPE>(dq_ptr, out + 8 * t * heads * K, heads * K, found, lane, length - 8 * t);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int e = i % 2;
                float dp = x.dp[t][i] + row[OWN][e] * q[i];
#if !SIGMOID
                dbeta[t][e] += k[i] * dp;
#endif
                found[i] = x.dk[t][i] + row[BETA][e] * dp;
                if (UNIT) found[i] = row[K_GAIN][e] * (found[i] - k[i] * row[ALONG_K][e]);
            }
            store_turned<WIDE_KEYS ? 2 : INPUT_TYPE>(dk_ptr, out + 8 * t * heads * K, heads * K, found, lane, length - 8 * t);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                found[i] = x.dtotal[t][i];
                if (!GATE) continue;
                int h = i / 2;
                bool is_row = 8 * t + 2 * c + i % 2 < length;
                float log_decay = gate[h].log_decay(raw_gates[t][i]) * (1.0f / LOG2E);
                float drawn = found[i] * log_decay;
#if BOUNDED
                found[i] = drawn * (1.0f - log_decay * bound_part) * rate;
                drawn = found[i] * (raw_gates[t][i] + bias[h]);
#else
                found[i] *= -rate * reciprocal(1.0f + exp2_(-(raw_gates[t][i] * gate[h].slope + gate[h].shift)));
#endif
                if (is_row) drate += drawn, dbias[h] += found[i];
            }
            store_turned<GATE_TYPE>(dg_ptr, out + 8 * t * heads * K, heads * K, found, lane, length - 8 * t);
        }
        if (GATE) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                dbias[h] = row_sum(dbias[h]);
                if (c == 0) dbias_ptr[number * K + channels[h]] = dbias[h];
            }
        }
    }
    if (GATE) {
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) drate += shuffle_xor(drate, mask);
        if (lane == 0) drate_ptr[number * (K / 32) + warp] = drate;
    }
#if !SIGMOID
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float sum = dbeta[t][e];
            for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
            int row = 8 * t + 2 * c + e;
            if (r == 0 && row < length)
                dbeta_ptr[(warp * tokens + place.first + row) * heads + head] =
                    table[BETA * C + row] == 0.0f ? sum : 0.0f;
        }
#endif
}
