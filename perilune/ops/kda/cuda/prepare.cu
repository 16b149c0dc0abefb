// The first KDA kernel: everything inside a chunk that does not need the state, for all chunks at once.
//
// Macros beside those of chunk.cuh: FOR_BACKWARD, whether `solve` is asked for.

#include "chunk.cuh"

constexpr int SQUARE = C + 4;       // pitch of a square of floats: 4 banks apart
constexpr int HALF_SQUARE = C + 8;  // of a square of bfloat16
constexpr int CARRIED = K + 8;      // of carried keys
constexpr int VERSIONS = 6;         // pairs of different blocks of 16 rows
constexpr int BUFFER = VERSIONS * 2 * 32;  // pieces of 16 bytes: decayed keys of 32 channels

// Shared memory, in bytes: log decays, which give way to the square of links and inverses and to what leaves of a mixing
// matrix; two buffers of decayed keys; carried keys, which follow sums of log decays; gains.
constexpr int MIX_AT = C * SQUARE * 4;
constexpr int VERSIONS_AT = C * PITCH * 4 > MIX_AT + C * HALF_SQUARE * 2 ? C * PITCH * 4 : MIX_AT + C * HALF_SQUARE * 2;
constexpr int CARRIED_AT = VERSIONS_AT + 2 * BUFFER * 16;
constexpr int GAINS_AT = CARRIED_AT + C * CARRIED * 2;
constexpr int SHARED = GAINS_AT + C * 4;  // that the launcher asks for

// Number of the decayed keys of block J as block I > J meets them.
__device__ __forceinline__ int version(int J, int I) { return J * (7 - J) / 2 + I - J - 1; }

// Left operands from floats with an even and the next column in the places of c and c + 4; `x` points to a lane's first
// row and even column. The right operand then has the same two rows there.
__device__ __forceinline__ void load_left(u32 (&a)[4], const float* x) {
    float2 low = *(const float2*)x, high = *(const float2*)(x + 8 * SQUARE);
    a[0] = float_bits(low.x), a[1] = float_bits(high.x), a[2] = float_bits(low.y), a[3] = float_bits(high.y);
}

// d += a b for squares of tf32, where `b` points to a lane's even row and column.
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const float* b) {
    mma_tf32(d, a[0], a[1], a[2], a[3], float_bits(b[0]), float_bits(b[SQUARE]));
}

// What a product found, as the left operand of the next, negative.
__device__ __forceinline__ void as_left(u32 (&a)[4], const float (&x)[4]) {
    a[0] = tf32_bits(-x[0]), a[1] = tf32_bits(-x[2]), a[2] = tf32_bits(-x[1]), a[3] = tf32_bits(-x[3]);
}

__device__ __forceinline__ void store_tile(float* square, const float (&x)[4]) {
    *(float2*)square = make_float2(bits_float(tf32_bits(x[0])), bits_float(tf32_bits(x[1])));
    *(float2*)(square + 8 * SQUARE) = make_float2(bits_float(tf32_bits(x[2])), bits_float(tf32_bits(x[3])));
}

// In place of the links (without their diagonal of ones) of 16 rows on the diagonal, their inverse. Run by a warp.
__device__ __forceinline__ void invert_block(float* block, int lane) {
    int column = lane % 16;
    float found[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        float even = column == i ? 1.0f : 0.0f, odd = 0.0f;
#pragma unroll
        for (int j = 0; j < i; ++j) {
            float product = block[i * SQUARE + j] * found[j];
            if (j % 2) odd -= product;
            else even -= product;
        }
        found[i] = even + odd;
    }
    sync_warp();
    if (lane < 16) {
#pragma unroll
        for (int i = 0; i < 16; ++i) block[i * SQUARE + column] = bits_float(tf32_bits(found[i]));
    }
}

