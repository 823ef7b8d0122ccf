"""Preflight checks: of this node, and between the nodes of a job."""
