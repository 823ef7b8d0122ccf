"""Name the columns of the tables of an evaluation: each model in each fast-weight mode."""

from dataclasses import dataclass
from pathlib import Path

from inplace_ttt.config import UserError
from inplace_ttt.evaluation.mode import FastWeightMode
from inplace_ttt.evaluation.models import ModelSource
from inplace_ttt.evaluation.results import Column, label_columns


@dataclass(frozen=True)
class EvaluatedModel:
    """Hold a model, one fast-weight mode, and its column in the results."""

    model: ModelSource
    mode: FastWeightMode
    column: Column


def columns_of(models: list[Path], modes: list[FastWeightMode], numerics: list[str]) -> list[EvaluatedModel]:
    """Return the columns to evaluate, model by model.

    Args:
        numerics: settings of the command line that change results, part of the digest.

    Raises UserError if a path contains no model, a model or mode is named twice, or no model has the fast weights that
    a clip mode needs.
    """
    found = []
    for named in [ModelSource.find(path) for path in models]:
        found += [(named, mode) for mode in named.modes(modes)]
    clipped = next((mode for mode in modes if mode.clip is not None), None)
    if clipped and not any(named.has_fast_weights for named, _ in found):
        raise UserError(f"--fast-weights {clipped}: '{models[0]}' has no fast weights to clip; use on or off")
    words = [str(mode) if named.has_fast_weights else "none" for named, mode in found]
    labels = label_columns([(named.path, word) for (named, _), word in zip(found, words, strict=True)])
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise UserError(f"'{twice}' is named twice: name each model, and each mode in --fast-weights, once")
    return [
        EvaluatedModel(named, mode, Column(label, str(named.path), word, named.digest(mode, numerics)))
        for (named, mode), word, label in zip(found, words, labels, strict=True)
    ]


def one_tokenizer(asked: list[EvaluatedModel], why: str) -> None:
    """Raise UserError if the models have different tokenizers. ``why`` ends the message: the reason and the remedy."""
    first = None
    for model in {one.model.path: one.model for one in asked}.values():
        mark = model.fingerprint()
        if first is not None and mark is not None and mark != first[1]:
            raise UserError(f"'{first[0]}' and '{model.path}' have different tokenizers: {why}")
        if mark is not None:
            first = first or (model.path, mark)
