"""Data of several sources: held-out loss of each, held-out data of one's own."""

import json
import random
from pathlib import Path

import pytest

from inplace_ttt.data.prepare import prepare
from inplace_ttt.hf.tokenizer import train_tokenizer
from inplace_ttt.training.records import read_metrics
from inplace_ttt.training.scalars import scalars_of
from launching import run_main
from ranks import run_ranks

TRAIN = [
    "model=tiny", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.kv_channels=8", "run.name=sources",
    "ttt.layers=all", "ttt.chunk_size=16", "ttt.eta=0.3", "ttt.max_update_ratio=null", "data.seq_length=128",
    "train.steps=2", "train.global_batch_size=2", "train.eval_samples=6", "optim.lr=1e-2", "log.wandb=disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    """Words, and numbers, with one tokenizer; and held-out ones of both."""
    base, rng = tmp_path_factory.mktemp("corpora"), random.Random(0)
    words = [f"w{rng.randrange(10**4)}" for _ in range(200)]
    made = dict(
        words=[" ".join(rng.choices(words, k=150)) for _ in range(20)],
        numbers=[" ".join(str(rng.randrange(100)) for _ in range(150)) for _ in range(20)],
        held_words=[" ".join(rng.choices(words, k=150)) for _ in range(5)],
        held_numbers=[" ".join(str(rng.randrange(100)) for _ in range(150)) for _ in range(5)],
    )
    tokenizer = train_tokenizer([text for texts in made.values() for text in texts], 400)
    for name, texts in made.items():
        prepare(texts, tokenizer, str(base / name), settings={}, workers=1, progress=lambda *_: None)
    return {name: base / name for name in made}


def sources(corpora, *names: str) -> str:
    return (
        "[" + ", ".join(f"{{path: {corpora[name]}, weight: {1 + number}}}" for number, name in enumerate(names)) + "]"
    )


def train(ranks: int, folder: Path, *options: str) -> list[dict]:
    """Return the evaluations of a run."""
    code, printed = run_ranks(ranks, run_main, *TRAIN, f"run.dir={folder}", *options)[0]
    assert code == 0, printed
    return [record for record in read_metrics(folder / "metrics.jsonl") if record.get("eval")]


@pytest.mark.parametrize("of_ones_own", [False, True])
def test_held_out_loss_of_each_source(corpora, tmp_path, of_ones_own):
    """They add up to the whole, and are the same in every layout."""
    options = [f"data.sources={sources(corpora, 'words', 'numbers')}"]
    if of_ones_own:
        options.append(f"data.validation={sources(corpora, 'held_numbers', 'held_words')}")
    (expected,) = train(1, tmp_path / "one", *options)
    names = ["held_numbers", "held_words"] if of_ones_own else ["words", "numbers"]
    assert [one["name"] for one in expected["sources"]] == names
    for key in ("loss", "loss_without_fast_weights"):
        total = sum(one[key] * one["tokens"] for one in expected["sources"])
        assert total / sum(one["tokens"] for one in expected["sources"]) == pytest.approx(expected[key], rel=1e-6)
    few, many = (one["tokens"] for one in expected["sources"])  # by their weights, of six samples
    assert many > few > 0
    shown = scalars_of(expected)
    assert shown[f"eval_loss/source_{names[0]}"] == expected["sources"][0]["loss"]
    assert f"eval_loss_without_fast_weights/source_{names[1]}" in shown
    for kind in ("pipeline_model",) if of_ones_own else ("context",):
        (found,) = train(2, tmp_path / kind, *options, f"parallel.{kind}_parallel_size=2")
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for one, other in zip(found["sources"], expected["sources"], strict=True):
            assert one["tokens"] == other["tokens"] and one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_one_source_needs_no_list(corpora, tmp_path):
    """With held-out data of one's own, nothing of the sources is held out."""
    own = [f"data.sources={sources(corpora, 'words')}", f"data.validation={sources(corpora, 'held_words')}"]
    (record,) = train(1, tmp_path / "own", *own, "data.validation_fraction=0.99")
    assert "sources" not in record and record["loss"] > 0


def test_what_is_refused(corpora, tmp_path):
    run = [f"run.dir={tmp_path / 'run'}", f"data.sources={sources(corpora, 'words')}"]
    (tmp_path / "other").mkdir()
    for ending in ("bin", "idx", "json"):
        content = Path(f"{corpora['held_words']}.{ending}").read_bytes()
        (tmp_path / f"other/held_words.{ending}").write_bytes(content)
    copy = f"data.validation=[{{path: {tmp_path}/other/held_words}}]"
    code, printed = run_ranks(1, run_main, *TRAIN, *run, copy)[0]
    assert code == 0, printed
    for change, sentence in [
        ("data.validation=[{path: /nowhere/x}]", "data.validation names '/nowhere/x'"),
        ("data.validation=[]", "data.validation=[], but the run"),
        ("data.validation=[{pth: x}]", "data.validation"),
        (f"data.validation={sources(corpora, 'held_numbers')}", "data.validation: '"),
    ]:
        code, printed = run_ranks(1, run_main, *TRAIN, *run, change, "train.steps=3")[0]
        assert code == 2 and sentence in printed and "Traceback" not in printed, printed
    moved = f"data.validation={sources(corpora, 'held_words')}"  # the same content, and another name and place
    code, printed = run_ranks(1, run_main, *TRAIN, *run, moved, "train.steps=3")[0]
    assert code == 0, printed
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
