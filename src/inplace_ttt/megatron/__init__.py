"""Build and train models on Megatron-core: model, step and checkpoints."""

from inplace_ttt import te

te.before_megatron_core()
