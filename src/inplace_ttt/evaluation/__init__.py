"""Evaluate models: loss by position, and long-context benchmarks."""
