"""Triton kernels for Hopper; the reference implementation in plain torch runs everywhere and says what they compute."""
