// Passes over maps as rows [count, channels]: what norms, ReLUs and shortcuts do between products.
//
// Each reads and writes memory once. Maps are float32 or bfloat16, all else is float32. Sums over
// the rows are of BLOCK rows in float32, and of blocks in float64, so that they are as exact as
// PyTorch's, and do not depend on timing.

#include "passes.h"
#include "sums.h"
#include "vector.h"

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

inline void add(float* sums, int64_t count, Vector x) { store(sums, count, load(sums, count) + x); }

inline Vector relu(Vector x) { return _mm256_max_ps(all(0.0f), x); }  // NaN stays

// A gradient before a ReLU that gave y.
inline Vector kept(Vector gradient, Vector y) {
  return _mm256_andnot_ps(_mm256_cmp_ps(y, all(0.0f), _CMP_LE_OQ), gradient);
}

// T. Chan, G. Golub and R. LeVeque, Algorithms for computing the sample variance, 1983: squares
// are summed around the mean of a block, and blocks are put together exactly.
template <class T>
void moments(const void* maps, float* mean, float* variance, int64_t count, int64_t channels) {
  const T* x = static_cast<const T*>(maps);
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
    float *s = sum.data(), *q = square.data();
    double* found = &means[part * width];
    for (int64_t start = first; start < last; start += BLOCK) {
      const int64_t end = std::min(last, start + BLOCK);
      std::fill(sum.begin(), sum.end(), 0.0f);
      std::fill(square.begin(), square.end(), 0.0f);
      for (int64_t row = start; row < end; ++row) {
        const T* from = x + row * channels;
        eights(channels, [=](int64_t c, int64_t n) { add(s + c, n, load(from + c, n)); });
      }
      const float share = 1.0f / static_cast<float>(end - start);
      for (int64_t c = 0; c < channels; ++c) s[c] *= share;
      for (int64_t row = start; row < end; ++row) {
        const T* from = x + row * channels;
        eights(channels, [=](int64_t c, int64_t n) {
          const Vector apart = load(from + c, n) - load(s + c, n);
          add(q + c, n, apart * apart);
        });
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

template <class T>
void normalize(const void* maps, const float* factor, const float* level, const void* shortcuts,
               void* out, int64_t count, int64_t channels, int64_t is_relu) {
  const T *x = static_cast<const T*>(maps), *shortcut = static_cast<const T*>(shortcuts);
  T* y = static_cast<T*>(out);
  divide(count, channels, [=](int64_t first, int64_t last, int64_t) {
    for (int64_t row = first; row < last; ++row) {
      const T *from = x + row * channels, *more = shortcut ? shortcut + row * channels : nullptr;
      T* to = y + row * channels;
      eights(channels, [=](int64_t c, int64_t n) {
        Vector value = _mm256_fmadd_ps(load(from + c, n), load(factor + c, n), load(level + c, n));
        if (more) value = value + load(more + c, n);
        store(to + c, n, is_relu ? relu(value) : value);
      });
    }
  });
}

template <class T>
void gradients(const void* maps, void* gradient, const float* mean, const float* factor,
               const float* level, const float* shift, float* sum, float* along, int64_t count,
               int64_t channels, int64_t is_relu) {
  const T* x = static_cast<const T*>(maps);
  T* grad = static_cast<T*>(gradient);
  const int64_t width = 2 * channels;
  std::vector<double> sums(omp_get_max_threads() * width);
  const int64_t parts = divide(count, channels, [&](int64_t first, int64_t last, int64_t part) {
    std::vector<float> plain(channels), product(channels);
    float *p = plain.data(), *q = product.data();
    double* found = &sums[part * width];
    for (int64_t start = first; start < last; start += BLOCK) {
      const int64_t end = std::min(last, start + BLOCK);
      std::fill(plain.begin(), plain.end(), 0.0f);
      std::fill(product.begin(), product.end(), 0.0f);
      for (int64_t row = start; row < end; ++row) {
        const T* from = x + row * channels;
        T* upstream = grad + row * channels;
        eights(channels, [=](int64_t c, int64_t n) {
          const Vector value = load(from + c, n);
          Vector dy = load(upstream + c, n);
          if (is_relu) {
            const Vector y = _mm256_fmadd_ps(value, load(factor + c, n), load(level + c, n));
            dy = kept(dy - load(shift + c, n), y);
            store(upstream + c, n, dy);
          }
          add(p + c, n, dy);
          add(q + c, n, dy * (value - load(mean + c, n)));
        });
      }
      for (int64_t c = 0; c < channels; ++c) found[c] += p[c], found[channels + c] += q[c];
    }
  });
  add_parts(&sums[0], parts, width, channels, sum);
  add_parts(&sums[channels], parts, width, channels, along);
}

template <class T>
void input_gradient(const void* maps, const void* gradient, const float* factor,
                    const float* slope, const float* offset, void* out, int64_t count,
                    int64_t channels) {
  const T *x = static_cast<const T*>(maps), *grad = static_cast<const T*>(gradient);
  T* d_x = static_cast<T*>(out);
  divide(count, channels, [=](int64_t first, int64_t last, int64_t) {
    for (int64_t row = first; row < last; ++row) {
      const T *from = x + row * channels, *dy = grad + row * channels;
      T* to = d_x + row * channels;
      eights(channels, [=](int64_t c, int64_t n) {
        const Vector rest = load(offset + c, n) - load(from + c, n) * load(slope + c, n);
        store(to + c, n, load(dy + c, n) * load(factor + c, n) + rest);
      });
    }
  });
}

template <class T>
void mask(const void* gradient, const void* maps, void* out, float* sum, int64_t count,
          int64_t channels) {
  const T *grad = static_cast<const T*>(gradient), *y = static_cast<const T*>(maps);
  T* masked = static_cast<T*>(out);
  std::vector<double> sums(omp_get_max_threads() * channels);
  const int64_t parts = divide(count, channels, [&](int64_t first, int64_t last, int64_t part) {
    std::vector<float> plain(channels);
    float* p = plain.data();
    double* found = &sums[part * channels];
    for (int64_t start = first; start < last; start += BLOCK) {
      const int64_t end = std::min(last, start + BLOCK);
      std::fill(plain.begin(), plain.end(), 0.0f);
      for (int64_t row = start; row < end; ++row) {
        const T *dy = grad + row * channels, *from = y + row * channels;
        T* to = masked + row * channels;
        eights(channels, [=](int64_t c, int64_t n) {
          const Vector value = kept(load(dy + c, n), load(from + c, n));
          store(to + c, n, value);
          add(p + c, n, value);
        });
      }
      for (int64_t c = 0; c < channels; ++c) found[c] += p[c];
    }
  });
  add_parts(&sums[0], parts, channels, channels, sum);
}

}  // namespace

extern "C" {

int64_t unival_interface() { return UNIVAL_INTERFACE; }

int64_t unival_threads() { return omp_get_max_threads(); }

void rows_moments(const void* x, float* mean, float* variance, int64_t count, int64_t channels,
                  int64_t half) {
  (half ? moments<Bfloat16> : moments<float>)(x, mean, variance, count, channels);
}

void rows_normalize(const void* x, const float* factor, const float* level, const void* shortcut,
                    void* y, int64_t count, int64_t channels, int64_t relu, int64_t half) {
  (half ? normalize<Bfloat16> : normalize<float>)(x, factor, level, shortcut, y, count, channels,
                                                  relu);
}

void rows_gradients(const void* x, void* grad, const float* mean, const float* factor,
                    const float* level, const float* shift, float* sum, float* along,
                    int64_t count, int64_t channels, int64_t relu, int64_t half) {
  (half ? gradients<Bfloat16> : gradients<float>)(x, grad, mean, factor, level, shift, sum, along,
                                                  count, channels, relu);
}

void rows_input_gradient(const void* x, const void* grad, const float* factor,
                         const float* slope, const float* offset, void* out, int64_t count,
                         int64_t channels, int64_t half) {
  (half ? input_gradient<Bfloat16> : input_gradient<float>)(x, grad, factor, slope, offset, out,
                                                            count, channels);
}

void rows_finish(float* y, const float* bias, const float* shortcut, int64_t count,
                 int64_t channels) {
  divide(count, channels, [=](int64_t first, int64_t last, int64_t) {
    for (int64_t row = first; row < last; ++row) {
      const float* from = shortcut + row * channels;
      float* to = y + row * channels;
      eights(channels, [=](int64_t c, int64_t n) {
        store(to + c, n, relu(load(to + c, n) + load(bias + c, n) + load(from + c, n)));
      });
    }
  });
}

void rows_mask(const void* grad, const void* y, void* out, float* sum, int64_t count,
               int64_t channels, int64_t half) {
  (half ? mask<Bfloat16> : mask<float>)(grad, y, out, sum, count, channels);
}
}