// In place of the links of a later with an earlier block of SIZE rows, `corner` their first row and column, what the
// inverse has there, -(inverse of the later) links (inverse of the earlier). The warp does 16 rows from `row`, and TILES
// times 8 columns from `column`. Run by the whole block.
template <int SIZE, int TILES>
__device__ __forceinline__ void merge(float* square, int later, int earlier, int row, int column, int r, int c) {
    constexpr int STEPS_8 = SIZE / 8;
    float middle[STEPS_8][4] = {}, found[TILES][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS_8; ++s) {
        if (8 * s >= row + 16) break;
        u32 a[4];
        load_left(a, square + (later + row + r) * SQUARE + later + 8 * s + 2 * c);
#pragma unroll
        for (int u = 0; u < STEPS_8; ++u)
            multiply(middle[u], a, square + (later + 8 * s + 2 * c) * SQUARE + earlier + 8 * u + r);
    }
#pragma unroll
    for (int u = 0; u < STEPS_8; ++u) {
        u32 a[4];
        as_left(a, middle[u]);
        // Blocks above the diagonal were never written.
        if (8 * u + 8 <= column / 16 * 16) continue;
#pragma unroll
        for (int t = 0; t < TILES; ++t)
            multiply(found[t], a, square + (earlier + 8 * u + 2 * c) * SQUARE + earlier + column + 8 * t + r);
    }
    sync_block();
#pragma unroll
    for (int t = 0; t < TILES; ++t)
        store_tile(square + (later + row + r) * SQUARE + earlier + column + 8 * t + 2 * c, found[t]);
    sync_block();
}

// The power of two in a gain, and what it leaves of it; of zero both are zero.
__device__ __forceinline__ float power_of_two(float gain) { return bits_float(float_bits(gain) & 0x7f800000u); }
__device__ __forceinline__ float apart_from(float gain, float power) {
    return power > 0.0f ? gain * reciprocal(power) : 0.0f;
}

