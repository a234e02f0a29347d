// Passes over maps as rows [count, channels]: what norms, ReLUs and shortcuts do between products.
//
// Each reads and writes memory once. Sums over the rows are of BLOCK rows in float32, and of blocks
// in float64, so that they are as exact as PyTorch's, and do not depend on timing.

#include "passes.h"

#include <omp.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t BLOCK = 32;         // rows; with 256 channels they stay in the first-level cache
constexpr int64_t SMALLEST = 1 << 14;  // elements that are worth a second thread

// Calls body(first, last, part) for a thread's rows, part = 0 ... parts - 1; returns parts.
template <class Body>
int64_t divide(int64_t count, int64_t channels, Body body) {
  int64_t parts = 1;
#pragma omp parallel if (count * channels >= SMALLEST)
  {
#pragma omp single
    parts = omp_get_num_threads();
    const int64_t part = omp_get_thread_num();
    const int64_t share = ((count + BLOCK - 1) / BLOCK + parts - 1) / parts * BLOCK;
    body(std::min(count, part * share), std::min(count, (part + 1) * share), part);
  }
  return parts;
}

// Sums [channels] of parts that lie `stride` apart.
void add_parts(const double* sums, int64_t parts, int64_t stride, int64_t channels, float* out) {
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * stride + c];
    out[c] = static_cast<float>(sum);
  }
}

}  // namespace

extern "C" {

int64_t unival_interface() { return UNIVAL_INTERFACE; }

int64_t unival_threads() { return omp_get_max_threads(); }

// T. Chan, G. Golub and R. LeVeque, Algorithms for computing the sample variance, 1983: squares
// are summed around the mean of a block, and blocks are put together exactly.
void rows_moments(const float* x, float* mean, float* variance, int64_t count, int64_t channels) {
  const int64_t width = 2 * channels;
  std::vector<double> means(omp_get_max_threads() * width), counts(omp_get_max_threads());
  auto merge = [=](double* into, double have, const double* other, double more) {
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = other[c] - into[c], share = more / (have + more);
      into[c] += delta * share;
      into[channels + c] += other[channels + c] + delta * delta * have * share;
    }
  };
  const int64_t parts = divide(count, channels, [&](int64_t first, int64_t last, int64_t part) {
    std::vector<float> sum(channels), square(channels);
    std::vector<double> block(width);
    double* found = &means[part * width];
    for (int64_t start = first; start < last; start += BLOCK) {
      const int64_t end = std::min(last, start + BLOCK);
      std::fill(sum.begin(), sum.end(), 0.0f);
      std::fill(square.begin(), square.end(), 0.0f);
      float* __restrict s = sum.data();
      float* __restrict q = square.data();
      for (int64_t row = start; row < end; ++row) {
        const float* __restrict from = x + row * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) s[c] += from[c];
      }
      const float share = 1.0f / static_cast<float>(end - start);
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) s[c] *= share;
      for (int64_t row = start; row < end; ++row) {
        const float* __restrict from = x + row * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const float apart = from[c] - s[c];
          q[c] += apart * apart;
        }
      }
      for (int64_t c = 0; c < channels; ++c) block[c] = s[c], block[channels + c] = q[c];
      merge(found, counts[part], block.data(), static_cast<double>(end - start));
      counts[part] += static_cast<double>(end - start);
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    if (counts[part] == 0) continue;
    merge(&means[0], counts[0], &means[part * width], counts[part]);
    counts[0] += counts[part];
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<float>(means[c]);
    variance[c] = static_cast<float>(means[channels + c] / static_cast<double>(count));
  }
}

void rows_normalize(const float* x, const float* factor, const float* level, float* y,
                    int64_t count, int64_t channels, int64_t relu) {
  divide(count, channels, [=](int64_t first, int64_t last, int64_t) {
    const float* __restrict f = factor;
    const float* __restrict l = level;
    for (int64_t row = first; row < last; ++row) {
      const float* __restrict from = x + row * channels;
      float* __restrict to = y + row * channels;
      if (relu) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const float value = __builtin_fmaf(from[c], f[c], l[c]);
          to[c] = value < 0.0f ? 0.0f : value;  // NaN stays
        }
      } else {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) to[c] = __builtin_fmaf(from[c], f[c], l[c]);
      }
    }
  });
}

