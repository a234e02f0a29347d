"""What all kernels share: launches, products, random numbers, ahead-of-time compilation."""
