// Transforms of Winograd's F(4x4, 3x3): see kernels/convolution/winograd.py for the matrices.
//
// A tile at a time, 16 channels (a cache line) at a time: what is read is read once, and all 36
// results of a line are written together, since their planes lie a power of two apart.

#include "passes.h"
#include "vector.h"

#include <algorithm>

namespace {

constexpr int64_t LINE = 16;
constexpr float A = 0.625f, B = 1.5f;
constexpr float A2 = A * A, B2 = B * B, A3 = A2 * A, B3 = B2 * B;
constexpr float G_0 = 1 / (A2 * B2), G_A = 1 / (2 * A2 * (A2 - B2)), G_B = 1 / (2 * B2 * (B2 - A2));

// B^T x
inline void inputs(const Vector x[6], Vector y[6]) {
  y[0] = A2 * B2 * x[0] - (A2 + B2) * x[2] + x[4];
  Vector even = x[4] - B2 * x[2], odd = A * (x[3] - B2 * x[1]);
  y[1] = even + odd;
  y[2] = even - odd;
  even = x[4] - A2 * x[2], odd = B * (x[3] - A2 * x[1]);
  y[3] = even + odd;
  y[4] = even - odd;
  y[5] = A2 * B2 * x[1] - (A2 + B2) * x[3] + x[5];
}

// A^T x
inline void outputs(const Vector x[6], Vector y[4]) {
  const Vector a = x[1] + x[2], less_a = x[1] - x[2], b = x[3] + x[4], less_b = x[3] - x[4];
  y[0] = x[0] + a + b;
  y[1] = A * less_a + B * less_b;
  y[2] = A2 * a + B2 * b;
  y[3] = A3 * less_a + B3 * less_b + x[5];
}

// A x
inline void output_gradients(const Vector x[4], Vector y[6]) {
  y[0] = x[0];
  Vector even = x[0] + A2 * x[2], odd = A * x[1] + A3 * x[3];
  y[1] = even + odd;
  y[2] = even - odd;
  even = x[0] + B2 * x[2], odd = B * x[1] + B3 * x[3];
  y[3] = even + odd;
  y[4] = even - odd;
  y[5] = x[3];
}

// G x
inline void filters(const Vector x[3], Vector y[6]) {
  y[0] = G_0 * x[0];
  Vector even = G_A * (x[0] + A2 * x[2]), odd = G_A * A * x[1];
  y[1] = even + odd;
  y[2] = even - odd;
  even = G_B * (x[0] + B2 * x[2]), odd = G_B * B * x[1];
  y[3] = even + odd;
  y[4] = even - odd;
  y[5] = x[2];
}

// G^T x
inline void filter_gradients(const Vector x[6], Vector y[3]) {
  const Vector a = G_A * (x[1] + x[2]), b = G_B * (x[3] + x[4]);
  y[0] = G_0 * x[0] + a + b;
  y[1] = G_A * A * (x[1] - x[2]) + G_B * B * (x[3] - x[4]);
  y[2] = A2 * a + B2 * b + x[5];
}

// M X M^T of a matrix of FROM x FROM vectors, M the matrix that TRANSFORM multiplies by.
template <void (*TRANSFORM)(const Vector*, Vector*), int FROM, int TO>
inline void both_axes(const Vector x[FROM][FROM], Vector y[TO][TO]) {
  Vector half[TO][FROM];
  for (int j = 0; j < FROM; ++j) {
    Vector in[FROM], out[TO];
    for (int i = 0; i < FROM; ++i) in[i] = x[i][j];
    TRANSFORM(in, out);
    for (int i = 0; i < TO; ++i) half[i][j] = out[i];
  }
  for (int i = 0; i < TO; ++i) TRANSFORM(half[i], y[i]);
}

struct Tiles {
  int64_t batch, height, width, channels;
  int64_t rows = (height + 3) / 4, columns = (width + 3) / 4, count = batch * rows * columns;

