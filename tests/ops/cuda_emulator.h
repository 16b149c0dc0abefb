// Runs a CUDA kernel on a CPU: every thread of a block is a fiber, all in one thread of the process. Each runs until it
// meets a collective (of its warp, or sync_block); once all threads of a warp are there, the result is computed for all
// of them and they go on. Warps run one after the other, each up to its next sync_block, and so do whole blocks.
//
// Reported as errors: threads of a warp that meet different collectives (or one at different places of the source),
// threads that return while others wait, writes around the shared memory, rows of load_matrices outside of it,
// misaligned accesses, indices out of an array's bounds and accesses to addresses that do not exist.
#pragma once

#include <bit>
#include <cmath>
#include <concepts>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <signal.h>
#include <source_location>
#include <sys/mman.h>
#include <vector>

#if !defined(__x86_64__) || defined(EMULATE_WITH_UCONTEXT)
#include <ucontext.h>
#define EMULATOR_UCONTEXT
#endif

// Not known to the compiler of kernels either.
#undef INFINITY
#undef NAN
#undef M_PI

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct alignas(8) uint2 { unsigned int x, y; };
struct alignas(16) uint4 { unsigned int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint3 { unsigned int x, y, z; };
struct dim3 { unsigned int x, y, z; };

inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static uint3 threadIdx{}, blockIdx{};
static dim3 blockDim{1, 1, 1}, gridDim{1, 1, 1};

// CUDA's overloads.
#define EMULATOR_MIN_MAX(result, first, second) \
    inline result min(first a, second b) { return (result)a < (result)b ? (result)a : (result)b; } \
    inline result max(first a, second b) { return (result)a > (result)b ? (result)a : (result)b; }
#define EMULATOR_MIN_MAX_INTEGER(type) \
    EMULATOR_MIN_MAX(type, type, type) \
    EMULATOR_MIN_MAX(unsigned type, unsigned type, unsigned type) \
    EMULATOR_MIN_MAX(unsigned type, type, unsigned type) \
    EMULATOR_MIN_MAX(unsigned type, unsigned type, type)
EMULATOR_MIN_MAX_INTEGER(int)
EMULATOR_MIN_MAX_INTEGER(long)
EMULATOR_MIN_MAX_INTEGER(long long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

template <typename T>
inline T __ldg(const T* address) {
    return *address;
}

namespace emulator {

using Where = std::source_location;

// Contexts.

#ifdef EMULATOR_UCONTEXT

using Context = ucontext_t;

inline void transfer(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

#else

// A stack pointer; the registers that a call preserves are on the stack.
using Context = void*;

asm(R"(
.text
.globl emulator_transfer
.hidden emulator_transfer
.type emulator_transfer, @function
emulator_transfer:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_transfer, . - emulator_transfer
)");
extern "C" void emulator_transfer(void** from, void* to);

inline void transfer(Context& from, Context& to) { emulator_transfer(&from, to); }
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    void** top = (void**)(stack + size);
    top[-1] = nullptr;
    top[-2] = (void*)entry;
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    context = top - 8;
}

#endif

// State.

enum Kind {
    RUNNING,
    RETURNED,
    FAILED,
    SYNC_BLOCK,
    SYNC_WARP,
    SHUFFLE,
    SHUFFLE_XOR,
    MMA_BF16,
    MMA_F16,
    MMA_BF16_NARROW,
    MMA_TF32,
    LOAD_MATRICES,
    LOAD_MATRICES_TRANSPOSED,
    TRANSPOSE_MATRIX,
    MMA_ROWS,
    MMA_COLUMNS,
    STORE_MATRICES_TRANSPOSED,
    ARRIVE_BLOCK,
    AWAIT_BLOCK,
};
constexpr const char* NAMES[] = {"(running)", "(returned)", "(failed)", "sync_block", "sync_warp", "shuffle",
                                 "shuffle_xor", "mma_bf16", "mma_f16", "mma_bf16_narrow", "mma_tf32",
                                 "load_matrices", "load_matrices_transposed", "transpose_matrix", "mma_rows", "mma_columns", "store_matrices_transposed", "arrive_block", "await_block"};

struct Thread {
    Context context;
    Kind kind;
    Where where;  // The collective it waits in, or was in last.
    bool has_met;  // Whether it was in one.
    // The operands.
    float value;
    int number;
    u32 words[6];
    float* accumulator;
    u32* result;
    const void* row;
    int columns;
    bool is_added;
};

constexpr int GUARD = 4096;
constexpr int STACK = 256 * 1024;
constexpr int PAGE = 4096;
constexpr int MESSAGE = 1024;

static Context scheduler;
static Thread* current = nullptr;
static Thread* all_threads = nullptr;
static unsigned char* shared = nullptr;
static int shared_size = 0;
static void (*body)(void*) = nullptr;
static void* body_data = nullptr;
static char* error = nullptr;

// Always false.
[[gnu::format(printf, 1, 2)]] inline bool fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, MESSAGE, format, arguments);
    va_end(arguments);
    return false;
}

inline const char* file_of(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

struct Text {
    char text[200];
};

inline Text place(const Thread& thread) {
    Text y;
    snprintf(y.text, sizeof y.text, "%s:%u", file_of(thread.where.file_name()), (unsigned)thread.where.line());
    return y;
}

inline Text state(const Thread& thread) {
    Text y;
    if (thread.kind == RETURNED)
        snprintf(y.text, sizeof y.text, "has returned");
    else
        snprintf(y.text, sizeof y.text, "waits in %s (%s)", NAMES[thread.kind], place(thread).text);
    return y;
}

// What threads do.

inline Thread& operands(Where where) {
    current->where = where;
    current->has_met = true;
    return *current;
}

// Not inlined, so that nothing of a thread's that is kept over the switch depends on what is current.
[[gnu::noinline]] inline void wait(Kind kind) {
    current->kind = kind;
    transfer(current->context, scheduler);
}

// An error of the current thread; does not return.
inline void fail_thread(const char* what) {
    int index = (int)(current - all_threads);
    Text after{};
    if (current->has_met) snprintf(after.text, sizeof after.text, ", after the collective at %s", place(*current).text);
    fail("block %u, warp %d, lane %d%s: %s", blockIdx.x, index / 32, index % 32, after.text, what);
    wait(FAILED);
    abort();
}

inline void enter() {
    body(body_data);
    wait(RETURNED);
    abort();
}

inline void on_fault(int number, siginfo_t* info, void*) {
    if (!current) {
        signal(number, SIG_DFL);  // Again, and this time for good.
        return;
    }
    char what[100];
    snprintf(what, sizeof what, "no access to address %p (or its stack is full)", info->si_addr);
    fail_thread(what);
}

// Handles faults as errors while it exists.
struct FaultHandler {
    static constexpr int NUMBERS[2] = {SIGSEGV, SIGBUS};
    std::vector<char> stack = std::vector<char>(64 * 1024);
    stack_t stack_before{};
    struct sigaction before[2]{};

    FaultHandler() {
        stack_t with{};
        with.ss_sp = stack.data();
        with.ss_size = stack.size();
        sigaltstack(&with, &stack_before);
        struct sigaction action{};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
        for (int i = 0; i < 2; ++i) sigaction(NUMBERS[i], &action, &before[i]);
    }
    ~FaultHandler() {
        for (int i = 0; i < 2; ++i) sigaction(NUMBERS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

// Results of collectives.

inline double bf16_value(u32 bits) { return std::bit_cast<float>(bits << 16); }
inline double f16_value(u32 bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double y = exponent ? std::ldexp(mantissa + 1024.0, exponent - 25) : std::ldexp((double)mantissa, -24);
    if (exponent == 31) y = std::bit_cast<float>(0x7f800000u | (u32)mantissa << 13);
    return bits & 0x8000 ? -y : y;
}
inline double tf32_value(u32 bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

// d += a b, exact inside a double's precision and rounded once.
template <int K>
inline void multiply(Thread* lanes, const double (&a)[16][K], const double (&b)[8][K]) {
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const double* x = a[lane / 4 + i / 2 * 8];
            const double* y = b[lane % 4 * 2 + i % 2];
            double sum = lanes[lane].accumulator[i];
            for (int k = 0; k < K; ++k) sum += x[k] * y[k];
            lanes[lane].accumulator[i] = (float)sum;
        }
}

// `value` is of the lower half of a word.
inline void multiply_halves(Thread* lanes, double (*value)(u32)) {
    double a[16][16], b[8][16];
    for (int lane = 0; lane < 32; ++lane) {
        int r = lane / 4, c = lane % 4 * 2;
        const u32* words = lanes[lane].words;
        for (int i = 0; i < 2; ++i) {
            a[r][c + i] = value(words[0] >> 16 * i);
            a[r + 8][c + i] = value(words[1] >> 16 * i);
            a[r][c + 8 + i] = value(words[2] >> 16 * i);
            a[r + 8][c + 8 + i] = value(words[3] >> 16 * i);
            b[r][c + i] = value(words[4] >> 16 * i);
            b[r][c + 8 + i] = value(words[5] >> 16 * i);
        }
    }
    multiply(lanes, a, b);
}

inline void multiply_narrow(Thread* lanes) {
    double a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
        int r = lane / 4, c = lane % 4 * 2;
        const u32* words = lanes[lane].words;
        for (int i = 0; i < 2; ++i) {
            a[r][c + i] = bf16_value(words[0] >> 16 * i);
            a[r + 8][c + i] = bf16_value(words[1] >> 16 * i);
            b[r][c + i] = bf16_value(words[4] >> 16 * i);
        }
    }
    multiply(lanes, a, b);
}

inline void transpose(Thread* lanes) {
    u16 values[8][8];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 2; ++i) values[lane / 4][lane % 4 * 2 + i] = (u16)(lanes[lane].words[0] >> 16 * i);
    for (int lane = 0; lane < 32; ++lane) {
        int r = lane / 4, c = lane % 4 * 2;
        lanes[lane].words[0] = values[c][r] | (u32)values[c + 1][r] << 16;
    }
}

inline void multiply_tf32(Thread* lanes) {
    double a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
        int r = lane / 4, c = lane % 4;
        const u32* words = lanes[lane].words;
        a[r][c] = tf32_value(words[0]);
        a[r + 8][c] = tf32_value(words[1]);
        a[r][c + 4] = tf32_value(words[2]);
        a[r + 8][c + 4] = tf32_value(words[3]);
        b[r][c] = tf32_value(words[4]);
        b[r][c + 4] = tf32_value(words[5]);
    }
    multiply(lanes, a, b);
}

inline bool load(Thread* lanes, int warp, bool is_transposed) {
    u16 values[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
        intptr_t offset = (intptr_t)lanes[lane].row - (intptr_t)shared;
        if (offset < 0 || offset + 16 > shared_size || offset % 16)
            return fail("block %u, warp %d, lane %d: the row of %s at %s is at %lld in shared memory of %d bytes, %s",
                        blockIdx.x, warp, lane, NAMES[lanes[lane].kind], place(lanes[lane]).text, (long long)offset,
                        shared_size, offset % 16 ? "which is no multiple of 16" : "outside");
        memcpy(values[lane / 8][lane % 8], lanes[lane].row, 16);
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            int r = lane / 4, c = lane % 4 * 2;
            u32 low = is_transposed ? values[i][c][r] : values[i][r][c];
            u32 high = is_transposed ? values[i][c + 1][r] : values[i][r][c + 1];
            lanes[lane].result[i] = low | high << 16;
        }
    return true;
}

inline bool store(Thread* lanes, int warp) {
    for (int lane = 0; lane < 32; ++lane) {
        intptr_t offset = (intptr_t)lanes[lane].row - (intptr_t)shared;
        if (offset < 0 || offset + 16 > shared_size || offset % 16)
            return fail("block %u, warp %d, lane %d: the column of %s at %s is at %lld in shared memory of %d bytes, %s",
                        blockIdx.x, warp, lane, NAMES[lanes[lane].kind], place(lanes[lane]).text, (long long)offset,
                        shared_size, offset % 16 ? "which is no multiple of 16" : "outside");
        u16 column[8];
        int matrix = lane / 8, j = lane % 8;
        for (int r = 0; r < 8; ++r) column[r] = (u16)(lanes[4 * r + j / 2].words[matrix] >> 16 * (j % 2));
        memcpy((void*)lanes[lane].row, column, 16);
    }
    return true;
}

// A warp's share of the products of warpgroup.cuh.
inline bool multiply_tile(Thread* lanes, int warp, bool is_transposed) {
    constexpr int TILE = 8192;
    int columns = lanes[0].columns, step = lanes[0].number;
    const unsigned char* tile = (const unsigned char*)lanes[0].row;
    intptr_t offset = (intptr_t)tile - (intptr_t)shared;
    if (offset < 0 || offset % 1024 || offset + (is_transposed ? columns / 64 : 1) * TILE > shared_size)
        return fail("block %u, warp %d: the tile of %s at %s is at %lld in shared memory of %d bytes, %s", blockIdx.x,
                    warp, NAMES[lanes[0].kind], place(lanes[0]).text, (long long)offset, shared_size,
                    offset % 1024 ? "which is no multiple of 1024" : "outside");
    auto value = [&](int row, int column) {
        u16 bits;
        memcpy(&bits, tile + column / 64 * TILE + 128 * row + 16 * (column % 64 / 8 ^ row % 8) + column % 8 * 2, 2);
        return bf16_value(bits);
    };
    double a[16][16];
    for (int lane = 0; lane < 32; ++lane) {
        int r = lane / 4, c = lane % 4 * 2;
        const u32* words = lanes[lane].words;
        for (int i = 0; i < 8; ++i) a[r + i / 2 % 2 * 8][c + i / 4 * 8 + i % 2] = bf16_value(words[i / 2] >> 16 * (i % 2));
    }
    std::vector<double> b(16 * columns);
    for (int n = 0; n < columns; ++n)
        for (int k = 0; k < 16; ++k) b[16 * n + k] = is_transposed ? value(16 * step + k, n) : value(n, 16 * step + k);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < columns / 2; ++i) {
            const double* x = a[lane / 4 + i / 2 % 2 * 8];
            const double* y = &b[16 * (i / 4 * 8 + lane % 4 * 2 + i % 2)];
            double sum = lanes[lane].is_added ? lanes[lane].accumulator[i] : 0.0;
            for (int k = 0; k < 16; ++k) sum += x[k] * y[k];
            lanes[lane].accumulator[i] = (float)sum;
        }
    return true;
}

inline bool finish(Thread* lanes, int warp) {
    switch (lanes[0].kind) {
        case SHUFFLE:
        case SHUFFLE_XOR: {
            float values[32];
            for (int lane = 0; lane < 32; ++lane) values[lane] = lanes[lane].value;
            for (int lane = 0; lane < 32; ++lane) {
                int from = lanes[lane].kind == SHUFFLE ? lanes[lane].number : lane ^ lanes[lane].number;
                lanes[lane].value = values[from & 31];
            }
            return true;
        }
        case MMA_BF16: multiply_halves(lanes, bf16_value); return true;
        case MMA_F16: multiply_halves(lanes, f16_value); return true;
        case MMA_BF16_NARROW: multiply_narrow(lanes); return true;
        case MMA_TF32: multiply_tf32(lanes); return true;
        case TRANSPOSE_MATRIX: transpose(lanes); return true;
        case STORE_MATRICES_TRANSPOSED: return store(lanes, warp);
        case MMA_ROWS: return multiply_tile(lanes, warp, false);
        case MMA_COLUMNS: return multiply_tile(lanes, warp, true);
        case LOAD_MATRICES: return load(lanes, warp, false);
        case LOAD_MATRICES_TRANSPOSED: return load(lanes, warp, true);
        default: return true;
    }
}

// The scheduler.

// Not a number in every format of 2 and 4 bytes, so that reads also show.
struct GuardBytes {
    unsigned char bytes[GUARD];
    constexpr GuardBytes() : bytes() {
        for (int i = 0; i < GUARD; ++i) bytes[i] = i % 2 ? 0x7f : 0xf5;
    }
};
static constexpr GuardBytes GUARD_BYTES{};

inline bool check_guards(const Thread* lanes, int warp) {
    for (int side = 0; side < 2; ++side) {
        int start = side ? shared_size : -GUARD;
        if (!memcmp(shared + start, GUARD_BYTES.bytes, GUARD)) continue;
        int i = 0;
        while (shared[start + i] == GUARD_BYTES.bytes[i]) ++i;
        return fail("block %u, warp %d: wrote outside of the shared memory, at %d of %d bytes; lane 0 then %s",
                    blockIdx.x, warp, start + i, shared_size, state(lanes[0]).text);
    }
    return true;
}

// Whether all threads of the warp wait for the same or have all returned.
inline bool check_together(const Thread* lanes, int warp) {
    for (int lane = 1; lane < 32; ++lane) {
        const Thread &first = lanes[0], &other = lanes[lane];
        bool is_same = first.kind == other.kind;
        if (is_same && first.kind != RETURNED)
            is_same = first.where.line() == other.where.line() && first.where.column() == other.where.column() &&
                      !strcmp(first.where.file_name(), other.where.file_name());
        if (!is_same)
            return fail("block %u, warp %d: its threads diverge: lane 0 %s, lane %d %s", blockIdx.x, warp,
                        state(first).text, lane, state(other).text);
    }
    return true;
}

// Warps that are in the meeting of arrive_block and await_block.
static int arrived = 0;

// Runs a warp until it waits in sync_block or await_block or has returned. Backwards it is also held where it arrives,
// so that whoever awaits it goes first: forwards it runs ahead of them.
inline bool run_warp(Thread* lanes, int warp, bool is_backwards) {
    for (;;) {
        for (int i = 0; i < 32; ++i) {
            int lane = is_backwards ? 31 - i : i;
            current = lanes + lane;
            threadIdx.x = warp * 32 + lane;
            current->kind = RUNNING;
            transfer(scheduler, current->context);
            bool has_failed = current->kind == FAILED;
            current = nullptr;
            if (has_failed) return false;
        }
        if (!check_guards(lanes, warp) || !check_together(lanes, warp)) return false;
        if (lanes[0].kind == ARRIVE_BLOCK || lanes[0].kind == AWAIT_BLOCK) ++arrived;
        if (lanes[0].kind == RETURNED || lanes[0].kind == SYNC_BLOCK || lanes[0].kind == AWAIT_BLOCK) return true;
        if (lanes[0].kind == ARRIVE_BLOCK && is_backwards) return true;
        if (!finish(lanes, warp)) return false;
    }
}

inline bool run_block(Thread* threads, int warps, bool is_backwards) {
    std::vector<bool> is_waiting(warps);
    arrived = 0;
    for (;;) {
        for (int i = 0; i < warps; ++i) {
            int warp = is_backwards ? warps - 1 - i : i;
            if (is_waiting[warp]) continue;
            if (!run_warp(threads + 32 * warp, warp, is_backwards)) return false;
            is_waiting[warp] = true;
        }
        if (arrived > warps) return fail("block %u: a warp arrived again before all had", blockIdx.x);
        if (arrived == warps) {
            for (int warp = 0; warp < warps; ++warp)
                if (threads[32 * warp].kind == AWAIT_BLOCK) is_waiting[warp] = false;
            arrived = 0;
            continue;
        }
        bool is_held = false;
        for (int warp = 0; warp < warps; ++warp)
            if (threads[32 * warp].kind == ARRIVE_BLOCK) is_waiting[warp] = false, is_held = true;
        if (is_held) continue;
        is_waiting.assign(warps, false);
        for (int warp = 1; warp < warps; ++warp)
            if (threads[32 * warp].kind != threads[0].kind)
                return fail("block %u: its warps diverge: warp 0 %s, warp %d %s", blockIdx.x, state(threads[0]).text,
                            warp, state(threads[32 * warp]).text);
        if (threads[0].kind == RETURNED) return true;
    }
}

// Runs `kernel`, a function without arguments. 0, or 1 with an error's message.
template <typename Kernel>
inline int run(int grid, int threads, int shared_bytes, bool is_backwards, char* message, Kernel kernel) {
    error = message;
    if (threads < 32 || threads > 1024 || threads % 32 || grid < 0 || shared_bytes < 0) {
        fail("cannot run %d blocks of %d threads with %d bytes of shared memory", grid, threads, shared_bytes);
        return 1;
    }
    body = [](void* data) { (*(Kernel*)data)(); };
    body_data = &kernel;

    size_t stacks_size = (size_t)threads * STACK;
    char* stacks = (char*)mmap(nullptr, stacks_size, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) {
        fail("no memory for the stacks of %d threads", threads);
        return 1;
    }
    for (int i = 0; i < threads; ++i) mprotect(stacks + (size_t)i * STACK, PAGE, PROT_NONE);
    std::vector<Thread> states(threads);
    all_threads = states.data();
    std::vector<uint4> memory((2 * GUARD + shared_bytes + 15) / 16);
    shared = (unsigned char*)memory.data() + GUARD;
    shared_size = shared_bytes;
    gridDim.x = grid;
    blockDim.x = threads;

    bool is_right = true;
    {
        FaultHandler handler;
        for (int block = 0; block < grid && is_right; ++block) {
            blockIdx.x = block;
            memcpy(shared - GUARD, GUARD_BYTES.bytes, GUARD);
            memset(shared, 0xff, shared_size);
            memcpy(shared + shared_size, GUARD_BYTES.bytes, GUARD);
            for (int i = 0; i < threads; ++i) {
                states[i].has_met = false;
                prepare(states[i].context, stacks + (size_t)i * STACK, STACK, enter);
            }
            is_right = run_block(states.data(), threads / 32, is_backwards);
        }
    }
    munmap(stacks, stacks_size);
    return is_right ? 0 : 1;
}

// Arguments that become a kernel's parameters of exactly these types.
struct Pointer {
    void* address;
    template <typename T>
    operator T*() const {
        return (T*)address;
    }
};
struct Integer {
    long long value;
    template <std::same_as<long long> T>
    operator T() const {
        return value;
    }
};
struct Float {
    float value;
    template <std::same_as<float> T>
    operator T() const {
        return value;
    }
};

inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

inline u32 bf16_bits(float x) {
    u32 bits = std::bit_cast<u32>(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline void multiply_add(Kind kind, float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, Where where) {
    Thread& mine = operands(where);
    mine.accumulator = d;
    u32 words[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(mine.words, words, sizeof words);
    wait(kind);
}

inline void multiply_wide(Kind kind, float* d, int columns, const u32* a, const void* tile, int step, bool is_added,
                          Where where) {
    Thread& mine = operands(where);
    mine.accumulator = d;
    memcpy(mine.words, a, 4 * sizeof(u32));
    mine.row = tile;
    mine.columns = columns;
    mine.number = step;
    mine.is_added = is_added;
    wait(kind);
}

inline void load_rows(Kind kind, u32* y, const void* row, Where where) {
    Thread& mine = operands(where);
    mine.result = y;
    mine.row = row;
    wait(kind);
}

inline float exchange(Kind kind, float x, int number, Where where) {
    Thread& mine = operands(where);
    mine.value = x;
    mine.number = number;
    wait(kind);
    return mine.value;
}

// What the compiler's checks report.
struct Checked {
    const char* file;
    u32 line, column;
    const void* type;
    unsigned char log_alignment;
};

}  // namespace emulator

extern "C" inline __attribute__((used)) void __ubsan_handle_type_mismatch_v1(emulator::Checked* data, void* address) {
    char what[300];
    snprintf(what, sizeof what, "%s:%u: address %p is no multiple of %d", emulator::file_of(data->file), data->line,
             address, 1 << data->log_alignment);
    emulator::fail_thread(what);
}

extern "C" inline __attribute__((used)) void __ubsan_handle_out_of_bounds(emulator::Checked* data, void* index) {
    char what[300];
    snprintf(what, sizeof what, "%s:%u: index %lld is out of an array's bounds", emulator::file_of(data->file),
             data->line, (long long)(intptr_t)index);
    emulator::fail_thread(what);
}

// The functions of primitives.cuh.

#define SHARED_MEMORY(name) unsigned char* const name = emulator::shared

inline void sync_block(emulator::Where where = emulator::Where::current()) {
    emulator::operands(where);
    emulator::wait(emulator::SYNC_BLOCK);
}
inline void sync_warp(emulator::Where where = emulator::Where::current()) {
    emulator::operands(where);
    emulator::wait(emulator::SYNC_WARP);
}
inline float shuffle_xor(float x, int mask, emulator::Where where = emulator::Where::current()) {
    return emulator::exchange(emulator::SHUFFLE_XOR, x, mask, where);
}
inline float shuffle(float x, int lane, emulator::Where where = emulator::Where::current()) {
    return emulator::exchange(emulator::SHUFFLE, x, lane, where);
}

inline int warp_index() { return (int)threadIdx.x / 32; }

inline u32 float_bits(float x) { return std::bit_cast<u32>(x); }
inline float bits_float(u32 x) { return std::bit_cast<float>(x); }

inline bool is_running() { return true; }
inline float2 load_again(const float2* shared) { return *shared; }
inline uint2 load_again(const uint2* global) { return *global; }

inline float exp2_(float x) { return emulator::flush((float)std::exp2((double)emulator::flush(x))); }
inline float log2_(float x) { return emulator::flush((float)std::log2((double)emulator::flush(x))); }
inline float reciprocal(float x) { return emulator::flush((float)(1.0 / (double)emulator::flush(x))); }
inline float reciprocal_root(float x) { return emulator::flush((float)(1.0 / std::sqrt((double)emulator::flush(x)))); }

inline u32 pack_bf16(float low, float high) { return emulator::bf16_bits(low) | emulator::bf16_bits(high) << 16; }
inline float half_float(u16 x) { return (float)emulator::f16_value(x); }
inline u16 float_half(float x) {
    if (x != x) return 0x7fff;
    u16 sign = float_bits(x) >> 16 & 0x8000;
    double y = fabsf(x);
    if (y >= 65536) return sign | 0x7c00;
    if (y < 0x1p-14) return sign | (u16)std::nearbyint(y * 0x1p24);
    int exponent = std::ilogb(y);
    // A mantissa that is rounded up to 2048 carries into the exponent.
    return sign | (u16)(((exponent + 15) << 10) + ((int)std::nearbyint(std::ldexp(y, 10 - exponent)) - 1024));
}
inline u32 tf32_bits(float x) { return x != x ? 0x7fffffffu : (float_bits(x) + 0x1000u) & 0xffffe000u; }

inline void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,
                     emulator::Where where = emulator::Where::current()) {
    emulator::multiply_add(emulator::MMA_BF16, d, a0, a1, a2, a3, b0, b1, where);
}
inline void mma_f16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,
                    emulator::Where where = emulator::Where::current()) {
    emulator::multiply_add(emulator::MMA_F16, d, a0, a1, a2, a3, b0, b1, where);
}
inline void mma_bf16_narrow(float (&d)[4], u32 a0, u32 a1, u32 b0,
                            emulator::Where where = emulator::Where::current()) {
    emulator::multiply_add(emulator::MMA_BF16_NARROW, d, a0, a1, 0, 0, b0, 0, where);
}
inline void mma_tf32(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,
                     emulator::Where where = emulator::Where::current()) {
    emulator::multiply_add(emulator::MMA_TF32, d, a0, a1, a2, a3, b0, b1, where);
}

inline void copy_async(uint4* shared, const void* global, bool is_there) {
    *shared = is_there ? *(const uint4*)global : uint4{0, 0, 0, 0};
}
inline void wait_for_copies() {}
inline u32 transpose_matrix(u32 x, emulator::Where where = emulator::Where::current()) {
    emulator::Thread& mine = emulator::operands(where);
    mine.words[0] = x;
    emulator::wait(emulator::TRANSPOSE_MATRIX);
    return mine.words[0];
}
inline void load_matrices(u32 (&y)[4], const void* row, emulator::Where where = emulator::Where::current()) {
    emulator::load_rows(emulator::LOAD_MATRICES, y, row, where);
}
inline void load_matrices_transposed(u32 (&y)[4], const void* row, emulator::Where where = emulator::Where::current()) {
    emulator::load_rows(emulator::LOAD_MATRICES_TRANSPOSED, y, row, where);
}

// Those of warpgroup.cuh. Products and copies are done at once, so that a missing wait does not show.

inline void arrive_block(emulator::Where where = emulator::Where::current()) {
    emulator::operands(where);
    emulator::wait(emulator::ARRIVE_BLOCK);
}
inline void await_block(emulator::Where where = emulator::Where::current()) {
    emulator::operands(where);
    emulator::wait(emulator::AWAIT_BLOCK);
}
inline void open_products() {}
inline void close_products() {}
template <int PENDING>
inline void wait_for_products() {}
template <int N>
inline void settle(float (&)[N]) {}
using TileAddress = const unsigned char*;
inline TileAddress find_tiles(const unsigned char* start) { return start; }
inline TileAddress tiles_at(TileAddress tiles, int bytes) { return tiles + bytes; }
template <int N>
inline void mma_rows(float (&d)[N], const u32* a, TileAddress tile, int step, bool is_added = true,
                     emulator::Where where = emulator::Where::current()) {
    static_assert(N == 32, "a tile has 64 rows");
    emulator::multiply_wide(emulator::MMA_ROWS, d, 2 * N, a, tile, step, is_added, where);
}
template <int N>
inline void mma_columns(float (&d)[N], const u32* a, TileAddress tiles, int step, bool is_added = true,
                        emulator::Where where = emulator::Where::current()) {
    emulator::multiply_wide(emulator::MMA_COLUMNS, d, 2 * N, a, tiles, step, is_added, where);
}
template <int TO, int FROM>
inline void copy_async_at(unsigned char* shared, const void* global) {
    copy_async((uint4*)(shared + TO), (const unsigned char*)global + FROM, true);
}
inline void copy_async(uint2* shared, const void* global) { *shared = *(const uint2*)global; }
inline void close_copies() {}
template <int PENDING>
inline void wait_for_copies() {}
inline void publish_copies() {}
inline void store_matrices_transposed(void* column, const u32* x,
                                      emulator::Where where = emulator::Where::current()) {
    emulator::Thread& mine = emulator::operands(where);
    memcpy(mine.words, x, 4 * sizeof(u32));
    mine.row = column;
    emulator::wait(emulator::STORE_MATRICES_TRANSPOSED);
}
