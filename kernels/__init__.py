"""Kernels of the unified model: attention with position bias and head scaling, layer norm, loss.

Import this package as `unival.kernels`. It imports neither torch nor triton by itself, because
other libraries may probe a folder of this name in the working directory.
"""