// One value head of one chunk.
//
// Writes reads exp(G) q, keys exp(G) k, write keys Tz^T (beta exp(G_C - G) k) [C, K], the mixing matrix (Aqk beta) Tz
// [C, C] and Tz, all bfloat16, and the decay of the whole chunk [K], with Tz = (I + stril(Akk beta))^-1.
//
// Products of blocks of 16 rows meet at the first row of the later block, those inside of one at its own; but those of
// its rows 8 to 15 with one another, where the gate is not bounded, at its ninth. What of a product is lost there for
// lack of range has decayed by 2^-18 at least, after the steepest decay in all of seven steps.
//
// Source: Kimi Linear, eq. 6 to 9, with the inverse moved to the write side (docs/kernels.md).
extern "C" __global__ void __launch_bounds__(128, 3) prepare_chunks(
    const void* q_ptr, const void* k_ptr, const void* g_ptr, const void* beta_ptr, const float* rate_ptr,
    const float* bias_ptr, const void* lengths_ptr, const int* offsets_ptr, const int* sequences_ptr, u32* read_ptr,
    u32* key_ptr, u32* write_ptr, u32* mix_ptr, u32* solve_ptr, float* decay_ptr, float* gain_ptr, i64 num_sequences,
    i64 heads, i64 group, i64 q_stride, i64 k_stride, i64 g_stride, i64 beta_stride, float scale, float lower_bound,
    float eps) {
    SHARED_MEMORY(shared);
    float* total = (float*)shared;
    float* square = (float*)shared;
    uint4* versions = (uint4*)(shared + VERSIONS_AT);
    u32* carried = (u32*)(shared + CARRIED_AT);
    float* gains = (float*)(shared + GAINS_AT);

    i64 number = blockIdx.x;
    int chunk = blockIdx.x / (u32)heads, head = blockIdx.x - chunk * (u32)heads, key_head = (u32)head / (u32)group;
    Place place = find_place(lengths_ptr, offsets_ptr, sequences_ptr, num_sequences, chunk);
    int length = place.length;
    if (length < 0) return;
    int warp = warp_index(), lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    int row = 16 * warp + r;

    const u16* q_rows = (const u16*)q_ptr + (place.first + row) * q_stride + key_head * K + 8 * c;
    const u16* k_rows = (const u16*)k_ptr + (place.first + row) * k_stride + key_head * K + 8 * c;
    Gates gates;
    load_gates(gates, g_ptr, place.first * g_stride + head * K, g_stride, length);
    float strength[2] = {};
#pragma unroll
    for (int w = 0; w < 2; ++w)
        if (row + 8 * w < length)
            strength[w] = load_one<BETA_TYPE>(beta_ptr, (place.first + row + 8 * w) * beta_stride + head);
    float qk[2][4] = {}, qq[2][4] = {}, kk[2][4] = {};
    {
        uint4 q[K / 32][2], k[K / 32][2];
#pragma unroll
        for (int m = 0; m < K / 32; ++m) {
            load_rows(q[m], q_rows + 32 * m, q_stride, row, length);
            load_rows(k[m], k_rows + 32 * m, k_stride, row, length);
        }
#pragma unroll
        for (int m = 0; m < K / 32; ++m) {
            add_products<INPUT_TYPE>(qk, q[m], k[m]);
            if (UNIT) add_products<INPUT_TYPE>(qq, q[m], q[m]), add_products<INPUT_TYPE>(kk, k[m], k[m]);
        }
    }
    // Gains multiply finished products, so that operands are rounded once, from the raw inputs; but their powers of two,
    // which round nothing, keep decayed rows in range. `own` has a row's query with its own key.
    float own[2], q_unit[2] = {1.0f, 1.0f}, k_unit[2] = {1.0f, 1.0f}, q_gain[2], k_gain[2], q_power[2], k_power[2];
    diagonal(own, qk, lane);
    if (UNIT) {
        float q_sum[2], k_sum[2];
        diagonal(q_sum, qq, lane);
        diagonal(k_sum, kk, lane);
#pragma unroll
        for (int w = 0; w < 2; ++w) {
            q_unit[w] = reciprocal_root(q_sum[w] + eps);
            k_unit[w] = reciprocal_root(k_sum[w] + eps);
        }
    }
#pragma unroll
    for (int w = 0; w < 2; ++w) {
        bool is_row = row + 8 * w < length;
        float beta = is_row ? beta_of(strength[w]) : 0.0f;
        q_power[w] = power_of_two(q_unit[w]), k_power[w] = power_of_two(k_unit[w]);
        q_gain[w] = apart_from(q_unit[w], q_power[w]) * scale;
        k_gain[w] = apart_from(k_unit[w], k_power[w]);
        // Rows whose squares sum up to infinity have unit vectors of zeros.
        own[w] = q_power[w] * k_power[w] > 0.0f ? own[w] * q_power[w] * k_power[w] : 0.0f;
        strength[w] = k_gain[w] * beta;
        if (c == 0) {
            gains[row + 8 * w] = strength[w];
            if (FOR_BACKWARD) {
                float* gain = gain_ptr + number * (4 * C) + row + 8 * w;
                gain[0] = k_unit[w], gain[C] = k_unit[w] * beta, gain[2 * C] = q_unit[w] * scale, gain[3 * C] = q_unit[w];
            }
        }
    }
    sum_log_decays(total, (float*)carried, gates, rate_ptr, bias_ptr, head, lower_bound);
    if (threadIdx.x < K) decay_ptr[number * K + threadIdx.x] = exp2_(total[(C - 1) * PITCH + threadIdx.x]);

    // Products with earlier blocks, in tiles of 8 columns, and inside the block.
    float far_reads[6][4] = {}, far_links[6][4] = {}, near_reads[2][4] = {}, near_links[2][4] = {};
    const float* rows = total + row * PITCH + 8 * c;
    const float* first = total + 16 * warp * PITCH + 8 * c;
    // Where the next block starts, or the chunk's last row.
    const float* next = total + (warp < 3 ? 16 * warp + 16 : C - 1) * PITCH + 8 * c;
    const float* last = total + (C - 1) * PITCH + 8 * c;
    i64 out = (number * C + row) * (K / 8) + c;
    // Again: there are not registers enough to keep them.
    uint4 q_words[2], k_words[2], q_next[2], k_next[2];
    load_rows(q_next, q_rows, q_stride, row, length);
    load_rows(k_next, k_rows, k_stride, row, length);
#pragma unroll 1
    for (int m = 0; m < K / 32; ++m) {
        uint4 read[2], key[2];
        u32 far_q[2][4], far_k[2][4];
        uint4* buffer = versions + m % 2 * BUFFER + lane;
#pragma unroll
        for (int w = 0; w < 2; ++w) q_words[w] = q_next[w], k_words[w] = k_next[w];
        if (m + 1 < K / 32) {
            load_rows(q_next, q_rows + 32 * (m + 1), q_stride, row, length);
            load_rows(k_next, k_rows + 32 * (m + 1), k_stride, row, length);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int at = 32 * m + 4 * half;
            float q[2][4], k[2][4], g[2][4], start[4], end[4];
#pragma unroll
            for (int w = 0; w < 2; ++w) {
                unpack<INPUT_TYPE>(half ? q_words[w].z : q_words[w].x, q[w][0], q[w][1]);
                unpack<INPUT_TYPE>(half ? q_words[w].w : q_words[w].y, q[w][2], q[w][3]);
                unpack<INPUT_TYPE>(half ? k_words[w].z : k_words[w].x, k[w][0], k[w][1]);
                unpack<INPUT_TYPE>(half ? k_words[w].w : k_words[w].y, k[w][2], k[w][3]);
                load_four(g[w], rows + 8 * w * PITCH + at);
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (UNIT) q[w][i] *= q_power[w], k[w][i] *= k_power[w];
            }
            load_four(start, first + at);
            load_four(end, next + at);
#pragma unroll
            for (int i = 0; i < 4; ++i) start[i] -= CENTER;
#if BOUNDED
            const float(&middle)[4] = start;
#else
            float middle[4], apart[4];
            load_four(middle, first + 8 * PITCH + at);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                apart[i] = exp2_(middle[i] - start[i]);
                middle[i] -= CENTER;
            }
#endif
            // Inside the block.
            float late[2][4], early[2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float x = g[0][i] - start[i], y = g[1][i] - middle[i];
                late[0][i] = exp2_(x), early[0][i] = k[0][i] * exp2_(-x);
                late[1][i] = exp2_(y), early[1][i] = k[1][i] * exp2_(-y);
            }
            // Left operands of what meets at the block's first row, then of its later rows with one another.
            u32 a[4], b[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int w = j % 2, i = j / 2 * 2;
                a[j] = pack_bf16(q[w][i] * late[w][i], q[w][i + 1] * late[w][i + 1]);
                b[j] = pack_bf16(k[w][i] * late[w][i], k[w][i + 1] * late[w][i + 1]);
                far_q[half][j] = a[j], far_k[half][j] = b[j];
            }
            u32 low = pack_bf16(early[1][0], early[1][1]), high = pack_bf16(early[1][2], early[1][3]);
            mma_bf16(near_reads[1], a[0], a[1], a[2], a[3], low, high);
            mma_bf16(near_links[1], b[0], b[1], b[2], b[3], low, high);
#if !BOUNDED
#pragma unroll
            for (int i = 0; i < 4; ++i) late[1][i] = late[1][i] * UNCENTER * apart[i];
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                far_q[half][j + 1] = pack_bf16(q[1][j] * late[1][j], q[1][j + 1] * late[1][j + 1]);
                far_k[half][j + 1] = pack_bf16(k[1][j] * late[1][j], k[1][j + 1] * late[1][j + 1]);
            }
#endif
            low = pack_bf16(early[0][0], early[0][1]), high = pack_bf16(early[0][2], early[0][3]);
            mma_bf16(near_reads[0], far_q[half][0], far_q[half][1], far_q[half][2], far_q[half][3], low, high);
            mma_bf16(near_links[0], far_k[half][0], far_k[half][1], far_k[half][2], far_k[half][3], low, high);
            // Keys as later blocks meet them, and as the end of the chunk does.
            float rest[4], p[2][4];
            load_four(rest, last + at);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                rest[i] = exp2_(rest[i] - end[i]);
                p[0][i] = k[0][i] * exp2_(end[i] - g[0][i]);
                p[1][i] = k[1][i] * exp2_(end[i] - g[1][i]);
            }
