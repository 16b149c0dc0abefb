// Products of a warpgroup, four warps, on Hopper's matrix units (compute capability 9.0 only), and copies in stages. The
// tests' emulator has the same functions in plain C++.
//
// Right operands lie in shared memory, in tiles of rows of 64 bfloat16, 128 bytes, a multiple of 1024 bytes from its
// start: unit u of 16 bytes of row r at 128 r + 16 (u ^ (r % 8)).
#pragma once

#include "primitives.cuh"

constexpr int TILE_BYTES = 8192;  // of 64 rows

__device__ __forceinline__ int tile_unit(int row, int unit) { return 128 * row + ((unit ^ (row & 7)) << 4); }

#ifndef EMULATED

// Another meeting of the block's threads, apart from sync_block: those that arrive go on at once, the others wait until
// all are there.
__device__ __forceinline__ void arrive_block() { asm volatile("bar.arrive 1, %0;" : : "r"(blockDim.x) : "memory"); }
__device__ __forceinline__ void await_block() { asm volatile("bar.sync 1, %0;" : : "r"(blockDim.x) : "memory"); }

// Before the first of some products: what registers and, if `publish_copies` came before, shared memory hold is seen.
__device__ __forceinline__ void open_products() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
// Waits until no more than PENDING closed groups of products are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(PENDING) : "memory");
}
// Keeps the compiler from reading sums before the wait that stands above.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i]) : : "memory");
}

// Where tiles are, as products have it; `tiles_at` is so many bytes further.
typedef unsigned long long TileAddress;
__device__ __forceinline__ TileAddress find_tiles(const unsigned char* start) {
    u32 address = (u32)__cvta_generic_to_shared(start);
    return (TileAddress)((address & 0x3ffff) >> 4 | (TILE_BYTES >> 4) << 16) | (TileAddress)(1024 >> 4 | 1u << 30) << 32;
}
__device__ __forceinline__ TileAddress tiles_at(TileAddress tiles, int bytes) { return tiles + (bytes >> 4); }

#define WIDE_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
                     "+f"(d[i + 6]), "+f"(d[i + 7])

template <bool TRANSPOSED>
__device__ __forceinline__ void mma_wide(float (&d)[32], const u32* a, unsigned long long b, bool is_added) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"
        : WIDE_8(d, 0), WIDE_8(d, 8), WIDE_8(d, 16), WIDE_8(d, 24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)is_added), "n"((int)TRANSPOSED));
}
template <bool TRANSPOSED>
__device__ __forceinline__ void mma_wide(float (&d)[64], const u32* a, unsigned long long b, bool is_added) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
        "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}\n"
        : WIDE_8(d, 0), WIDE_8(d, 8), WIDE_8(d, 16), WIDE_8(d, 24), WIDE_8(d, 32), WIDE_8(d, 40), WIDE_8(d, 48),
          WIDE_8(d, 56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)is_added), "n"((int)TRANSPOSED));
}

// Once a product has begun, d is not to be touched before it has been waited for, nor a. Each warp has 16 rows of d
// [64, 2 N]: d[4j] to d[4j + 3] as mma_bf16 has a tile of 8 columns, columns 8j and so on; a as there.

// d (+)= a b for the 16 channels from 16 step on of 64 rows of a tile: b = their transpose, rows are columns of d.
template <int N>
__device__ __forceinline__ void mma_rows(float (&d)[N], const u32* a, TileAddress tile, int step, bool is_added = true) {
    static_assert(N == 32, "a tile has 64 rows");
    mma_wide<false>(d, a, tiles_at(tile, 32 * step), is_added);
}
// The same for b = the 16 rows from 16 step on of tiles that lie side by side, one after the other.
template <int N>
__device__ __forceinline__ void mma_columns(float (&d)[N], const u32* a, TileAddress tiles, int step, bool is_added = true) {
    mma_wide<true>(d, a, tiles_at(tiles, 2048 * step), is_added);
}

// Four 8 x 8 matrices of 2-byte values, transposed, to shared memory: x[i] has (r, 2c), (r, 2c + 1) of matrix i, and lane
// 8i + j gives the address of its column j, 16 bytes.
__device__ __forceinline__ void store_matrices_transposed(void* column, const u32* x) {
    u32 address = (u32)__cvta_generic_to_shared(column);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 : : "r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

// copy_async of what is FROM bytes after `global` to TO bytes after `shared`.
template <int TO, int FROM>
__device__ __forceinline__ void copy_async_at(unsigned char* shared, const void* global) {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" : : "r"(address), "l"(global), "n"(TO), "n"(FROM)
                 : "memory");
}
// The same of 8 bytes.
__device__ __forceinline__ void copy_async(uint2* shared, const void* global) {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" : : "r"(address), "l"(global) : "memory");
}
// Closes the thread's copies so far, as a group.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
// Waits until no more than PENDING closed groups of the thread's copies are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}
// Has products see what this thread has copied or written to shared memory, once threads have met.
__device__ __forceinline__ void publish_copies() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

#endif
