"""LayerNorm alone, after an exact GELU, and after a residual sum with dropout and drop path."""
