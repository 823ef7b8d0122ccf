"""launch/read_book.py: a book read by a checkpoint in any layout is the book that the exported model reads."""

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from inplace_ttt.config import UserError
from inplace_ttt.data.prepare import prepare
from inplace_ttt.evaluation.mode import FastWeightMode
from inplace_ttt.evaluation.models import open_model
from inplace_ttt.hf.convert import export_checkpoint
from inplace_ttt.hf.tokenizer import load_tokenizer, train_tokenizer
from inplace_ttt.inference.reading import main, read_text
from launching import printed_by, run_main
from ranks import run_ranks

CHUNK = 16
TRAIN = [
    "recipe=tiny_ttt", "log.wandb=disabled", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.kv_channels=8", "ttt.layers=all",
    f"ttt.chunk_size={CHUNK}", "ttt.eta=0.3", "ttt.proj_init_std=0.5", "data.seq_length=128", "train.steps=2",
    "train.global_batch_size=2", "train.eval_samples=2", "data.validation_fraction=0.4", "optim.lr=1e-2",
    "ttt.lr_multiplier=30", "ttt.max_update_ratio=null", "parallel.context_parallel_size=1",
]  # fmt: skip
TARGETS = ["hidden_states", "input_embed"]
TEXT = "the cat sat on a mat and saw that no dog was at home while it rained all day long over the old town"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A run for each target, its export, and texts."""
    base, rng = tmp_path_factory.mktemp("books"), random.Random(0)
    texts = [" ".join(rng.choices(TEXT.split(), k=300)) for _ in range(20)]
    prepare(texts, train_tokenizer(texts, 300), str(base / "corpus"), settings={}, workers=1, progress=lambda *_: None)
    for target in TARGETS:
        ((code, printed),) = run_ranks(
            1, run_main, *TRAIN, f"data.sources=[{{path: {base / 'corpus'}}}]", f"run.dir={base / target}",
            f"ttt.target={target}",
        )  # fmt: skip
        assert code == 0, printed
        export_checkpoint(base / target, base / f"{target}_exported")
    (base / "one.txt").write_text(texts[0])
    (base / "two.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts[1:3]))
    return base


def run(*words: str) -> tuple[int, str]:
    return printed_by(main, list(words))


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["about"])


def joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from inplace_ttt.hf.modeling_inplace_ttt import join_sum

    found = {}
    for name, tensor in tensors.items():
        rest = tensors.get(name.replace("update", "rest"))
        if not name.endswith("rest"):
            found[name] = join_sum(tensor, rest) if name.endswith("update") and rest is not None else tensor
    return found


LAYOUTS = [
    (1, [], "hidden_states"),
    (4, [], "hidden_states"),
    (4, ["tensor_model"], "hidden_states"),
    (2, [], "input_embed"),
    (2, ["pipeline_model"], "input_embed"),
]


@pytest.mark.parametrize(("ranks", "kinds", "target"), LAYOUTS, ids=lambda one: str(one))
def test_every_layout_reads_the_same_book(world, tmp_path, ranks, kinds, target):
    """Of texts that end inside a chunk, by context-parallel ranks unless keys say otherwise."""
    files = [str(world / "one.txt"), str(world / "two.jsonl")]
    exported = str(world / f"{target}_exported")
    assert run(exported, *files, "--output", str(tmp_path / "theirs"), "--part", "50")[0] == 0
    keys = [f"parallel.{kind}_parallel_size=2" for kind in kinds]
    answers = run_ranks(ranks, run, str(world / target), *files, "--output", str(tmp_path / "ours"), *keys)
    assert [code for code, _ in answers] == [0] * ranks, answers
    assert f"CP {ranks // 2 ** len(kinds)} " in answers[0][1] and f"'{tmp_path / 'ours'}' saved" in answers[0][1]
    (ours, about), (theirs, expected) = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    limits, others = about.pop("limits"), expected.pop("limits")
    assert limits.keys() == others.keys() == {"0", "1"}  # the text is longer than the training length
    assert all(limits[layer] == pytest.approx(others[layer], rel=1e-4) for layer in limits)
    assert about == expected and [one["name"] for one in about["texts"][0]] == ["one.txt", "two.jsonl"]
    assert int(ours["count"]) == sum(one["tokens"] for one in about["texts"][0]) % CHUNK != 0
    ours, theirs = joined(ours), joined(theirs)
    assert ours.keys() == theirs.keys() and ("embeds.0.inputs" in ours) == (target == "input_embed")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
    model = open_model(Path(exported), "m", FastWeightMode(), torch.device("cpu"), torch.float32)
    book, question = model.network.load_fast_weights(tmp_path / "ours", model.tokenizer), torch.tensor([[5, 6, 7]])
    answer = model.network.generate(question, fast_weights=book, max_new_tokens=9, do_sample=False)
    assert answer.shape[1] > 3


def run_with_slow_unlink(*words: str) -> tuple[int, str]:
    """Run with a rank 0 that keeps for 2 s the empty file with which it tests --output; rank 1 waits for this file."""
    unlink, output = Path.unlink, Path(words[-1])

    def slow(path: Path, missing_ok: bool = False) -> None:
        if path == output:
            time.sleep(2)
        unlink(path, missing_ok)

    Path.unlink = slow
    deadline = time.monotonic() + 2
    while os.environ["RANK"] == "1" and not output.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return run(*words)


def test_other_ranks_do_not_look_at_the_file_that_rank_0_makes(world, tmp_path):
    words = [str(world / "hidden_states"), str(world / "one.txt"), "--output", str(tmp_path / "book")]
    assert [code for code, _ in run_ranks(2, run_with_slow_unlink, *words)] == [0, 0]


def run_without_a_file(*words: str) -> tuple[int, str]:
    """Run with a rank 1 that cannot read the file."""
    from inplace_ttt.inference import reading

    def fail(*_):
        raise UserError("'one.txt' cannot be read on rank 1")

    if os.environ["RANK"] == "1":
        reading.read_text = fail
    return run(*words)


def test_a_file_that_one_rank_cannot_read_ends_all_ranks(world, tmp_path):
    words = [str(world / "hidden_states"), str(world / "one.txt"), "--output", str(tmp_path / "book")]
    answers = run_ranks(2, run_without_a_file, *words)
    assert [code for code, _ in answers] == [2, 2] and "cannot be read on rank 1" in answers[0][1], answers
    assert list(tmp_path.iterdir()) == []


def test_less_than_a_chunk(world, tmp_path):
    (tmp_path / "short.txt").write_text("the cat sat")
    for source, ranks in (("hidden_states", 2), ("hidden_states_exported", 1)):
        words = [str(world / source), str(tmp_path / "short.txt"), "--output", str(tmp_path / source)]
        assert run_ranks(ranks, run, *words)[0][0] == 0
        tensors, _ = contents(tmp_path / source)
        assert sorted(tensors) == ["0.0.inputs", "1.0.inputs", "count"]


def test_half_the_space(world, tmp_path):
    for size in ("exact", "bf16"):
        words = [str(world / "hidden_states_exported"), str(world / "one.txt"), "--size", size, "--dtype", "bf16"]
        assert run(*words, "--output", str(tmp_path / size))[0] == 0
    exact, half = (contents(tmp_path / size)[0] for size in ("exact", "bf16"))
    assert exact.keys() - half.keys() == {"0.0.rest", "1.0.rest"}
    assert all(torch.equal(exact[name], half[name]) for name in half)


def test_texts_are_read_as_they_are(world, tmp_path):
    tokenizer = load_tokenizer(str(world / "hidden_states_exported"))
    (tmp_path / "a.txt").write_text("the cat <|endoftext|>")
    (tmp_path / "b.txt").write_text("sat\n")
    text = read_text([str(tmp_path)], "text", tokenizer)
    assert tokenizer.decode(text.tokens) == "the cat <|endoftext|>\nsat\n"
    assert tokenizer.eos_token_id not in text.tokens
    assert [one["tokens"] for one in text.text_record()] == [size for _, size in text.parts]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL", "--output", "OUT"], "name a model and the files"),
        (["MODEL", "TEXT"], "--output"),
        (["MODEL", "TEXT", "--output", "OUT", "--fast-weights", "off"], "a book needs fast weights"),
        (["MODEL", "TEXT", "--output", "OUT", "--more"], "unknown option --more"),
        (["MODEL", "TEXT", "--output", "OUT", "optim.lr=1"], "optim.lr cannot be set by this command"),
        (["MODEL", "TEXT", "--output", "TEXT"], "already exists"),
        (["MODEL", "TEXT", "--output", "MODEL/no/book"], "does not exist: create it"),
        (["MODEL", "no.txt", "--output", "OUT"], "no.txt"),
        (["MODEL", "EMPTY", "--output", "OUT"], "contains no text"),
        (["EXPORTED", "TEXT", "--output", "OUT", "parallel.context_parallel_size=1"], "in Hugging Face format"),
        (["MODEL", "TEXT", "--output", "OUT", "parallel.context_parallel_size=3"], "context_parallel_size=3 needs"),
        (["TEXT", "TEXT", "--output", "OUT"], "is not a folder"),
    ],
)
def test_what_cannot_be_read(world, tmp_path, words, message):
    (tmp_path / "empty.txt").write_text("")
    places = dict(
        MODEL=world / "hidden_states", EXPORTED=world / "hidden_states_exported", TEXT=world / "one.txt",
        OUT=tmp_path / "out", EMPTY=tmp_path / "empty.txt",
    )  # fmt: skip
    for name, path in places.items():
        words = [str(path) + word.removeprefix(name) if word.startswith(name) else word for word in words]
    ((code, printed),) = run_ranks(1, run, *words)
    assert code == 2 and message in printed and "Traceback" not in printed and not (tmp_path / "out").exists()
