// Attention's scores to their exponentials, and their gradient: one pass over a block each.
//
// Scores are [sequences, heads, rows, keys]. Added to them: a bias of the same shape, or of one
// sequence for all, and the padding [sequences, keys], 0 or -inf; keys ahead of a query are hidden.

#include "passes.h"

#include <immintrin.h>

#include <algorithm>
#include <limits>

namespace {

using Vector = __m256;

constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

inline Vector all(float value) { return _mm256_set1_ps(value); }

// exp(x) with coefficients of the Cephes library; 0 where it would be no normal number.
inline Vector exponential(Vector x) {
  const Vector too_small = _mm256_cmp_ps(x, all(-87.33f), _CMP_LT_OQ);
  x = _mm256_min_ps(all(88.72f), x);  // NaN stays
  const Vector power =
      _mm256_round_ps(x * all(1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector rest = x - power * all(0.693359375f) - power * all(-2.12194440e-4f);
  Vector y = all(1.9875691500e-4f);
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                     5.0000001201e-1f})
    y = y * rest + all(next);
  y = y * (rest * rest) + rest + all(1.0f);
  const __m256i bits = _mm256_slli_epi32(_mm256_cvtps_epi32(power), 23);
  // Added to the exponent: 2^128 alone would be no number.
  y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), bits));
  return _mm256_andnot_ps(too_small, y);
}

inline __m256i lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::min<int64_t>(count, 8))),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// A row of scores, and what is added to it.
struct Row {
  float* scores;
  const float* bias;
  const float* padding;
  int64_t keys, seen;  // the first `seen` keys are not ahead

  // Scores of 8 keys; those ahead and those behind the row are hidden.
  Vector at(int64_t key) const {
    if (seen - key >= 8) {
      Vector x = _mm256_loadu_ps(scores + key);
      if (bias) x = x + _mm256_loadu_ps(bias + key);
      return padding ? x + _mm256_loadu_ps(padding + key) : x;
    }
    const __m256i mask = lanes(seen - key);
    Vector x = _mm256_maskload_ps(scores + key, mask);
    if (bias) x = x + _mm256_maskload_ps(bias + key, mask);
    if (padding) x = x + _mm256_maskload_ps(padding + key, mask);
    return _mm256_blendv_ps(all(HIDDEN), x, _mm256_castsi256_ps(mask));
  }

  void store(int64_t key, Vector x) const {
    if (keys - key >= 8)
      _mm256_storeu_ps(scores + key, x);
    else
      _mm256_maskstore_ps(scores + key, lanes(keys - key), x);
  }
};

inline float reduce(Vector x, bool largest) {
  float parts[8];
  _mm256_storeu_ps(parts, x);
  float found = parts[0];
  for (int i = 1; i < 8; ++i) found = largest ? std::max(found, parts[i]) : found + parts[i];
  return found;
}

struct Block {
  float* scores;
  const float* bias;
  const float* padding;
  int64_t shared, heads, rows, keys, ahead;  // ahead: keys hidden from the first row, or negative

  Row row(int64_t index) const {
    const int64_t sequence = index / (heads * rows), query = index % rows;
    const int64_t of_bias = shared ? index % (heads * rows) : index;
    const int64_t seen = ahead < 0 ? keys : std::clamp<int64_t>(keys - ahead + query, 0, keys);
    return {scores + index * keys, bias ? bias + of_bias * keys : nullptr,
            padding ? padding + sequence * keys : nullptr, keys, seen};
  }
};

}  // namespace

extern "C" {

void softmax_forward(float* scores, const float* bias, const float* padding, float* largest,
                     float* sum, int64_t sequences, int64_t heads, int64_t rows, int64_t keys,
                     int64_t shared, int64_t ahead) {
  const Block block{scores, bias, padding, shared, heads, rows, keys, ahead};
#pragma omp parallel for schedule(static)
  for (int64_t index = 0; index < sequences * heads * rows; ++index) {
    const Row row = block.row(index);
    Vector most = all(HIDDEN);
    for (int64_t key = 0; key < keys; key += 8) {
      const Vector x = row.at(key);
      row.store(key, x);
      most = _mm256_max_ps(most, x);
    }
    float top = reduce(most, true);
    if (top == HIDDEN) top = 0.0f;  // -inf - -inf would be NaN
    const Row plain{row.scores, nullptr, nullptr, keys, keys};
    Vector sums[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
    for (int64_t key = 0; key < keys; key += 8) {
      const Vector y = exponential(plain.at(key) - all(top));
      row.store(key, y);
      sums[key / 8 % 4] = sums[key / 8 % 4] + y;
    }
    const float total = reduce((sums[0] + sums[1]) + (sums[2] + sums[3]), false);
    largest[index] = top;
    sum[index] = total == 0.0f ? 1.0f : total;
  }
}

void softmax_backward(float* scores, const float* bias, const float* padding, const float* largest,
                      const float* delta, float* gradient, int64_t sequences, int64_t heads,
                      int64_t rows, int64_t keys, int64_t shared, int64_t ahead) {
  const Block block{scores, bias, padding, shared, heads, rows, keys, ahead};
#pragma omp parallel for schedule(static)
  for (int64_t index = 0; index < sequences * heads * rows; ++index) {
    const Row row = block.row(index);
    const Row other{gradient + index * keys, nullptr, nullptr, keys, keys};
    for (int64_t key = 0; key < keys; key += 8) {
      const Vector y = exponential(row.at(key) - all(largest[index]));
      row.store(key, y);
      other.store(key, (other.at(key) - all(delta[index])) * y);
    }
  }
}
}
