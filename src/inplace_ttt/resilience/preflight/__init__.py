"""Check one node, and the nodes of a job together, before training."""
