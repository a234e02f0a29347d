// Attention's scores to their exponentials, and their gradient: one pass over a block each.
//
// Scores are [sequences, heads, rows, keys]. Added to them: a bias of the same shape, or of one
// sequence for all, and the padding [sequences, keys], 0 or -inf; keys ahead of a query are hidden.

#include "passes.h"
#include "vector.h"

#include <algorithm>
#include <limits>

namespace {

constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

// A row of scores, and what is added to it.
struct Row {
  float* scores;
  const float* bias;
  const float* padding;
  int64_t keys, seen;  // the first `seen` keys are not ahead

  // Scores of 8 keys; those ahead and those behind the row are hidden.
  Vector at(int64_t key) const {
    const int64_t count = seen - key;
    Vector x = load(scores + key, count);
    if (bias) x = x + load(bias + key, count);
    if (padding) x = x + load(padding + key, count);
    if (count >= 8) return x;
    return _mm256_blendv_ps(all(HIDDEN), x, _mm256_castsi256_ps(lanes(count)));
  }

  void set(int64_t key, Vector x) const { store(scores + key, keys - key, x); }
};

inline float greatest(Vector x) {
  float parts[8];
  _mm256_storeu_ps(parts, x);
  return *std::max_element(parts, parts + 8);
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
      row.set(key, x);
      most = _mm256_max_ps(most, x);
    }
    float top = greatest(most);
    if (top == HIDDEN) top = 0.0f;  // -inf - -inf would be NaN
    const Row plain{row.scores, nullptr, nullptr, keys, keys};
    Vector sums[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
    for (int64_t key = 0; key < keys; key += 8) {
      const Vector y = exponential(plain.at(key) - all(top));
      row.set(key, y);
      sums[key / 8 % 4] = sums[key / 8 % 4] + y;
    }
    const float summed = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
    largest[index] = top;
    sum[index] = summed == 0.0f ? 1.0f : summed;
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
      row.set(key, y);
      other.set(key, (other.at(key) - all(delta[index])) * y);
    }
  }
}
}
