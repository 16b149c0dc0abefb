// What stands between the products of a decode step, in one pass each.

#include <cmath>

#include "vectors.h"

constexpr int64_t FEW = 1 << 15;  // elements that one thread is through with before others are there

static inline Vector sigmoid(Vector x) {
  const Vector e = exponential(x < 0 ? x : -x);  // of -|x|
  return (x < 0 ? e : Vector{} + 1.0f) / (1.0f + e);
}

extern "C" {
// y = x / sqrt(mean(x^2) + eps) * weight, for each of `rows` rows of `size`
void rms_norm(const float *x, const float *weight, float *y, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (rows * size > FEW)
  for (int64_t row = 0; row < rows; row++) {
    const float *from = x + row * size;
    float *to = y + row * size;
    Vector squares = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(from + i) * load(from + i);
    float total = sum(squares);
    for (; i < size; i++) total += from[i] * from[i];
    const float scale = 1.0f / std::sqrt(total / size + eps);
    for (i = 0; i + LANES <= size; i += LANES) store(to + i, load(from + i) * scale * load(weight + i));
    for (; i < size; i++) to[i] = from[i] * scale * weight[i];
  }
}

// y = silu(gate) * up, for each of `rows` rows of `size` gates and as many behind them to be gated
void swiglu(const float *gate_up, float *y, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > FEW)
  for (int64_t row = 0; row < rows; row++) {
    const float *gate = gate_up + row * 2 * size, *up = gate + size;
    float *to = y + row * size;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
      const Vector g = load(gate + i);
      store(to + i, g * sigmoid(g) * load(up + i));
    }
    for (; i < size; i++) to[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
  }
}
}
