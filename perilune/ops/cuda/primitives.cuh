// What the CUDA kernels of this project take from the hardware. The tests' emulator (tests/ops/cuda_emulator.h) has the
// same functions in plain C++, so that kernels run on a CPU, thread by thread.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#ifndef EMULATED

#define SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

// Number of the warp in its block, known to the compiler to be the same in all of its threads.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0); }

__device__ __forceinline__ u32 float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(u32 x) { return __uint_as_float(x); }

// Loads that the compiler does not replace by what it has from an earlier one: it computes again what follows from them
// rather than to keep it in registers.
__device__ __forceinline__ float2 load_again(const float2* shared) {
    float2 y;
    u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(y.x), "=f"(y.y) : "r"(address) : "memory");
    return y;
}
__device__ __forceinline__ uint2 load_again(const uint2* global) {
    uint2 y;
    asm volatile("ld.volatile.global.v2.u32 {%0, %1}, [%2];" : "=r"(y.x), "=r"(y.y) : "l"(global) : "memory");
    return y;
}

// True, which the compiler does not know: what stands in such branches it does not mix, for which it would run out of
// registers.
__device__ __forceinline__ bool is_running() {
    u32 warps;
    asm volatile("mov.u32 %0, %%nwarpid;" : "=r"(warps));
    return warps > 0;
}

// 2^x; results below every normal float32 are zero.
__device__ __forceinline__ float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two bfloat16 in a word, the first in the lower half, rounded to the nearest.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ float half_float(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
// A half from a float, rounded to the nearest.
__device__ __forceinline__ u16 float_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
// An operand of mma_tf32, which takes the 10 leading bits of a mantissa: rounded to the nearest there.
__device__ __forceinline__ u32 tf32_bits(float x) { return __float_as_uint(x) + 0x1000u; }

// d += a b for a [16, 16], b [16, 8] of bfloat16. With r = lane / 4 and c = lane % 4: a0 = (r, 2c), a1 = (r + 8, 2c),
// a2 = (r, 2c + 8), a3 = (r + 8, 2c + 8), each with its right neighbor; b0 = (2c, r), b1 = (2c + 8, r), each with the
// one below; d0, d1 = (r, 2c), (r, 2c + 1), d2, d3 = (r + 8, 2c), (r + 8, 2c + 1).
__device__ __forceinline__ void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same for half.
__device__ __forceinline__ void mma_f16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// d += a b for a [16, 8], b [8, 8] of bfloat16: the first half of the columns of a and of the rows of b.
__device__ __forceinline__ void mma_bf16_narrow(float (&d)[4], u32 a0, u32 a1, u32 b0) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
}
// d += a b for a [16, 8], b [8, 8] in tf32: a0 = (r, c), a1 = (r + 8, c), a2 = (r, c + 4), a3 = (r + 8, c + 4);
// b0 = (c, r), b1 = (c + 4, r); d as above.
__device__ __forceinline__ void mma_tf32(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 2-byte values from shared memory; lane 8i + j gives the address of row j of matrix i, 16 bytes.
// y[i] has (r, 2c), (r, 2c + 1) of matrix i, and of its transpose in the second function.
__device__ __forceinline__ void load_matrices(u32 (&y)[4], const void* row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&y)[4], const void* row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3]) : "r"(address) : "memory");
}

// Copies 16 bytes to shared memory, or as many zeros, and does not wait: wait_for_copies does, for all of the thread's.
__device__ __forceinline__ void copy_async(uint4* shared, const void* global, bool is_there) {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(address), "l"(global), "r"(is_there ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }

// From (r, 2c), (r, 2c + 1) of an 8 x 8 matrix of 2-byte values to those of its transpose.
__device__ __forceinline__ u32 transpose_matrix(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

#endif
