// Dropout and stochastic depth by counter: the numbers of kernels/triton_tools/philox.py.

#include "passes.h"
#include "vector.h"

namespace {

using Words = __m256i;  // of 8 columns

inline void multiply(Words a, uint32_t by, Words& high, Words& low) {
  const Words factor = _mm256_set1_epi64x(by);
  const Words even = _mm256_mul_epu32(a, factor);
  const Words odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}

// The first word of Philox-4x32-10 as float32 in [0, 1).
inline Vector uniform(uint64_t seed, Words column, uint32_t row, uint32_t plane) {
  Words c0 = column, c1 = _mm256_set1_epi32(row), c2 = _mm256_set1_epi32(plane),
        c3 = _mm256_setzero_si256();
  uint32_t k0 = seed, k1 = seed >> 32;
  for (int round = 0; round < 10; ++round) {
    Words high0, low0, high1, low1;
    multiply(c0, 0xD2511F53, high0, low0);
    multiply(c2, 0xCD9E8D57, high1, low1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(high1, c1), _mm256_set1_epi32(k0));
    c1 = low1;
    c2 = _mm256_xor_si256(_mm256_xor_si256(high0, c3), _mm256_set1_epi32(k1));
    c3 = low0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  // -x - 1 of negative numbers is all bits turned.
  const Words positive = _mm256_xor_si256(c0, _mm256_srai_epi32(c0, 31));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(positive), _mm256_set1_ps(4.6566127342e-10f));
}

template <class T>
void drop(const void* branches, const void* residuals, void* totals, int64_t seed, int64_t batch,
          int64_t length, int64_t width, double dropout, double drop_path) {
  const T *branch = static_cast<const T*>(branches), *residual = static_cast<const T*>(residuals);
  T* out = static_cast<T*>(totals);
  const Vector rate = all(static_cast<float>(dropout));
  const float scale = static_cast<float>(1.0 / ((1.0 - dropout) * (1.0 - drop_path)));
  const Words first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < batch * length; ++row) {
    const float sample = _mm256_cvtss_f32(
        uniform(seed, _mm256_setzero_si256(), static_cast<uint32_t>(row / length), 1));
    const Vector factor = all(sample >= static_cast<float>(drop_path) ? scale : 0.0f);
    eights(width, [=](int64_t start, int64_t count) {
      const Words column = _mm256_add_epi32(first, _mm256_set1_epi32(static_cast<int>(start)));
      const Vector drawn = uniform(seed, column, static_cast<uint32_t>(row), 0);
      const Vector by = _mm256_and_ps(_mm256_cmp_ps(drawn, rate, _CMP_GE_OQ), factor);
      const int64_t place = row * width + start;
      Vector found = by * load(branch + place, count);
      if (residual) found = load(residual + place, count) + found;
      store(out + place, count, found);
    });
  }
}

}  // namespace

extern "C" {

void drop_branch(const void* branch, const void* residual, void* out, int64_t seed, int64_t batch,
                 int64_t length, int64_t width, double dropout, double drop_path, int64_t half) {
  (half ? drop<Bfloat16> : drop<float>)(branch, residual, out, seed, batch, length, width, dropout,
                                        drop_path);
}
}
