"""Windowed self-attention's backward on Hopper, which softmax attention and GDPA share."""
