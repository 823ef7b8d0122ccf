"""Choose the activations of each layer that the backward computes again."""

from dataclasses import dataclass, replace
from typing import Any

from inplace_ttt.config.schema import Train

# Modules whose matrix products run again, in train.recompute_num_layers layers: each includes what follows from it
PRODUCTS = {"mlp": "mlp_act", "qkv": "rope"}
ATTENTION_MODULES = {"rope", "qkv", "core_attn"}  # of softmax attention


@dataclass(frozen=True)
class RecomputedModules:
    """Name the recomputed modules of the layers of a pipeline stage."""

    modules: frozenset[str] = frozenset()  # of train.recompute_modules
    product_layers: int | None = None  # number of layers that recompute matrix products; None: all

    def of_layer(self, number: int) -> frozenset[str]:
        """Return the recomputed modules of a layer, given its index in its pipeline stage, from 0."""
        if self.product_layers is not None and number >= self.product_layers:
            return self.modules - set(PRODUCTS)
        return self.modules | {PRODUCTS[name] for name in self.modules if name in PRODUCTS}


def with_recompute(train: Train, recompute: str, **settings: Any) -> Train:
    """Return a copy with this train.recompute, and the other keys of recompute as given, or at their defaults."""
    default = {key: value for key, value in vars(Train()).items() if key.startswith("recompute_")}
    return replace(train, **{**default, "recompute": recompute, **settings})


def recomputed_modules(train: Train) -> RecomputedModules:
    """Return the modules to recompute; none unless train.recompute=selective."""
    if train.recompute != "selective":
        return RecomputedModules()
    return RecomputedModules(frozenset(train.recompute_modules), train.recompute_num_layers)
