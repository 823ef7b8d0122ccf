"""Preflight checks of one node, and across the nodes of a job."""
