"""Loss and gradient norm of a whole model in training, at every parallel layout what one process gives."""

import functools

import pytest

from models import train_losses
from ranks import run_ranks

STEPS = 6


def parallel(**sizes):
    return {
        "parallel": {f"{name}_parallel_size" if name != "sequence_parallel" else name: n for name, n in sizes.items()}
    }


TP2 = parallel(tensor_model=2)
TP2_SP = parallel(tensor_model=2, sequence_parallel=True)
PP2 = parallel(pipeline_model=2)
CP2 = parallel(context=2)
CP4 = parallel(context=4)
CP2_TP2_SP = parallel(context=2, tensor_model=2, sequence_parallel=True)
CP2_PP2 = parallel(context=2, pipeline_model=2)
FULL = {"train": {"recompute": "full"}}
SELECTIVE = {"train": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}}
OVERLAP = {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
ONE_DOCUMENT = {"data": {"reset_at_documents": False}}
INPUT_EMBED = {"ttt": {"target": "input_embed"}}
UNTIED = {"model": {"tie_word_embeddings": False}}


@functools.cache
def one_process(key: str):
    return run_ranks(1, train_losses, STEPS, *VARIANTS[key])[0]


VARIANTS = {
    "packed": [],
    "one document": [ONE_DOCUMENT],
    "input_embed": [INPUT_EMBED],
    "input_embed, one document, untied": [INPUT_EMBED, ONE_DOCUMENT, UNTIED],
    "no fast weights": [{"ttt": {"enabled": False}}],
    "chunks on two ranks": [{"ttt": {"chunk_size": 24}}, {"data": {"reset_at_documents": False}}],
    "window": [{"model": {"sliding_window": 10}}],
    "no projection": [{"ttt": {"project": False}}],
}


@pytest.mark.parametrize(
    ("variant", "size", "layout"),
    [
        ("packed", 1, [FULL]),
        ("packed", 1, [SELECTIVE]),
        ("packed", 1, [{"train": {"micro_batch_size": 2}}]),
        ("packed", 2, [TP2]),
        ("packed", 2, [TP2_SP, SELECTIVE]),
        ("packed", 2, [PP2]),
        ("packed", 2, [{}]),
        ("packed", 2, [{"parallel": {"use_distributed_optimizer": False}}]),
        ("packed", 2, [OVERLAP]),
        ("packed", 2, [CP2]),
        ("packed", 4, [CP4]),
        ("packed", 4, [CP2_TP2_SP, FULL]),
        ("one document", 2, [TP2_SP]),
        ("one document", 4, [CP4, FULL]),
        ("input_embed", 4, [CP2_PP2, FULL]),
        ("input_embed", 4, [CP2_TP2_SP]),
        ("input_embed, one document, untied", 2, [PP2]),
        ("input_embed, one document, untied", 2, [CP2, {"train": {"micro_batch_size": 2}}]),
        ("no fast weights", 4, [CP2_TP2_SP]),
        ("chunks on two ranks", 2, [TP2_SP]),
        ("window", 2, [CP2]),
        ("no projection", 2, [TP2_SP]),
    ],
)
def test_equals_one_process(variant, size, layout):
    expected = one_process(variant)
    for result in run_ranks(size, train_losses, STEPS, *VARIANTS[variant], *layout):
        for (loss, norm), (loss_1, norm_1) in zip(result, expected, strict=True):
            assert abs(loss - loss_1) <= 1e-5 * loss_1
            assert abs(norm - norm_1) <= 1e-5 * norm_1
