"""What there is for training: on this node, and between the nodes of a job."""
