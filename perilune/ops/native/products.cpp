// Products of few rows with a packed weight, y = x W^T in float32, for a CPU that has more arithmetic than bandwidth.
//
// W `[N, K]`, in float32 or bfloat16, lies as panels `[N / COLUMNS][K][COLUMNS]`, the last one filled up with zeros. A
// panel is read once from memory and then, for every further block of rows, from the cache. While a part of it is in
// use the next part is fetched: that is what the products of general libraries leave to the hardware, which cannot
// know that the next part will be wanted. Each element of y is summed up in the order of k, whatever the other rows.

#include <cstring>

#include "vectors.h"

#if defined(__AVX512F__)
constexpr int VECTORS = 2, ROWS = 11;  // 22 sums of 32 registers
#elif defined(__AVX__)
constexpr int VECTORS = 2, ROWS = 6;  // 12 of 16
#else
constexpr int VECTORS = 4, ROWS = 6;  // 24 of 32
#endif
constexpr int COLUMNS = LANES * VECTORS;
constexpr int64_t DEPTH = 512;  // of a part: 64 KiB in float32, so that it stays in the second cache

// `rows` rows by one panel by `depth` values, added to y or put there; with each k `lines` lines from `next` are fetched.
template <int rows, typename Weight>
static void multiply(const float *x, int64_t stride, const Weight *w, int64_t depth, float *y, int64_t width,
                     int64_t columns, bool is_first, const char *next, int lines) {
  Vector sums[rows][VECTORS];
  float edge[rows][COLUMNS] = {};
  const bool is_whole = columns == COLUMNS;
  for (int i = 0; i < rows; i++) {
    if (!is_whole && !is_first) std::memcpy(edge[i], y + i * width, columns * sizeof(float));
    const float *old = is_whole ? y + i * width : edge[i];
    for (int v = 0; v < VECTORS; v++) sums[i][v] = is_first ? Vector{} : load(old + v * LANES);
  }
  for (int64_t k = 0; k < depth; k++) {
    for (int line = 0; line < lines; line++, next += LINE) __builtin_prefetch(next, 0, 2);
    Vector row_of_w[VECTORS];
    for (int v = 0; v < VECTORS; v++) row_of_w[v] = load(w + k * COLUMNS + v * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      const float factor = x[i * stride + k];
      for (int v = 0; v < VECTORS; v++) sums[i][v] += factor * row_of_w[v];
    }
  }
  for (int i = 0; i < rows; i++) {
    float *target = is_whole ? y + i * width : edge[i];
    for (int v = 0; v < VECTORS; v++) store(target + v * LANES, sums[i][v]);
    if (!is_whole) std::memcpy(y + i * width, edge[i], columns * sizeof(float));
  }
}

template <int rows, typename Weight, typename... Arguments>
static void choose(int64_t wanted, const float *x, int64_t stride, const Weight *w, Arguments... arguments) {
  if constexpr (rows > 0) {
    if (wanted < rows) return choose<rows - 1>(wanted, x, stride, w, arguments...);
    multiply<rows>(x, stride, w, arguments...);
  }
}

template <typename Weight>
static void product(const float *x, const Weight *w, float *y, int64_t num_rows, int64_t width, int64_t depth) {
  const int64_t panels = (width + COLUMNS - 1) / COLUMNS;
  const int64_t blocks = (num_rows + ROWS - 1) / ROWS;
  constexpr int64_t bytes_of_k = COLUMNS * sizeof(Weight), lines_of_k = bytes_of_k < LINE ? 1 : bytes_of_k / LINE;
  const bool is_shared = blocks >= lines_of_k;
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < panels; panel++) {
    const int64_t first = panel * COLUMNS;
    const int64_t columns = width - first < COLUMNS ? width - first : COLUMNS;
    for (int64_t start = 0; start < depth; start += DEPTH) {
      const int64_t part = depth - start < DEPTH ? depth - start : DEPTH;
      const Weight *here = w + panel * depth * COLUMNS + start * COLUMNS;
      const char *next = (const char *)(here + part * COLUMNS);
      for (int64_t block = 0; block < blocks; block++) {
        const int64_t row = block * num_rows / blocks, rows = (block + 1) * num_rows / blocks - row;
        // the first blocks fetch a line with each k if there are enough of them, else the first fetches all
        const int lines = is_shared ? block < lines_of_k : block == 0 ? lines_of_k : 0;
        choose<ROWS>(rows, x + row * depth + start, depth, here, part, y + row * width + first, width, columns,
                     start == 0, next + (is_shared ? block * part * LINE : 0), lines);
      }
    }
  }
}

extern "C" {
int64_t packed_columns() { return COLUMNS; }

void product_float32(const float *x, const float *w, float *y, int64_t num_rows, int64_t width, int64_t depth) {
  product(x, w, y, num_rows, width, depth);
}

void product_bfloat16(const float *x, const uint16_t *w, float *y, int64_t num_rows, int64_t width, int64_t depth) {
  product(x, w, y, num_rows, width, depth);
}
}
