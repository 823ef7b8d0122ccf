"""Evaluation: loss by position, and long-context benchmarks."""
