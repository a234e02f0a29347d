// What Python calls (native.py). All arrays are float32 without gaps; sizes count elements.
#pragma once

#include <cstdint>

// native.py refuses a build with another number: raise it with every change of a signature.
#define UNIVAL_INTERFACE 1

extern "C" {

int64_t unival_interface();
int64_t unival_threads();

// rows [count, channels]
void rows_moments(const float* x, float* mean, float* variance, int64_t count, int64_t channels);
void rows_normalize(const float* x, const float* factor, const float* level, float* y,
                    int64_t count, int64_t channels, int64_t relu);
void rows_gradients(const float* x, float* grad, const float* mean, const float* factor,
                    const float* level, const float* shift, float* sum, float* along,
                    int64_t count, int64_t channels, int64_t relu);
void rows_input_gradient(const float* x, const float* grad, const float* factor,
                         const float* slope, const float* offset, float* out, int64_t count,
                         int64_t channels);
void rows_finish(float* y, const float* bias, const float* shortcut, int64_t count,
                 int64_t channels);
void rows_mask(const float* grad, const float* y, float* out, float* sum, int64_t count,
               int64_t channels);

// [batch, length, width]; residual may be null
void drop_branch(const float* branch, const float* residual, float* out, int64_t seed,
                 int64_t batch, int64_t length, int64_t width, double dropout, double drop_path);

// rows [count, width]; mean and scale [count]
void layer_norm_forward(const float* x, const float* weight, const float* bias, float* y,
                        float* mean, float* scale, int64_t count, int64_t width, double eps,
                        int64_t gelu);
void layer_norm_backward(const float* grad, const float* x, const float* weight,
                         const float* mean, const float* scale, float* d_x, float* d_weight,
                         float* d_bias, int64_t count, int64_t width, int64_t gelu);

// [sequences, heads, rows, keys]; bias and padding may be null, ahead is negative without a mask
void softmax_forward(float* scores, const float* bias, const float* padding, float* largest,
                     float* sum, int64_t sequences, int64_t heads, int64_t rows, int64_t keys,
                     int64_t shared, int64_t ahead);
void softmax_backward(float* scores, const float* bias, const float* padding, const float* largest,
                      const float* delta, float* gradient, int64_t sequences, int64_t heads,
                      int64_t rows, int64_t keys, int64_t shared, int64_t ahead);

// maps [batch, height, width, channels], channels a multiple of 16; tiles of 4 x 4 places
void winograd_filters(const float* weight, float* out, int64_t rows, int64_t columns,
                      int64_t mirrored);
void winograd_filter_gradients(const float* grad, float* out, int64_t rows, int64_t columns);
void winograd_inputs(const float* x, float* out, int64_t batch, int64_t height, int64_t width,
                     int64_t channels);
void winograd_outputs(const float* products, float* y, int64_t batch, int64_t height,
                      int64_t width, int64_t channels);
void winograd_output_gradients(const float* grad, float* out, int64_t batch, int64_t height,
                               int64_t width, int64_t channels);
}
