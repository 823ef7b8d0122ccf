"""Held-out loss by position, and with fast weights switched off, at every layout what one process gives."""

import functools

import pytest
import torch

from inplace_ttt.data.position import PositionRanges
from layouts import CP2, CP2_PP2, CP4, INPUT_EMBED, PP2, TP2_SP
from models import SEQ_LENGTH, Training, tiny_config
from ranks import run_ranks

RANGES = PositionRanges((0, 8, 16, 24, 60))


def evaluate(*changes: dict):
    """Totals with fast weights, without them, and with convolutions that write nothing."""
    training = Training(tiny_config(*changes))
    batches = training.batches(0)
    found = [
        training.stepper.evaluate(iter(batches), len(batches), RANGES, fast_weights=fast)
        for fast in (True, False, True)
    ]
    assert found[0] == found[2]  # switched on again
    for module in training.model.ttt_modules.values():
        module.ttt_conv.weight.data.zero_()
    return [*found[:2], training.stepper.evaluate(iter(batches), len(batches), RANGES)]


@functools.cache
def one_process(embed: bool):
    return run_ranks(1, evaluate, *[INPUT_EMBED] * embed)[0]


def close(found, expected):
    numbers = [(found.loss, expected.loss), (found.tokens, expected.tokens), (found.correct, expected.correct)]
    numbers += zip(sum(found.by_position, ()), sum(expected.by_position, ()), strict=True)
    return all(abs(a - b) <= 1e-5 * abs(b) for a, b in numbers)


@pytest.mark.parametrize("embed", [False, True])
def test_without_fast_weights_is_what_writes_nothing(embed):
    on, off, zero = one_process(embed)
    assert close(off, zero) and not close(on, off)


@pytest.mark.parametrize(
    ("size", "embed", "layout"),
    [(2, False, CP2), (4, False, CP4), (2, False, TP2_SP), (2, True, PP2), (2, False, {}), (4, True, CP2_PP2)],
)
def test_layouts_equal_one_process(size, embed, layout):
    for result in run_ranks(size, evaluate, layout, *[INPUT_EMBED] * embed):
        for found, expected in zip(result, one_process(embed), strict=True):
            assert close(found, expected)


def test_ranges_partition_the_counted_tokens():
    on = one_process(False)[0]
    config = tiny_config()
    # of documents of 24, 16 and 24 tokens, four fifths of which count
    assert sum(tokens for _, tokens in on.by_position) == on.tokens < config.train.global_batch_size * SEQ_LENGTH
    assert [tokens > 0 for _, tokens in on.by_position] == [True, True, True, False]


def test_sums_by_hand():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    losses, counts = torch.arange(6.0)[None], torch.tensor([[True, True, False, True, True, True]])
    ranges = PositionRanges((1, 2, 4))
    sums = ranges.sums(positions, losses, counts).tolist()
    assert sums == [[1.0 + 5.0, 2.0], [3.0, 1.0]]  # position 0 is in no range
    assert ranges.records([*sums[:1], [0.0, 0.0]]) == [{"from": 1, "to": 2, "tokens": 2, "loss": 3.0}]
    assert PositionRanges.equal(32768).edges == tuple(range(0, 32769, 4096))
    assert PositionRanges.equal(3).edges == (0, 1, 2, 3)
