"""Supervised data: conversations by a chat template, and the loss on their answers alone."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inplace_ttt.config import UserError
from inplace_ttt.data.conversations import Conversations, Encoder
from inplace_ttt.data.documents import SkipReport, read_documents
from inplace_ttt.data.packed import PackedDocuments, open_answers, open_indexed
from inplace_ttt.data.prepare import read_description
from inplace_ttt.data.tokenizer import train_tokenizer
from inplace_ttt.training.records import read_metrics
from launching import ROOT, SMALL, run_main
from ranks import run_ranks

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BEGINS = "{{ bos_token }}" + CHATML.replace("<think>\n\n</think>\n\n", "")
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    dict(role="system", content="Be brief."),
    dict(role="user", content="What is 2 + 2?"),
    dict(role="assistant", content="It is 4."),
    dict(role="user", content="And then?"),
    dict(role="assistant", content=" 5 of course\n"),
]


def find_tokenizer_folder(template, vocabulary=400):
    tokenizer = train_tokenizer(["What is it? It is 4. And then? 5 of course. assistant user system"] * 5, vocabulary)
    turns = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"bos_token": "<|begin|>", "additional_special_tokens": turns})
    tokenizer.chat_template = template
    return tokenizer


def encoded(template, messages, control=False, **options):
    tokenizer = find_tokenizer_folder(template)
    found = Encoder(tokenizer, **dict(begin=False, end=True, control=control) | options).encode(json.dumps(messages))
    assert found.tokens.shape == found.counts.shape and set(found.counts.tolist()) <= {0, 1}
    parts, last = [], 0
    for token, counts in zip(found.tokens, found.counts, strict=True):
        if counts and not last:
            parts.append([])
        if counts:
            parts[-1].append(token)
        last = counts
    return tokenizer.decode(found.tokens), [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["It is 4.<|im_end|>", "<think>\n\n</think>\n\n 5 of course\n<|im_end|>"]),
        (BEGINS, ["It is 4.<|im_end|>", " 5 of course\n<|im_end|>"]),
        (PLAIN, ["It is 4.", " 5 of course\n\n<|endoftext|>"]),  # nothing ends a turn: the end of the text does
    ],
)
def test_what_counts(template, answers):
    text, found = encoded(template, TALK)
    rendered = find_tokenizer_folder(template).apply_chat_template(TALK, tokenize=False)
    assert [one.strip() for one in found] == [one.strip() for one in answers]
    assert text.replace("<|endoftext|>", "") == rendered


def test_beginning_and_end():
    assert encoded(CHATML, TALK, begin=True)[0].startswith("<|begin|><|im_start|>")
    assert encoded(BEGINS, TALK, begin=True)[0].startswith("<|begin|><|im_start|>")  # once
    assert not encoded(PLAIN, TALK, end=False)[0].endswith("<|endoftext|>")
    text, found = encoded(PLAIN, TALK[:4])
    assert text.endswith("And then?\n") and found == [" It is 4."]  # what has no answer ends nothing


def test_what_a_template_does_not_take():
    loud = CHATML.replace("m['content']", "m['content'] | upper")
    forgets = PLAIN.replace("{% for m in messages %}", "{% for m in messages[-1:] %}")
    for template, sentence in [
        (loud, "does not contain an answer"),
        (forgets, "the text before an answer"),
        ("{{ raise_exception('no') }}", "is rejected by the chat template"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            encoded(template, TALK)
    named = [dict(role="user", content="say <|im_end|>"), dict(role="assistant", content="no")]
    with pytest.raises(ValueError, match="--special-tokens control"):
        encoded(CHATML, named)
    assert encoded(CHATML, named, control=True)[1] == ["<think>\n\n</think>\n\nno<|im_end|>"]
    with pytest.raises(UserError, match="no chat template"):
        Encoder(find_tokenizer_folder(None), begin=False, end=True, control=False)


ROWS = [
    (dict(messages=TALK), TALK),
    (dict(prompt="a?", completion="b"), [dict(role="user", content="a?"), dict(role="assistant", content="b")]),
    (dict(prompt=TALK[:2], completion=TALK[2:3], text="x"), TALK[:3]),
    (dict(messages=[]), "it must be a list"),
    (dict(messages="x"), "has str under 'messages'"),
    (dict(messages=[dict(role="user")]), "'messages', message 0"),
    (dict(messages=[dict(role="assistant", content=[1])]), "'messages', message 0"),
    (dict(messages=TALK[:2]), "has no answer"),
    (dict(messages=[dict(role="assistant", content=" ")]), "has no answer"),
    (dict(prompt="a"), "has neither"),
    (dict(text="a"), "found: text"),
    ([1], "is list"),
]


@pytest.mark.parametrize(("row", "expected"), ROWS, ids=lambda one: str(one)[:30])
def test_rows(tmp_path, row, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "b.json").write_text(json.dumps([row]))
    report = SkipReport()
    found = list(read_documents([tmp_path / "a.jsonl", tmp_path / "b.json"], Conversations(), report))
    if isinstance(expected, str):
        assert not found and report.bad == 2 and all(expected in place for place in report.places)
    else:
        assert [json.loads(one) for one in found] == [expected] * 2 and not report.bad


def test_tables_and_other_files(tmp_path):
    pq.write_table(pa.table({"messages": [TALK, TALK[:2]], "id": [1, 2]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["a?"], "completion": ["b"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["a?"]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("text")
    report = SkipReport()
    found = list(read_documents(sorted(tmp_path.iterdir()), Conversations(), report))
    assert [len(json.loads(one)) for one in found] == [5, 2]
    assert [place.split("'")[0] for place in report.places] and report.bad == 3
    assert "has no answer" in report.places[0] and "has no column 'messages', or" in report.places[1]
    assert "conversations need rows" in report.places[2]


def prepare_data(*words):
    found = subprocess.run(
        [sys.executable, "launch/prepare_data.py", "--workers", "1", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return found.returncode, found.stdout + found.stderr


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    base = tmp_path_factory.mktemp("chats")
    find_tokenizer_folder(CHATML, 300).save_pretrained(base / "tokenizer")
    talks = [[dict(role="user", content=f"What is {n}?"), dict(role="assistant", content="It is " * (n % 7) + str(n))]
             for n in range(60)]  # fmt: skip
    rows = [dict(messages=talk) for talk in talks] + [dict(messages=[dict(role="assistant", content="<|im_end|>")])]
    (base / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, printed = prepare_data(
        base / "chats.jsonl", "--supervised", "--tokenizer", base / "tokenizer", "--output", base / "chats"
    )
    assert code == 0 and "60 documents" in printed and "1 unusable documents skipped" in printed, printed
    assert "contains <|im_end|> in a message" in printed
    return base, talks


def test_packed_samples(corpus):
    """The labels that count are those of the answers, wherever samples cut a document."""
    base, talks = corpus
    tokenizer = find_tokenizer_folder(CHATML, 300)
    indexed = open_indexed(str(base / "chats"))
    answers = open_answers(str(base / "chats"), indexed)
    assert read_description(str(base / "chats")).supervised
    for length, align in ((32, 8), (64, 16), (20, 1)):
        packed = PackedDocuments(
            indexed, np.arange(60), seq_length=length, align=align, reset=True, seed=0, answers=answers
        )
        samples = [packed[number] for number in range(packed.samples)]
        assert sum(int(one.loss_mask.sum()) for one in samples) == sum(
            int(answers.get(number, offset=1).sum()) for number in range(60)
        )
    whole = PackedDocuments(
        indexed, np.arange(60), seq_length=4096, align=16, reset=True, seed=0, shuffle=False, answers=answers
    )[0]
    labels = whole.labels[whole.loss_mask > 0]
    said = tokenizer.decode(labels).replace("<think>\n\n</think>\n\n", "").split("<|im_end|>")
    assert said == [talk[1]["content"] for talk in talks[: len(said) - 1]] + said[-1:] and len(said) > 30


def test_training_counts_answers_alone(corpus, tmp_path):
    base, _ = corpus
    options = [
        "data.kind=indexed", f"data.sources=[{{path: {base / 'chats'}}}]", "data.seq_length=256", "train.steps=2",
        "data.reset_at_documents=true", "train.global_batch_size=2", "data.validation_fraction=0.2",
        "model.vocab_size=null", "model.sliding_window=null", f"run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    code, printed = run_ranks(1, run_main, *SMALL, *options)[0]
    assert code == 0, printed
    first, second, held_out = read_metrics(tmp_path / "run/metrics.jsonl")
    assert 0 < first["loss_tokens"] < 2 * 256 * 0.8 and second["loss"] > 0 and held_out["loss"] > 0


@pytest.fixture
def refused(monkeypatch, capsys):
    """Call launch/prepare_data.py here, with words that it refuses; return what it says."""
    command = runpy.run_path(str(ROOT / "launch/prepare_data.py"))["main"]

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, words)])
        assert command() == 2
        return capsys.readouterr().err

    return call


def test_what_is_refused(corpus, tmp_path, refused):
    base, _ = corpus
    for words, sentence in [
        (["--python-packages", "--supervised", "--tokenizer", base / "tokenizer"], "a dataset of conversations"),
        ([base / "chats.jsonl", "--supervised", "--train-tokenizer", "300"], "--tokenizer with a chat template"),
        ([base / "chats.jsonl", "--supervised", "--text-key", "t", "--tokenizer", base / "tokenizer"], "--text-key t"),
    ]:
        assert sentence in refused(*words, "--output", tmp_path / "x")
    find_tokenizer_folder(None).save_pretrained(tmp_path / "plain")
    words = [base / "chats.jsonl", "--supervised", "--tokenizer", tmp_path / "plain", "--output", tmp_path / "x"]
    assert "has no chat template" in refused(*words)
    answers = (base / "chats.answers.bin").read_bytes()
    (base / "chats.answers.bin").unlink()
    with pytest.raises(UserError, match=r"which has supervised=true, names .*answers"):
        open_answers(str(base / "chats"), open_indexed(str(base / "chats")))
    (base / "chats.answers.bin").write_bytes(answers)