#pragma unroll
            for (int I = 1; I < 4; ++I) {
                if (I <= warp) continue;
                float x[4] = {UNCENTER, UNCENTER, UNCENTER, UNCENTER};
                if (I > warp + 1) {
                    load_four(x, total + 16 * I * PITCH + 8 * c + at);
#pragma unroll
                    for (int i = 0; i < 4; ++i) x[i] = exp2_(x[i] - end[i] - CENTER);
                }
                buffer[(version(warp, I) * 2 + half) * 32] =
                    make_uint4(pack_bf16(p[0][0] * x[0], p[0][1] * x[1]), pack_bf16(p[0][2] * x[2], p[0][3] * x[3]),
                               pack_bf16(p[1][0] * x[0], p[1][1] * x[1]), pack_bf16(p[1][2] * x[2], p[1][3] * x[3]));
            }
#pragma unroll
            for (int w = 0; w < 2; ++w) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float grown = exp2_(g[w][i]);
                    p[w][i] *= rest[i] * strength[w];
                    q[w][i] *= grown * q_gain[w];
                    k[w][i] *= grown * k_gain[w];
                }
                // A lane's word j of a group of 32 channels is word c of 8 columns of a product, number j; its results
                // are then 16 bytes of a row.
                u32* words = carried + (row + 8 * w) * (CARRIED / 2) + 16 * m + c;
                words[8 * half] = pack_bf16(p[w][0], p[w][1]);
                words[8 * half + 4] = pack_bf16(p[w][2], p[w][3]);
                (half ? read[w].z : read[w].x) = pack_bf16(q[w][0], q[w][1]);
                (half ? read[w].w : read[w].y) = pack_bf16(q[w][2], q[w][3]);
                (half ? key[w].z : key[w].x) = pack_bf16(k[w][0], k[w][1]);
                (half ? key[w].w : key[w].y) = pack_bf16(k[w][2], k[w][3]);
            }
        }
