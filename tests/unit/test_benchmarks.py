"""Benchmarks of the exported model do what they say; what they measure is a matter of GPUs."""

import pytest
import torch

from inplace_ttt.benchmarks import decode
from inplace_ttt.training.compose import compose_config, to_config
from launching import ROOT, SMALL


@pytest.fixture(scope="module")
def models():
    keys = [*SMALL, "model.num_layers=2", "ttt.layers=[1]", "ttt.chunk_size=16", "model.vocab_size=99"]
    config = to_config(compose_config([*keys, "run.name=benchmark"], ROOT / "recipes"))
    return decode.Models.build(config, torch.device("cpu"), torch.float32)


def test_decode(models):
    records = decode.decode(models, after=[20, 40], rows=[1, 3], tokens=40)
    assert [one["texts"] for one in records[::4]] == ["1 x 20", "1 x 40", "3 x 20", "3 x 40"]
    assert [one["variant"] for one in records[:4]] == ["off, dynamic", "off, static", "on, dynamic", "on, static"]
    assert all(one["ms_per_step"] > 0 and one["tokens"] == 39 for one in records)
    assert min(one["ratio"] for one in records[:2]) == 1


@pytest.mark.parametrize("static", [False, True])
def test_filled_caches_hold_what_they_say(models, static):
    """Chunks of a batch end at different steps, and states are not zero."""
    cache = decode.filled_cache(models.ours, models.book, 4, 20, 30, static)
    assert int(cache.get_seq_length()) == 20
    state = cache.fast_weights.layers[1]
    assert cache.fast_weights.counts == [4, 8, 12, 0] == state.count.tolist() and state.update.any()


def test_prefill_and_book(models):
    assert [one["variant"] for one in decode.prefill(models, [50], rounds=1)] == ["off", "package", "file"]
    exact, half = decode.book(models, prompt=5, rounds=1)
    assert exact["mib"] > half["mib"] > 0 and exact["first_token_ms"] > 0
