"""In-Place Test-Time Training on Megatron-core."""
