// Layer norm of rows [count, width], of x or of GELU(x): a row at a time, which the first-level
// cache holds. Sums over the rows are of BLOCK rows in float32, and of blocks in float64.

#include "passes.h"
#include "vector.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int64_t BLOCK = 32;

// erf(z) = z P(z^2) / Q(z^2), fitted to 2.5e-8 of the value up to |z| = 4, where it is 1.
inline Vector erf(Vector z) {
  z = _mm256_max_ps(all(-4.0f), _mm256_min_ps(all(4.0f), z));  // NaN stays
  const Vector u = z * z;
  Vector p = all(1.9868399458999875e-06f), q = all(3.7420491791534394e-05f);
  for (float next : {0.00028456052970050535f, 0.003883074860584152f, 0.05310091784965948f,
                     0.19353869159168338f, 1.1283791395069247f})
    p = p * u + all(next);
  for (float next : {0.0011855071541618332f, 0.015206711860320864f, 0.11534737923401597f,
                     0.5048517570298756f, 1.0f})
    q = q * u + all(next);
  const Vector y = z * p / q;
  return _mm256_max_ps(all(-1.0f), _mm256_min_ps(all(1.0f), y));
}

inline Vector normal_share(Vector x) { return all(0.5f) * (all(1.0f) + erf(x * all(0.70710678f))); }

// A row in memory whose end is padded: what is beyond it reads as 0.
inline Vector load(const float* row, int64_t place, int64_t width) {
  if (width - place >= 8) return _mm256_loadu_ps(row + place);
  return _mm256_maskload_ps(row + place, lanes(width - place));
}

inline void store(float* row, int64_t place, int64_t width, Vector x) {
  if (width - place >= 8)
    _mm256_storeu_ps(row + place, x);
  else
    _mm256_maskstore_ps(row + place, lanes(width - place), x);
}

}  // namespace

extern "C" {

void layer_norm_forward(const float* x, const float* weight, const float* bias, float* y,
                        float* mean, float* scale, int64_t count, int64_t width, double eps,
                        int64_t gelu) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < count; ++row) {
    const float* from = x + row * width;
    float* to = y + row * width;
    Vector sum = all(0.0f), squares = all(0.0f);
    for (int64_t c = 0; c < width; c += 8) {
      Vector value = load(from, c, width);
      if (gelu) value = value * normal_share(value);
      store(to, c, width, value);
      sum = sum + value;
    }
    const float middle = total(sum) / static_cast<float>(width);
    Vector rest = all(0.0f);
    for (int64_t c = 0; c < width; c += 8) {
      Vector apart = load(to, c, width) - all(middle);
      if (width - c < 8) apart = _mm256_and_ps(apart, _mm256_castsi256_ps(lanes(width - c)));
      rest = rest + apart;
      squares = squares + apart * apart;
    }
    // What rounding left out of a mean far from 0.
    const float missing = total(rest) / static_cast<float>(width);
    const float variance = total(squares) / static_cast<float>(width) - missing * missing;
    const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(variance) + eps));
    for (int64_t c = 0; c < width; c += 8) {
      const Vector normed = (load(to, c, width) - all(middle) - all(missing)) * all(factor);
      store(to, c, width, normed * load(weight, c, width) + load(bias, c, width));
    }
    mean[row] = middle + missing;
    scale[row] = factor;
  }
}

void layer_norm_backward(const float* grad, const float* x, const float* weight,
                         const float* mean, const float* scale, float* d_x, float* d_weight,
                         float* d_bias, int64_t count, int64_t width, int64_t gelu) {
  const int64_t padded = (width + 7) / 8 * 8;
  std::vector<double> sums(omp_get_max_threads() * 2 * padded);
  int64_t parts = 1;
#pragma omp parallel
  {
#pragma omp single
    parts = omp_get_num_threads();
    const int64_t part = omp_get_thread_num();
    double* found = &sums[part * 2 * padded];
    std::vector<float> normed(padded), slope(padded), of_weight(padded), of_bias(padded);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (count + BLOCK - 1) / BLOCK; ++block) {
      std::fill(of_weight.begin(), of_weight.end(), 0.0f);
      std::fill(of_bias.begin(), of_bias.end(), 0.0f);
      for (int64_t row = block * BLOCK; row < std::min(count, (block + 1) * BLOCK); ++row) {
        const float *from = x + row * width, *dy = grad + row * width;
        Vector sum = all(0.0f), along = all(0.0f);
        for (int64_t c = 0; c < width; c += 8) {
          Vector value = load(from, c, width);
          if (gelu) {
            const Vector share = normal_share(value);
            const Vector density = exponential(value * value * all(-0.5f)) * all(0.39894228f);
            _mm256_storeu_ps(&slope[c], share + value * density);
            value = value * share;
          }
          value = (value - all(mean[row])) * all(scale[row]);
          _mm256_storeu_ps(&normed[c], value);
          const Vector given = load(dy, c, width), scaled = given * load(weight, c, width);
          sum = sum + scaled;
          along = along + scaled * value;
          _mm256_storeu_ps(&of_bias[c], _mm256_loadu_ps(&of_bias[c]) + given);
          _mm256_storeu_ps(&of_weight[c], _mm256_loadu_ps(&of_weight[c]) + given * value);
        }
        const Vector level = all(total(sum) / static_cast<float>(width));
        const Vector tilt = all(total(along) / static_cast<float>(width));
        for (int64_t c = 0; c < width; c += 8) {
          const Vector scaled = load(dy, c, width) * load(weight, c, width);
          Vector out = (scaled - level - _mm256_loadu_ps(&normed[c]) * tilt) * all(scale[row]);
          if (gelu) out = out * _mm256_loadu_ps(&slope[c]);
          store(d_x + row * width, c, width, out);
        }
      }
      for (int64_t c = 0; c < width; ++c) {
        found[c] += of_weight[c];
        found[padded + c] += of_bias[c];
      }
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    double of_weight = 0, of_bias = 0;
    for (int64_t part = 0; part < parts; ++part) {
      of_weight += sums[part * 2 * padded + c];
      of_bias += sums[part * 2 * padded + padded + c];
    }
    d_weight[c] = static_cast<float>(of_weight);
    d_bias[c] = static_cast<float>(of_bias);
  }
}
}
