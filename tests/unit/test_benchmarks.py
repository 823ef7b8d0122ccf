"""Benchmarks of the exported model do what they say; what they measure is a matter of GPUs. What was measured is said
in one place."""

import json
import re

import pytest
import torch

from inplace_ttt import estimate, figures
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


def test_generate(models):
    records = decode.generate(models, rows=2, length=11, part=4, tokens=3)
    assert [(one["variant"], one["prompt"]) for one in records] == [
        (name, prompt) for name in ("off", "on") for prompt in ("at once", "in parts of 4")
    ]


def test_documents_say_what_benchmarks_have_written():
    named = []
    for path in figures.DOCUMENTS:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert figures.renewed(text) == text, "run python -m inplace_ttt.figures"
        named += re.findall("<!-- figures: (.*?) -->", text)
    assert sorted(named) == sorted(set(figures.figures()) - {"rates"})


def test_a_kept_result_replaces_the_one_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FILE", tmp_path / "figures.json")
    (tmp_path / "figures.json").write_text("{}")
    figures.figures.cache_clear()
    try:
        for milliseconds in (3.14159, 2.71828):
            record = dict(file="exact", mib=1234.5678, load_ms=milliseconds, prompt=64)
            figures.keep(
                "book",
                dict(command="python launch/benchmark.py book", machine="GPU", date="2026-01-01", records=[record]),
            )
        assert figures.find("book", "load_ms", file="exact") == 2.718
        text = figures.renewed("before\n<!-- figures: book -->\nold\n<!-- end -->\nafter\n")
        assert "| exact | 1,235 | 2.7 |" in text and "old" not in text and text.startswith("before\n")
        assert figures.renewed(text) == text
        assert list(json.loads((tmp_path / "figures.json").read_text())) == ["book"]
    finally:
        figures.figures.cache_clear()


def test_plan_takes_its_rates_from_there(monkeypatch):
    config = to_config(
        compose_config(["recipe=qwen3_4b_ttt", "parallel=h200", "model.vocab_size=1000"], ROOT / "recipes")
    )
    gpu, known = estimate.GPUS["H200"], figures.figures()
    before = estimate.step_seconds(config, 8, gpu)
    slower = known["rates"] | dict(products=known["rates"]["products"] / 2, attention=known["rates"]["attention"] / 2,
                                   attention_forward=known["rates"]["attention_forward"] / 2)  # fmt: skip
    monkeypatch.setattr(estimate, "figures", lambda: known | dict(rates=slower))
    assert estimate.step_seconds(config, 8, gpu) == pytest.approx(2 * before)