  // Where the first channel of a place lies; -1 outside of the maps.
  int64_t at(int64_t tile, int64_t row, int64_t column) const {
    row += tile / columns % rows * 4;
    column += tile % columns * 4;
    if (row < 0 || row >= height || column < 0 || column >= width) return -1;
    return ((tile / (rows * columns) * height + row) * width + column) * channels;
  }
};

// What a line of 36 planes holds, 8 channels at a time, is written as a whole.
inline void write(const Vector lines[2][6][6], float* to, int64_t plane) {
  for (int i = 0; i < 6; ++i)
    for (int j = 0; j < 6; ++j, to += plane) {
      _mm256_storeu_ps(to, lines[0][i][j]);
      _mm256_storeu_ps(to + 8, lines[1][i][j]);
    }
}

inline void read(const float* from, int64_t plane, Vector lines[2][6][6]) {
  for (int i = 0; i < 6; ++i)
    for (int j = 0; j < 6; ++j, from += plane) {
      lines[0][i][j] = _mm256_loadu_ps(from);
      lines[1][i][j] = _mm256_loadu_ps(from + 8);
    }
}

// Transforms a window of SIZE x SIZE places of each tile, `before` of them above and to the left.
template <void (*TRANSFORM)(const Vector*, Vector*), int SIZE>
void spread(const float* x, float* out, Tiles tiles, int64_t before) {
#pragma omp parallel for schedule(static)
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    int64_t places[SIZE][SIZE];
    for (int i = 0; i < SIZE; ++i)
      for (int j = 0; j < SIZE; ++j) places[i][j] = tiles.at(tile, i - before, j - before);
    for (int64_t c = 0; c < tiles.channels; c += LINE) {
      Vector lines[2][6][6];
      for (int half = 0; half < 2; ++half) {
        Vector window[SIZE][SIZE];
        for (int i = 0; i < SIZE; ++i)
          for (int j = 0; j < SIZE; ++j)
            window[i][j] = places[i][j] < 0 ? _mm256_setzero_ps()
                                            : _mm256_loadu_ps(x + places[i][j] + c + 8 * half);
        both_axes<TRANSFORM, SIZE, 6>(window, lines[half]);
      }
      write(lines, out + tile * tiles.channels + c, tiles.count * tiles.channels);
    }
  }
}

}  // namespace

extern "C" {

void winograd_inputs(const float* x, float* out, int64_t batch, int64_t height, int64_t width,
                     int64_t channels) {
  spread<inputs, 6>(x, out, Tiles{batch, height, width, channels}, 1);
}

void winograd_output_gradients(const float* grad, float* out, int64_t batch, int64_t height,
                               int64_t width, int64_t channels) {
  spread<output_gradients, 4>(grad, out, Tiles{batch, height, width, channels}, 0);
}

void winograd_outputs(const float* products, float* y, int64_t batch, int64_t height,
                      int64_t width, int64_t channels) {
  const Tiles tiles{batch, height, width, channels};
#pragma omp parallel for schedule(static)
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    for (int64_t c = 0; c < channels; c += LINE) {
      Vector lines[2][6][6], found[2][4][4];
      read(products + tile * channels + c, tiles.count * channels, lines);
      for (int half = 0; half < 2; ++half) both_axes<outputs, 6, 4>(lines[half], found[half]);
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
          const int64_t place = tiles.at(tile, i, j);
          if (place < 0) continue;  // the last tiles hang over
          _mm256_storeu_ps(y + place + c, found[0][i][j]);
          _mm256_storeu_ps(y + place + c + 8, found[1][i][j]);
        }
    }
  }
}

void winograd_filters(const float* weight, float* out, int64_t rows, int64_t columns,
                      int64_t mirrored) {
  const int64_t plane = rows * columns;
#pragma omp parallel for schedule(static)
  for (int64_t start = 0; start < plane; start += LINE) {
    alignas(32) float kernels[9][LINE];
    for (int64_t c = 0; c < LINE; ++c)
      for (int place = 0; place < 9; ++place)
        kernels[mirrored ? 8 - place : place][c] = weight[(start + c) * 9 + place];
    Vector lines[2][6][6];
    for (int half = 0; half < 2; ++half) {
      Vector kernel[3][3];
      for (int place = 0; place < 9; ++place)
        kernel[place / 3][place % 3] = _mm256_load_ps(&kernels[place][8 * half]);
      both_axes<filters, 3, 6>(kernel, lines[half]);
    }
    write(lines, out + start, plane);
  }
}

void winograd_filter_gradients(const float* grad, float* out, int64_t rows, int64_t columns) {
  const int64_t plane = rows * columns;
#pragma omp parallel for schedule(static)
  for (int64_t start = 0; start < plane; start += LINE) {
    alignas(32) float kernels[9][LINE];
    Vector lines[2][6][6];
    read(grad + start, plane, lines);
    for (int half = 0; half < 2; ++half) {
      Vector kernel[3][3];
      both_axes<filter_gradients, 6, 3>(lines[half], kernel);
      for (int place = 0; place < 9; ++place)
        _mm256_store_ps(&kernels[place][8 * half], kernel[place / 3][place % 3]);
    }
    for (int64_t c = 0; c < LINE; ++c)
      for (int place = 0; place < 9; ++place) out[(start + c) * 9 + place] = kernels[place][c];
  }
}
}