#pragma unroll
        for (int w = 0; w < 2; ++w) {
            ((uint4*)read_ptr)[out + w * K + 4 * m] = read[w];
            ((uint4*)key_ptr)[out + w * K + 4 * m] = key[w];
        }
        sync_block();
#pragma unroll
        for (int J = 0; J < 3; ++J) {
            if (J >= warp) break;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint4 x = buffer[(version(J, warp) * 2 + half) * 32];
                const u32(&a)[4] = far_q[half];
                const u32(&b)[4] = far_k[half];
                mma_bf16(far_reads[2 * J], a[0], a[1], a[2], a[3], x.x, x.y);
                mma_bf16(far_reads[2 * J + 1], a[0], a[1], a[2], a[3], x.z, x.w);
                mma_bf16(far_links[2 * J], b[0], b[1], b[2], b[3], x.x, x.y);
                mma_bf16(far_links[2 * J + 1], b[0], b[1], b[2], b[3], x.z, x.w);
            }
        }
    }

    float reads[8][4] = {}, links[8][4] = {};
#pragma unroll
    for (int t = 0; t < 6; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) reads[t][i] = far_reads[t][i], links[t][i] = far_links[t][i];
#pragma unroll
    for (int J = 0; J < 4; ++J) {
        if (J != warp) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // Rows r and r + 8 with columns 2c + i, then row r + 8 with column 8 + 2c + i.
            int column = 2 * c + i;
            reads[2 * J][i] = r > column ? near_reads[0][i] : r == column ? own[0] : 0.0f;
            links[2 * J][i] = r > column ? near_links[0][i] : 0.0f;
            reads[2 * J][2 + i] = near_reads[0][2 + i];
            links[2 * J][2 + i] = near_links[0][2 + i];
            reads[2 * J + 1][2 + i] = r > column ? near_reads[1][2 + i] : r == column ? own[1] : 0.0f;
            links[2 * J + 1][2 + i] = r > column ? near_links[1][2 + i] : 0.0f;
        }
    }