void rows_gradients(const float* x, float* grad, const float* mean, const float* factor,
                    const float* level, const float* shift, float* sum, float* along,
                    int64_t count, int64_t channels, int64_t relu) {
  const int64_t width = 2 * channels;
  std::vector<double> sums(omp_get_max_threads() * width);
  const int64_t parts = divide(count, channels, [&](int64_t first, int64_t last, int64_t part) {
    std::vector<float> plain(channels), product(channels);
    float* __restrict p = plain.data();
    float* __restrict q = product.data();
    const float* __restrict m = mean;
    const float* __restrict f = factor;
    const float* __restrict l = level;
    const float* __restrict less = shift;
    double* __restrict found = &sums[part * width];
    for (int64_t start = first; start < last; start += BLOCK) {
      const int64_t end = std::min(last, start + BLOCK);
      std::fill(plain.begin(), plain.end(), 0.0f);
      std::fill(product.begin(), product.end(), 0.0f);
      for (int64_t row = start; row < end; ++row) {
        const float* __restrict from = x + row * channels;
        float* __restrict dy = grad + row * channels;
        if (relu) {
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) {
            const float value = __builtin_fmaf(from[c], f[c], l[c]);
            const float given = dy[c] - less[c];
            const float kept = value <= 0.0f ? 0.0f : given;
            dy[c] = kept;
            p[c] += kept;
            q[c] += kept * (from[c] - m[c]);
          }
        } else {
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) {
            p[c] += dy[c];
            q[c] += dy[c] * (from[c] - m[c]);
          }
        }
      }
      for (int64_t c = 0; c < channels; ++c) found[c] += p[c], found[channels + c] += q[c];
    }
  });
  add_parts(&sums[0], parts, width, channels, sum);
  add_parts(&sums[channels], parts, width, channels, along);
}

void rows_input_gradient(const float* x, const float* grad, const float* factor,
                         const float* slope, const float* offset, float* out, int64_t count,
                         int64_t channels) {
  divide(count, channels, [=](int64_t first, int64_t last, int64_t) {
    const float* __restrict f = factor;
    const float* __restrict s = slope;
    const float* __restrict o = offset;
    for (int64_t row = first; row < last; ++row) {
      const float* from = x + row * channels;
      const float* dy = grad + row * channels;
      float* to = out + row * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) to[c] = dy[c] * f[c] + (o[c] - from[c] * s[c]);
    }
  });
}

void rows_finish(float* y, const float* bias, const float* shortcut, int64_t count,
                 int64_t channels) {
  divide(count, channels, [=](int64_t first, int64_t last, int64_t) {
    const float* __restrict b = bias;
    for (int64_t row = first; row < last; ++row) {
      const float* __restrict from = shortcut + row * channels;
      float* __restrict to = y + row * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const float value = to[c] + b[c] + from[c];
        to[c] = value < 0.0f ? 0.0f : value;
      }
    }
  });
}

void rows_mask(const float* grad, const float* y, float* out, float* sum, int64_t count,
               int64_t channels) {
  std::vector<double> sums(omp_get_max_threads() * channels);
  const int64_t parts = divide(count, channels, [&](int64_t first, int64_t last, int64_t part) {
    std::vector<float> plain(channels);
    float* __restrict p = plain.data();
    double* __restrict found = &sums[part * channels];
    for (int64_t start = first; start < last; start += BLOCK) {
      const int64_t end = std::min(last, start + BLOCK);
      std::fill(plain.begin(), plain.end(), 0.0f);
      for (int64_t row = start; row < end; ++row) {
        const float* __restrict dy = grad + row * channels;
        const float* __restrict from = y + row * channels;
        float* __restrict to = out + row * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const float kept = from[c] <= 0.0f ? 0.0f : dy[c];
          to[c] = kept;
          p[c] += kept;
        }
      }
      for (int64_t c = 0; c < channels; ++c) found[c] += p[c];
    }
  });
  add_parts(&sums[0], parts, channels, channels, sum);
}
}
