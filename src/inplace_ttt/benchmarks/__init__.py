"""Benchmarks: what fast weights cost, measured side by side in one run."""
