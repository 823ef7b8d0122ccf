"""Loss and gradient norm of a whole model in training, at every parallel layout what one process gives."""

import functools

import pytest

from layouts import (
    CHEAP,
    CP2,
    CP2_PP2,
    CP2_PP2_TP2_SP,
    CP2_TP2_SP,
    CP4,
    CP4_TP2_SP,
    CP8,
    FULL,
    INPUT_EMBED,
    ONE_DOCUMENT,
    OVERLAP,
    PP2,
    PRODUCTS,
    SELECTIVE,
    TP2,
    TP2_SP,
    UNTIED,
)
from models import SEQ_LENGTH, TINY, train_histograms, train_losses
from ranks import run_ranks

STEPS = 6


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
    "windows": [{"model": {"sliding_window": 10, "window_attn_skip_freq": 2}}],
    "no projection": [{"ttt": {"project": False}}],
    "no convolution": [{"ttt": {"convolution": False, "eta": 0.01}}],  # at 0.02 training amplifies rounding to 1e-5
    "decayed": [{"ttt": {"decay": 0.5}}],
    "clipped": [{"ttt": {"clip": 0.5}}],  # four in five of the first TTT layer's updates
    "longer": [{"data": {"seq_length": 128}}],
}


@pytest.mark.parametrize(
    ("variant", "size", "layout"),
    [
        ("packed", 1, [FULL]),
        ("packed", 1, [CHEAP]),
        ("packed", 1, [{"train": {"micro_batch_size": 2}}]),
        ("packed", 2, [TP2]),
        ("packed", 2, [TP2_SP, PRODUCTS]),
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
        ("windows", 4, [CP2_PP2]),
        ("no projection", 2, [TP2_SP]),
        ("no convolution", 2, [TP2_SP]),
        ("no convolution", 2, [CP2, {"parallel": {"use_distributed_optimizer": False}}]),
        ("decayed", 4, [CP2_TP2_SP, FULL]),
        ("clipped", 2, [TP2_SP]),
        ("clipped", 2, [CP2]),
        ("clipped", 2, [PP2, {"train": {"micro_batch_size": 2}}]),
        ("clipped", 4, [CP4, FULL]),
        ("clipped", 4, [CP2_TP2_SP, SELECTIVE]),
        ("longer", 8, [CP8]),
        pytest.param("longer", 8, [CP4_TP2_SP, FULL], marks=pytest.mark.slow),
        pytest.param("longer", 8, [CP2_PP2_TP2_SP], marks=pytest.mark.slow),
    ],
)
def test_equals_one_process(variant, size, layout):
    expected = one_process(variant)
    for result in run_ranks(size, train_losses, STEPS, *VARIANTS[variant], *layout):
        for (loss, norm), (loss_1, norm_1) in zip(result, expected, strict=True):
            assert abs(loss - loss_1) <= 1e-5 * loss_1
            assert abs(norm - norm_1) <= 1e-5 * norm_1


def test_clipping_tells_in_the_losses():
    """Check that clipping changes the training that layouts are compared with."""
    clipped, unclipped = one_process("clipped"), one_process("packed")
    assert clipped[0][0] != unclipped[0][0]
    assert clipped[0][1] != unclipped[0][1]


@functools.cache
def histograms_of_one_process():
    return run_ranks(1, train_histograms, 3)[0]


@pytest.mark.parametrize(
    ("size", "layout"),
    [(2, [{}]), (2, [TP2_SP, FULL]), (2, [CP2]), (2, [PP2, SELECTIVE]), (4, [CP4]), (4, [CP2_TP2_SP])],
)
def test_histograms_of_update_norms_are_those_of_one_process(size, layout):
    for result in run_ranks(size, train_histograms, 3, *layout):
        assert result == histograms_of_one_process()


def test_histograms_count_each_update_that_a_later_token_reads():
    first, off, third = histograms_of_one_process()
    # documents of 24, 16 and 24 tokens in chunks of 8: the last chunk of each is read by nobody
    read = TINY["train"]["global_batch_size"] * (SEQ_LENGTH // TINY["ttt"]["chunk_size"] - 3)
    for step in (first, third):
        assert {layer: sum(counts.values()) for layer, counts in step.items()} == {"0": read, "2": read}
    assert off == {"0": {}, "2": {}}
