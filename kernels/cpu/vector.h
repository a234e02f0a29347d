// Eight float32 at a time, functions of them, and how they lie in memory: as float32 or bfloat16.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

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

// The upper half of a float32.
struct Bfloat16 {
  uint16_t bits;
};

// The first `count` of eight elements; the others read as 0 and are not written.
inline Vector load(const float* from, int64_t count) {
  return count >= 8 ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, lanes(count));
}

inline void store(float* to, int64_t count, Vector x) {
  if (count >= 8)
    _mm256_storeu_ps(to, x);
  else
    _mm256_maskstore_ps(to, lanes(count), x);
}

inline Vector load(const Bfloat16* from, int64_t count) {
  __m128i bits = _mm_setzero_si128();
  std::memcpy(&bits, from, std::min<int64_t>(count, 8) * sizeof(Bfloat16));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Rounds to the nearest, of two as near to the even one.
inline void store(Bfloat16* to, int64_t count, Vector x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i upper = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  // The sum would make numbers of some NaN.
  const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q));
  upper = _mm256_blendv_epi8(_mm256_set1_epi32(0x7FC00000), upper, number);
  upper = _mm256_srli_epi32(upper, 16);
  const __m128i found =
      _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  std::memcpy(to, &found, std::min<int64_t>(count, 8) * sizeof(Bfloat16));
}

// Calls body(place, count) for every eight elements of a row; the last may be fewer.
template <class Body>
inline void eights(int64_t width, Body body) {
  int64_t place = 0;
#pragma GCC unroll 4
  for (; place + 8 <= width; place += 8) body(place, 8);
  if (place < width) body(place, width - place);
}
