"""Count the parameters of a model, by building two of its layers on the meta device."""

import copy
from collections import Counter
from dataclasses import dataclass, replace

import torch

from inplace_ttt.config import TTT, Config, Model, linear_attention_sizes


@dataclass(frozen=True)
class LayerParameters:
    """Count the parameters of one layer."""

    split: int  # parameters sharded over tensor-parallel ranks: attention and MLP
    whole: int  # parameters replicated on every tensor-parallel rank: norms
    fast: int  # parameters that only TTT layers have; replicated on every tensor-parallel rank


_known: dict[str, LayerParameters] = {}


def layer_parameters(model: Model, ttt: TTT) -> LayerParameters:
    """Count the parameters of one layer of a model family, and those that fast weights add."""
    # settings that do not change the counts are removed, so that few models are built
    sizes = replace(copy.deepcopy(model), num_layers=2, vocab_size=8, sliding_window=None, window_attn_skip_freq=None)
    key = repr((sizes, ttt.conv_kernel, ttt.project))
    if key not in _known:
        _known[key] = _count(sizes, replace(ttt, enabled=True, layers=[0]))
    return _known[key]


def _count(model: Model, ttt: TTT) -> LayerParameters:
    """Count the parameters of the second layer, and the fast-weight parameters of the first layer."""
    from inplace_ttt.hf import modeling_inplace_ttt as exported
    from inplace_ttt.hf.config import write_config

    linear, model = linear_attention_sizes(model), replace(model, attention="softmax")
    config = Config(model=model, ttt=ttt)
    config.data.seq_length = ttt.chunk_size
    keys = write_config(config, "float32", base=None)
    kind = getattr(exported, keys["architectures"][0])
    with torch.device("meta"):
        network = kind(kind.config_class.from_dict(keys))
    found: Counter[str] = Counter()
    for name, parameter in network.model.layers.named_parameters():
        if linear is not None and ".self_attn." in name:
            continue
        layer = name.split(".")[0]
        part = "fast" if ".ttt_" in name else "whole" if "norm" in name else "split"
        found[part if layer == "1" or part == "fast" else "other layer"] += parameter.numel()
    if linear is not None:
        found["split"] += linear.parameters(model.hidden_size)
    return LayerParameters(found["split"], found["whole"], found["fast"])
