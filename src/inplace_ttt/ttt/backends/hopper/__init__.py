"""Scan with Gluon kernels for Hopper; ``backends/torch.py`` is the reference implementation."""
