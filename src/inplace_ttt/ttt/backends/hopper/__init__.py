"""Triton kernels for Hopper; each has a twin in plain torch, which runs everywhere and says what it computes."""
