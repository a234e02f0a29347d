// Sums that threads have made, each a part.
#pragma once

#include <cstdint>

// Sums [width] of parts that lie `stride` apart.
inline void add_parts(const double* sums, int64_t parts, int64_t stride, int64_t width,
                      float* out) {
  for (int64_t c = 0; c < width; ++c) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * stride + c];
    out[c] = static_cast<float>(sum);
  }
}
