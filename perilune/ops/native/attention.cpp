// Softmax attention of one query per row over keys and values in pages, where they lie: each is read once.
//
// A task is a row and some of the heads that share a key head. It goes through the row's tokens in blocks: the logits
// of a block, then, with the maximum so far, the sum of exponentials and the weighted sum of values (online softmax).

#include <algorithm>
#include <cmath>

#include "vectors.h"

constexpr int TOKENS = 32;  // of a block; a multiple of LANES
constexpr int HEADS = 16;   // of a task
constexpr int CHUNK = 4;    // heads that are computed together
constexpr int WIDTH = 4;    // vectors of values that are computed together

struct Pool {
  int64_t dim, page, head, token;  // channels; elements between pages, heads and tokens
};

// Tokens that will be wanted next, of which one is fetched with each token that is in use.
template <typename Element>
struct Ahead {
  const Element *tokens;  // null for none
  int64_t dim, stride;

  void fetch(int64_t t) const {
    if (tokens == nullptr) return;
    const char *token = (const char *)(tokens + t * stride);
    for (int64_t byte = 0; byte < dim * int64_t{sizeof(Element)}; byte += LINE) __builtin_prefetch(token + byte, 0, 2);
  }
};

// logits[h][t] = q_h . k_t of `heads` heads and `count` tokens
template <int heads, typename Element>
static void score(const float *q, int64_t dim, const Element *keys, int64_t stride, int64_t count, float *logits,
                  Ahead<Element> ahead) {
  const int64_t whole = dim / LANES * LANES;
  for (int64_t t = 0; t < count; t++) {
    ahead.fetch(t);
    const Element *key = keys + t * stride;
    Vector sums[heads] = {};
    for (int64_t d = 0; d < whole; d += LANES) {
      const Vector k = load(key + d);
      for (int h = 0; h < heads; h++) sums[h] += load(q + h * dim + d) * k;
    }
    for (int h = 0; h < heads; h++) {
      float total = sum(sums[h]);
      for (int64_t d = whole; d < dim; d++) total += q[h * dim + d] * value(key + d);
      logits[h * TOKENS + t] = total;
    }
  }
}

// out[h] += sum_t p[h][t] v_t of `heads` heads and `count` tokens
template <int heads, typename Element>
static void add(const float *p, const Element *values, int64_t stride, int64_t count, int64_t dim, float *out,
                Ahead<Element> ahead) {
  int64_t d = 0;
  for (; d + WIDTH * LANES <= dim; d += WIDTH * LANES) {
    Vector sums[heads][WIDTH];
    for (int h = 0; h < heads; h++)
      for (int v = 0; v < WIDTH; v++) sums[h][v] = load(out + h * dim + d + v * LANES);
    for (int64_t t = 0; t < count; t++) {
      if (d == 0) ahead.fetch(t);
      Vector parts[WIDTH];
      for (int v = 0; v < WIDTH; v++) parts[v] = load(values + t * stride + d + v * LANES);
      for (int h = 0; h < heads; h++)
        for (int v = 0; v < WIDTH; v++) sums[h][v] += p[h * TOKENS + t] * parts[v];
    }
    for (int h = 0; h < heads; h++)
      for (int v = 0; v < WIDTH; v++) store(out + h * dim + d + v * LANES, sums[h][v]);
  }
  for (; d < dim; d++)
    for (int h = 0; h < heads; h++)
      for (int64_t t = 0; t < count; t++) out[h * dim + d] += p[h * TOKENS + t] * value(values + t * stride + d);
}

// Turns a block's logits of one head into p = exp(logit - maximum); returns what the sums so far are to be scaled by.
static float weigh(float *logits, int64_t count, float scale, float &maximum, float &total) {
  float highest = maximum;
  for (int64_t t = 0; t < count; t++) {
    logits[t] *= scale;
    highest = logits[t] > highest || std::isnan(logits[t]) ? logits[t] : highest;
  }
  for (int64_t t = count; t < (count + LANES - 1) / LANES * LANES; t++) logits[t] = -INFINITY;
  const float kept = maximum == -INFINITY ? 0.0f : exponential(Vector{} + (maximum - highest))[0];
  Vector sums = {};
  for (int64_t t = 0; t < count; t += LANES) {
    const Vector x = load(logits + t), p = exponential(x - highest);
    const Vector shown = x == -INFINITY ? Vector{} : p;
    store(logits + t, shown);
    sums += shown;
  }
  maximum = highest;
  total = total * kept + sum(sums);
  return kept;
}

