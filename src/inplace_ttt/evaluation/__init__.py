"""Evaluation: loss by position, and the benchmarks of long contexts."""
