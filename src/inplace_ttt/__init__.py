"""Train models with In-Place Test-Time Training on Megatron-core."""
