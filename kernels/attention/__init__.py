"""Softmax attention over jagged sequences: the Triton kernels that window_attention and seed_attention share."""
