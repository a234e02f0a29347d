// Layer norm of rows [count, width], of x or of GELU(x): a row at a time, which the first-level
// cache holds. Sums over the rows are of BLOCK rows in float32, and of blocks in float64. x, y and
// their gradients are float32 or bfloat16, all else is float32.

#include "passes.h"
#include "sums.h"
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

template <class T>
void forward(const void* maps, const float* weight, const float* bias, void* out, float* mean,
             float* scale, int64_t count, int64_t width, double eps, int64_t gelu) {
  const T* x = static_cast<const T*>(maps);
  T* y = static_cast<T*>(out);
#pragma omp parallel
  {
    std::vector<float> line(width);
    float* values = line.data();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < count; ++row) {
      const T* from = x + row * width;
      T* to = y + row * width;
      Vector sum = all(0.0f), squares = all(0.0f), rest = all(0.0f);
      eights(width, [&](int64_t c, int64_t n) {
        Vector value = load(from + c, n);
        if (gelu) value = value * normal_share(value);
        store(values + c, n, value);
        sum = sum + value;
      });
      const float middle = total(sum) / static_cast<float>(width);
      eights(width, [&](int64_t c, int64_t n) {
        Vector apart = load(values + c, n) - all(middle);
        if (n < 8) apart = _mm256_and_ps(apart, _mm256_castsi256_ps(lanes(n)));
        rest = rest + apart;
        squares = squares + apart * apart;
      });
      // What rounding left out of a mean far from 0.
      const float missing = total(rest) / static_cast<float>(width);
      const float variance = total(squares) / static_cast<float>(width) - missing * missing;
      const float factor =
          static_cast<float>(1.0 / std::sqrt(static_cast<double>(variance) + eps));
      eights(width, [&](int64_t c, int64_t n) {
        const Vector normed = (load(values + c, n) - all(middle) - all(missing)) * all(factor);
        store(to + c, n, normed * load(weight + c, n) + load(bias + c, n));
      });
      mean[row] = middle + missing;
      scale[row] = factor;
    }
  }
}

template <class T>
void backward(const void* gradient, const void* maps, const float* weight, const float* mean,
              const float* scale, void* out, float* d_weight, float* d_bias, int64_t count,
              int64_t width, int64_t gelu) {
  const T *grad = static_cast<const T*>(gradient), *x = static_cast<const T*>(maps);
  T* d_x = static_cast<T*>(out);
  std::vector<double> sums(omp_get_max_threads() * 2 * width);
  int64_t parts = 1;
#pragma omp parallel
  {
#pragma omp single
    parts = omp_get_num_threads();
    double* found = &sums[omp_get_thread_num() * 2 * width];
    std::vector<float> scratch(4 * width);
    float *normed = scratch.data(), *slope = normed + width;
    float *of_weight = slope + width, *of_bias = of_weight + width;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (count + BLOCK - 1) / BLOCK; ++block) {
      std::fill(of_weight, of_weight + 2 * width, 0.0f);
      for (int64_t row = block * BLOCK; row < std::min(count, (block + 1) * BLOCK); ++row) {
        const T *from = x + row * width, *dy = grad + row * width;
        T* to = d_x + row * width;
        Vector sum = all(0.0f), along = all(0.0f);
        eights(width, [&](int64_t c, int64_t n) {
          Vector value = load(from + c, n);
          if (gelu) {
            const Vector share = normal_share(value);
            const Vector density = exponential(value * value * all(-0.5f)) * all(0.39894228f);
            store(slope + c, n, share + value * density);
            value = value * share;
          }
          value = (value - all(mean[row])) * all(scale[row]);
          store(normed + c, n, value);
          const Vector given = load(dy + c, n), scaled = given * load(weight + c, n);
          sum = sum + scaled;
          along = along + scaled * value;
          store(of_bias + c, n, load(of_bias + c, n) + given);
          store(of_weight + c, n, load(of_weight + c, n) + given * value);
        });
        const Vector level = all(total(sum) / static_cast<float>(width));
        const Vector tilt = all(total(along) / static_cast<float>(width));
        eights(width, [&](int64_t c, int64_t n) {
          const Vector scaled = load(dy + c, n) * load(weight + c, n);
          Vector d_value = (scaled - level - load(normed + c, n) * tilt) * all(scale[row]);
          if (gelu) d_value = d_value * load(slope + c, n);
          store(to + c, n, d_value);
        });
      }
      for (int64_t c = 0; c < width; ++c) {
        found[c] += of_weight[c];
        found[width + c] += of_bias[c];
      }
    }
  }
  add_parts(&sums[0], parts, 2 * width, width, d_weight);
  add_parts(&sums[width], parts, 2 * width, width, d_bias);
}

}  // namespace

extern "C" {

void layer_norm_forward(const void* x, const float* weight, const float* bias, void* y,
                        float* mean, float* scale, int64_t count, int64_t width, double eps,
                        int64_t gelu, int64_t half) {
  (half ? forward<Bfloat16> : forward<float>)(x, weight, bias, y, mean, scale, count, width, eps,
                                              gelu);
}

void layer_norm_backward(const void* grad, const void* x, const float* weight, const float* mean,
                         const float* scale, void* d_x, float* d_weight, float* d_bias,
                         int64_t count, int64_t width, int64_t gelu, int64_t half) {
  (half ? backward<Bfloat16> : backward<float>)(grad, x, weight, mean, scale, d_x, d_weight,
                                                d_bias, count, width, gelu);
}
}
