// What Python calls (native.py). Arrays have no gaps; float* is float32, and void* too, or with
// `half` bfloat16. Sizes count elements.
#pragma once

#include <cstdint>

// native.py refuses a build with another number: raise it with every change of a signature.
#define UNIVAL_INTERFACE 2

extern "C" {

int64_t unival_interface();
int64_t unival_threads();

// rows [count, channels]; shortcut may be null
void rows_moments(const void* x, float* mean, float* variance, int64_t count, int64_t channels,
                  int64_t half);
void rows_normalize(const void* x, const float* factor, const float* level, const void* shortcut,
                    void* y, int64_t count, int64_t channels, int64_t relu, int64_t half);
void rows_gradients(const void* x, void* grad, const float* mean, const float* factor,
                    const float* level, const float* shift, float* sum, float* along,
                    int64_t count, int64_t channels, int64_t relu, int64_t half);
void rows_input_gradient(const void* x, const void* grad, const float* factor,
                         const float* slope, const float* offset, void* out, int64_t count,
                         int64_t channels, int64_t half);
void rows_finish(float* y, const float* bias, const float* shortcut, int64_t count,
                 int64_t channels);
void rows_mask(const void* grad, const void* y, void* out, float* sum, int64_t count,
               int64_t channels, int64_t half);

// [batch, length, width]; residual may be null
void drop_branch(const void* branch, const void* residual, void* out, int64_t seed, int64_t batch,
                 int64_t length, int64_t width, double dropout, double drop_path, int64_t half);

// rows [count, width]; mean and scale [count]
void layer_norm_forward(const void* x, const float* weight, const float* bias, void* y,
                        float* mean, float* scale, int64_t count, int64_t width, double eps,
                        int64_t gelu, int64_t half);
void layer_norm_backward(const void* grad, const void* x, const float* weight, const float* mean,
                         const float* scale, void* d_x, float* d_weight, float* d_bias,
                         int64_t count, int64_t width, int64_t gelu, int64_t half);

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
