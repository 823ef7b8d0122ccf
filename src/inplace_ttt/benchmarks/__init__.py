"""Measure the cost of fast weights; all variants run in turns in one process."""