#pragma unroll
    for (int t = 0; t < 8; ++t) {
        if (t > 2 * warp + 1) break;
        float2 gain = *(const float2*)(gains + 8 * t + 2 * c);
        float x[4] = {gain.x, gain.y, gain.x, gain.y};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            reads[t][i] *= x[i] * q_gain[i / 2];
            links[t][i] *= x[i] * k_gain[i / 2];
        }
        float* tile = square + row * SQUARE + 8 * t + 2 * c;
        if (t < 2 * warp) {
            store_tile(tile, links[t]);
        } else {
            *(float2*)tile = make_float2(links[t][0], links[t][1]);
            *(float2*)(tile + 8 * SQUARE) = make_float2(links[t][2], links[t][3]);
        }
    }

    sync_warp();
    invert_block(square + 16 * warp * (SQUARE + 1), lane);
    sync_block();
    int pair = warp / 2 * 32;
    merge<16, 1>(square, pair + 16, pair, 0, warp % 2 * 8, r, c);
    merge<32, 2>(square, 32, 0, warp / 2 * 16, warp % 2 * 16, r, c);

    // The mixing matrix.
    u32 left[8][4];
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) left[t][i] = tf32_bits(reads[t][i % 2 * 2 + i / 2]);
    u32* mix = (u32*)(shared + MIX_AT);
#pragma unroll
    for (int t = 0; t < 8; ++t) {
        float found[4] = {};
#pragma unroll
        for (int s = t; s < 8; ++s) {
            if (s > 2 * warp + 1) break;
            // Blocks above the diagonal were never written.
            if (s / 2 >= t / 2) multiply(found, left[s], square + (8 * s + 2 * c) * SQUARE + 8 * t + r);
        }
        mix[row * (HALF_SQUARE / 2) + 4 * t + c] = pack_bf16(found[0], found[1]);
        mix[(row + 8) * (HALF_SQUARE / 2) + 4 * t + c] = pack_bf16(found[2], found[3]);
    }
    sync_warp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int at = 4 * i + lane / 8 + 16 * warp, piece = lane % 8;
        i64 to = (number * C + at) * 8 + piece;
        ((uint4*)mix_ptr)[to] = *(const uint4*)(mix + at * (HALF_SQUARE / 2) + 4 * piece);
#if FOR_BACKWARD
        uint4 words = make_uint4(0, 0, 0, 0);
        if (piece / 2 <= warp) {
            const float* x = square + at * SQUARE + 8 * piece;
            words = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                               pack_bf16(x[6], x[7]));
        }
        ((uint4*)solve_ptr)[to] = words;
#endif
    }

    // Write keys: the transposed inverse times carried keys, 64 channels at a time.
#pragma unroll
    for (int part = 0; part < K / 64; ++part) {
        float found[8][4] = {};
#pragma unroll
        for (int J = 0; J < 4; ++J) {
            if (J < warp) continue;
            const float* x = square + (16 * J + 2 * c) * SQUARE + row;
            u32 a[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float* y = x + j / 2 * 8 * SQUARE + j % 2 * 8;
                a[j] = pack_bf16(y[0], y[SQUARE]);
            }
#pragma unroll
            for (int t = 0; t < 8; t += 2) {
                u32 b[4];
                load_matrices_transposed(
                    b, carried + (16 * J + lane % 16) * (CARRIED / 2) + 32 * part + 4 * (t + lane / 16));
                mma_bf16(found[t], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma_bf16(found[t + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int w = 0; w < 2; ++w)
                ((uint4*)write_ptr)[out + w * K + 8 * part + 4 * m] = make_uint4(
                    pack_bf16(found[4 * m][2 * w], found[4 * m][2 * w + 1]),
                    pack_bf16(found[4 * m + 1][2 * w], found[4 * m + 1][2 * w + 1]),
                    pack_bf16(found[4 * m + 2][2 * w], found[4 * m + 2][2 * w + 1]),
                    pack_bf16(found[4 * m + 3][2 * w], found[4 * m + 3][2 * w + 1]));
    }
}
