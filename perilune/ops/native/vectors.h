// Vectors of this machine's width, in the notation of GCC.

#pragma once

#include <cstdint>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int64_t LINE = 64;  // bytes of a line of the cache

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2)));

static inline Vector load(const float *x) { return *(const Vector *)x; }
static inline float value(const float *x) { return *x; }

// bfloat16 is the upper half of float32
static inline Vector load(const uint16_t *x) {
  return (Vector)(__builtin_convertvector(*(const Halves *)x, Integers) << 16);
}
static inline float value(const uint16_t *x) {
  const uint32_t bits = uint32_t{*x} << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

static inline void store(float *x, Vector y) { *(Vector *)x = y; }

static inline float sum(Vector x) {
  typedef float Half __attribute__((vector_size(LANES * 2)));
  typedef float Quarter __attribute__((vector_size(LANES)));
  Half halves[2];
  __builtin_memcpy(halves, &x, sizeof x);
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  __builtin_memcpy(quarters, &half, sizeof half);
  const Quarter quarter = quarters[0] + quarters[1];
  float total = 0;
  for (int i = 0; i < LANES / 4; i++) total += quarter[i];
  return total;
}

// e^x for x <= 0, to 2 ulp; below -87 it is e^-87. Cephes' polynomial after taking out powers of 2.
static inline Vector exponential(Vector x) {
  const Vector lowest = Vector{} - 87.0f;
  x = x < lowest ? lowest : x;
  constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Vector shifted = x * 1.44269504f + SHIFT;
  const Vector whole = shifted - SHIFT;
  const Vector r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Integers exponent = (Integers)shifted << 23;  // the whole number stands in the lowest bits
  return (Vector)((Integers)p + exponent);
}
