"""Define the configuration of a run: keys (schema.py), ranges (ranges.py), and errors that a user can act on."""

from inplace_ttt.config.errors import UserError, first_line, one_line
from inplace_ttt.config.merge import config_from_values
from inplace_ttt.config.ranges import check_key, check_ranges
from inplace_ttt.config.schema import (
    TARGETS,
    TTT,
    VOCAB_MULTIPLE,
    Checkpoint,
    Config,
    Data,
    Key,
    Log,
    Model,
    OnResume,
    Optim,
    Parallel,
    RopeScaling,
    Run,
    Source,
    Train,
    padded_vocab_size,
    schema_keys,
    ttt_layers,
)

__all__ = [
    "TARGETS",
    "TTT",
    "VOCAB_MULTIPLE",
    "Checkpoint",
    "Config",
    "Data",
    "Key",
    "Log",
    "Model",
    "OnResume",
    "Optim",
    "Parallel",
    "RopeScaling",
    "Run",
    "Source",
    "Train",
    "UserError",
    "check_key",
    "check_ranges",
    "config_from_values",
    "first_line",
    "one_line",
    "padded_vocab_size",
    "schema_keys",
    "ttt_layers",
]
