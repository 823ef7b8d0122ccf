"""launch/generate.py: prompts, files, conversations and books, in the terminal."""

import json
import random
import re
import sys

import pytest
import torch

from inplace_ttt.hf import modeling_inplace_ttt as exported
from inplace_ttt.hf.tokenizer import train_tokenizer
from inplace_ttt.inference import generating
from inplace_ttt.inference.generating import main

TEXT = "the cat sat on a mat and saw that no dog was at home while it rained all day long over the old town"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model whose fast weights change its answers, with a tokenizer."""
    base, rng = tmp_path_factory.mktemp("generate"), random.Random(0)
    tokenizer = train_tokenizer([" ".join(rng.choices(TEXT.split(), k=500))], 300)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = exported.InPlaceTTTQwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, ttt_layers=[0, 1], ttt_chunk=16, ttt_lr=0.1, initializer_range=0.3,
    )  # fmt: skip
    model = exported.InPlaceTTTQwen3ForCausalLM(config)
    for mlp in model.fast_mlps:
        mlp.ttt_conv.weight.data.normal_()
    model.save_pretrained(base / "model")
    tokenizer.save_pretrained(base / "model")
    (base / "text.txt").write_text(" ".join(rng.choices(TEXT.split(), k=60)) + "\n")
    book = model.eval().read(tokenizer(TEXT, return_tensors="pt")["input_ids"], name="a cat", tokenizer=tokenizer)
    book.save(base / "book")
    return base


def run(capsys, folder, *words):
    code = main([str(folder / "model"), "--max-new-tokens", "12", *words])
    return code, *capsys.readouterr()


def expected(folder, text, *, chat=False, **more):
    from inplace_ttt.evaluation.mode import FastWeightMode
    from inplace_ttt.evaluation.models import open_model

    model = open_model(folder / "model", "m", FastWeightMode(), torch.device("cpu"), torch.float32)
    model.network.generation_config.eos_token_id = model.tokenizer.eos_token_id
    if more.pop("book", False):
        more["fast_weights"] = model.network.load_fast_weights(folder / "book")
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    out = model.network.generate(ids, max_new_tokens=12, do_sample=False, **more)
    return model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_prompt_is_gone_on_from(folder, capsys):
    code, out, err = run(capsys, folder, "--prompt", TEXT)
    assert code == 0 and out.rstrip("\n") == expected(folder, TEXT).rstrip("\n") != ""
    assert re.search(r"\[prefill: \d+ tokens in [\d.]+ s; decode: 12 tokens at [\d.]+ tokens per second\]", err)
    off = run(capsys, folder, "--prompt", TEXT, "--fast-weights", "off")[1]
    assert off != out  # the prompt is longer than a chunk


def test_a_file_is_read_before_the_prompt(folder, capsys):
    """Also in parts."""
    text = (folder / "text.txt").read_text() + "the dog"
    for part in ("8192", "20", "1"):
        words = ["--file", str(folder / "text.txt"), "--prompt", "the dog", "--part", part]
        assert run(capsys, folder, *words)[1].rstrip("\n") == expected(folder, text).rstrip("\n")


def test_a_book_is_remembered(folder, capsys):
    code, out, err = run(capsys, folder, "--prompt", "the", "--book", str(folder / "book"))
    assert code == 0 and "the book contains a cat (" in err
    assert out.rstrip("\n") == expected(folder, "the", book=True).rstrip("\n") != expected(folder, "the").rstrip("\n")


def test_answers_are_drawn_by_the_seed(folder, capsys):
    def draw(seed):
        return run(capsys, folder, "--prompt", TEXT, "--temperature", "1.5", "--top-p", "0.9", "--seed", seed)[1]

    assert draw("1") == draw("1") != draw("2")


def test_standard_input(folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "in").write_text(TEXT)
    with (tmp_path / "in").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert run(capsys, folder)[1].rstrip("\n") == expected(folder, TEXT).rstrip("\n")


def said(*turns):
    roles = ["user", "assistant"]
    lines = [f"<{roles[number % 2]}>{turn}\n" for number, turn in enumerate(turns)]
    return "".join(lines) + "<assistant>"


@pytest.mark.parametrize("book", [False, True])
def test_a_conversation(folder, capsys, monkeypatch, tmp_path, book):
    """Every answer is that to the whole of it, and only what is new is read."""
    (tmp_path / "in").write_text("the cat\n\nthe dog\n/exit\nmore\n")
    with (tmp_path / "in").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        code, out, err = run(capsys, folder, "--chat", *(["--book", str(folder / "book")] if book else []))
    assert code == 0
    first = expected(folder, said("the cat"), book=book)
    second = expected(folder, said("the cat", first, "the dog"), book=book)
    assert out == f"{first}\n{second}\n"
    read = [int(number) for number in re.findall(r"\[prefill: (\d+) tokens", err)]
    assert len(read) == 2 and read[1] < 60
    assert run(capsys, folder, "--chat", "--prompt", "the cat")[1].rstrip("\n") == expected(folder, said("the cat"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--promt", "x"], "unknown option --promt"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--temperature", "-1"], "'-1' is not a number from 0 to 100"),
        (["--prompt", "x", "--top-p", "0"], "--top-p 0"),
        (["--prompt", "x", "--system", "y"], "add --chat"),
        (["--prompt", "x", "--book", "no"], "'no' is not a file"),
        (["--prompt", "x", "--book", "MODEL/config.json"], "is not a valid file of fast weights"),
        (["--prompt", "x", "--book", "BOOK", "--fast-weights", "off"], "cannot be used with --fast-weights off"),
        (["--prompt", "x", "--book", "OTHER"], "another model"),
        (["--prompt", "x", "MODEL"], "name one model, not 2"),
        (["--file", "MODEL"], "cannot be read"),
        (["--file", ""], "--file is empty"),
        (["--prompt", "caf\udce9"], "the prompt is not UTF-8 text"),
        (["--prompt", "x", "--chat", "--system", "\udce9"], "--system is not UTF-8 text"),
        (["--prompt", "x", "--temperature", "1e-320"], "is too small"),
        (["--chat", "--static"], "--static supports one answer only"),
        (["--file", "MODEL/model.safetensors"], "is not UTF-8 text"),
    ],
)
def test_what_cannot_be_asked(folder, capsys, tmp_path, words, message):
    about = json.dumps(dict(format=exported.BOOK, model="0" * 64, tokenizer=None, texts=[]))
    from safetensors.torch import save_file

    save_file(dict(count=torch.tensor([0])), tmp_path / "other", metadata=dict(about=about))
    places = dict(MODEL=str(folder / "model"), BOOK=str(folder / "book"), OTHER=str(tmp_path / "other"))
    for name, path in places.items():
        words = [word.replace(name, path) for word in words]
    code, out, err = run(capsys, folder, *words)
    assert code == 2 and message in err and "Traceback" not in err and out == ""


def test_a_model_without_a_chat_template(folder, capsys, monkeypatch):
    monkeypatch.setattr(generating, "open_model", lambda *a: _without_template(open_model(*a)))
    from inplace_ttt.evaluation.models import open_model

    code, _, err = run(capsys, folder, "--chat", "--prompt", "x")
    assert code == 2 and "has no chat template" in err


def _without_template(model):
    model.tokenizer.chat_template = None
    return model


def test_long_questions_of_a_conversation_are_read_in_parts(folder, capsys, monkeypatch, tmp_path):
    """And what is no text is asked for again."""
    question = " ".join(TEXT.split() * 3)
    (tmp_path / "in").write_text(f"{question}\n\udce9\nthe dog\n", errors="surrogateescape")
    with (tmp_path / "in").open(errors="surrogateescape") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        code, out, err = run(capsys, folder, "--chat", "--part", "20")
    first = expected(folder, said(question))
    assert code == 0 and out == f"{first}\n{expected(folder, said(question, first, 'the dog'))}\n"
    assert "the question is not UTF-8 text: ask again" in err


def test_nobody_is_there_to_ask(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    for words in ((), ("--chat",)):
        code, _, err = run(capsys, folder, *words)
        assert code == 2 and "there is no prompt" in err


def test_a_book_that_does_not_say_what_it_holds(folder, capsys, tmp_path):
    from inplace_ttt.evaluation.mode import FastWeightMode
    from inplace_ttt.evaluation.models import open_model

    model = open_model(folder / "model", "m", FastWeightMode(), torch.device("cpu"), torch.float32)
    cache = exported.FastWeightCache(config=model.network.config)
    model.network(torch.tensor([[5, 6, 7] * 9]), past_key_values=cache)
    cache.fast_weights.save(tmp_path / "book")
    code, _, err = run(capsys, folder, "--prompt", "the", "--book", str(tmp_path / "book"))
    assert code == 0 and "the book does not list its texts" in err
