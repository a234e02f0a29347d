// Eight float32 at a time, and functions of them.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

using Vector = __m256;

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

// All bits set in the first `count` of 8.
inline __m256i lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::min<int64_t>(count, 8))),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline float total(Vector x) {
  float parts[8];
  _mm256_storeu_ps(parts, x);
  float found = parts[0];
  for (int i = 1; i < 8; ++i) found += parts[i];
  return found;
}