template <typename Element>
static void attend(const float *q, const Element *keys, const Element *values, const int32_t *pages, int64_t length,
                   int64_t heads, int64_t block_size, Pool k, Pool v, float scale, float *out) {
  float logits[HEADS * TOKENS], maxima[HEADS], totals[HEADS];
  std::fill(maxima, maxima + heads, -INFINITY);
  std::fill(totals, totals + heads, 0.0f);
  std::fill(out, out + heads * v.dim, 0.0f);
  for (int64_t start = 0; start < length;) {
    const int64_t place = start % block_size;
    const int64_t count = std::min({block_size - place, length - start, int64_t{TOKENS}});
    const Element *key = keys + pages[start / block_size] * k.page + place * k.token;
    const Element *first = values + pages[start / block_size] * v.page + place * v.token;
    const int64_t end = start + count;
    const Element *later = end < length ? keys + pages[end / block_size] * k.page + end % block_size * k.token : nullptr;
    for (int64_t h = 0; h < heads; h += CHUNK) {
      float *at = logits + h * TOKENS;
      const Ahead<Element> ahead = {h ? nullptr : first, v.dim, v.token};
      switch (std::min(heads - h, int64_t{CHUNK})) {
        case 1: score<1>(q + h * k.dim, k.dim, key, k.token, count, at, ahead); break;
        case 2: score<2>(q + h * k.dim, k.dim, key, k.token, count, at, ahead); break;
        case 3: score<3>(q + h * k.dim, k.dim, key, k.token, count, at, ahead); break;
        default: score<CHUNK>(q + h * k.dim, k.dim, key, k.token, count, at, ahead);
      }
    }
    for (int64_t h = 0; h < heads; h++) {
      const float kept = weigh(logits + h * TOKENS, count, scale, maxima[h], totals[h]);
      if (kept != 1.0f && start)
        for (int64_t d = 0; d < v.dim; d++) out[h * v.dim + d] *= kept;
    }
    for (int64_t h = 0; h < heads; h += CHUNK) {
      const float *p = logits + h * TOKENS;
      const Ahead<Element> ahead = {h ? nullptr : later, k.dim, k.token};
      switch (std::min(heads - h, int64_t{CHUNK})) {
        case 1: add<1>(p, first, v.token, count, v.dim, out + h * v.dim, ahead); break;
        case 2: add<2>(p, first, v.token, count, v.dim, out + h * v.dim, ahead); break;
        case 3: add<3>(p, first, v.token, count, v.dim, out + h * v.dim, ahead); break;
        default: add<CHUNK>(p, first, v.token, count, v.dim, out + h * v.dim, ahead);
      }
    }
    start = end;
  }
  for (int64_t h = 0; h < heads && length; h++)
    for (int64_t d = 0; d < v.dim; d++) out[h * v.dim + d] /= totals[h];
}

template <typename Element>
static void attend_all(const float *q, const Element *keys, const Element *values, const int32_t *tables,
                       const int64_t *lengths, float *out, const int64_t *sizes, float scale) {
  const int64_t num_rows = sizes[0], num_heads = sizes[1], kv_heads = sizes[2], width = sizes[3], block_size = sizes[4];
  const Pool k = {sizes[5], sizes[6], sizes[7], sizes[8]}, v = {sizes[9], sizes[10], sizes[11], sizes[12]};
  const int64_t group = num_heads / kv_heads, parts = (group + HEADS - 1) / HEADS;
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < num_rows * kv_heads * parts; task++) {
    const int64_t row = task / (kv_heads * parts), head = task / parts % kv_heads, part = task % parts;
    const int64_t first = head * group + part * HEADS, heads = std::min(group - part * HEADS, int64_t{HEADS});
    attend(q + (row * num_heads + first) * k.dim, keys + head * k.head, values + head * v.head, tables + row * width,
           lengths[row], heads, block_size, k, v, scale, out + (row * num_heads + first) * v.dim);
  }
}

extern "C" {
void attend_float32(const float *q, const float *keys, const float *values, const int32_t *tables,
                    const int64_t *lengths, float *out, const int64_t *sizes, float scale) {
  attend_all(q, keys, values, tables, lengths, out, sizes, scale);
}

void attend_bfloat16(const float *q, const uint16_t *keys, const uint16_t *values, const int32_t *tables,
                     const int64_t *lengths, float *out, const int64_t *sizes, float scale) {
  attend_all(q, keys, values, tables, lengths, out, sizes, scale);
}
}
