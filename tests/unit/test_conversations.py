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
from inplace_ttt.data.chat import Encoder
from inplace_ttt.data.conversations import Conversation, Conversations
from inplace_ttt.data.corpus import Corpus
from inplace_ttt.data.documents import SkipReport, read_documents
from inplace_ttt.data.packed import PackedDocuments, open_answers, open_indexed
from inplace_ttt.data.prepare import Options, prepare, read_description
from inplace_ttt.hf.tokenizer import train_tokenizer
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


def chat_tokenizer(template, vocabulary=400):
    tokenizer = train_tokenizer(["What is it? It is 4. And then? 5 of course. assistant user system"] * 5, vocabulary)
    turns = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"bos_token": "<|begin|>", "additional_special_tokens": turns})
    tokenizer.chat_template = template
    return tokenizer


def encoded(template, messages, control=False, first=0, tools=None, **options):
    tokenizer = chat_tokenizer(template)
    encoder = Encoder(tokenizer, **dict(begin=False, end=True, control=control) | options)
    found = encoder.encode(Conversation(messages, first, tools))
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
    rendered = chat_tokenizer(template).apply_chat_template(TALK, tokenize=False)
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
    stripped = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    for template, talk, sentence in [
        (loud, TALK, r"message 0 \(system\) is changed in the rendered text"),
        (loud, [USER, dict(role="assistant", content="yes")], r"message 0 \(user\) is changed in the rendered text"),
        (forgets, TALK, r"message 0 \(system\) is changed in the rendered text"),
        (
            stripped,
            [USER, dict(role="assistant", content="a</think>b")],
            r"message 1 \(assistant\) is changed in the rendered text",
        ),
        (IGNORES, [dict(role="human", content="a?"), TALK[2]], r"message 0 \(human\) is changed in the rendered text"),
        (
            CHATML,
            [USER, CALL, dict(role="tool", content="7"), TALK[2]],
            r"message 1 \(assistant\) is changed in the rendered text",
        ),
        ("{{ raise_exception('no') }}", TALK, "is not accepted by the chat template"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            encoded(template, talk)
    with pytest.raises(UserError, match="no chat template"):
        Encoder(chat_tokenizer(None), begin=False, end=True, control=False)


USER = dict(role="user", content="What is it?")
CALL = dict(
    role="assistant", content="", tool_calls=[dict(type="function", function=dict(name="f", arguments={"x": 1}))]
)
IGNORES = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] in ('user', 'assistant') %}")
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['reasoning_content'] %}<think>\n{{ m['reasoning_content'] }}\n</think>\n\n{% endif %}{{ m['content'] }}"
    "{% for call in m['tool_calls'] %}<tool_call>{{ call['function']['name'] }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_PROMPT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# the system's text where there is none, and an end of the text that begins as the header of a turn does
SYSTEM = (
    "{% if not messages or messages[0]['role'] != 'system' %}<|im_start|>system\nYou are it.<|im_end|>\n{% endif %}"
    + NO_PROMPT
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|begin|>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "talk", "answers"),
    [
        (CHATML, [USER, dict(role="assistant", content="n")], ["<think>\n\n</think>\n\nn<|im_end|>"]),
        (CHATML, [USER, dict(role="assistant", content="think"), USER], ["think<|im_end|>"]),
        (CALLS, [USER, CALL, dict(role="tool", content="7"), TALK[2]],
         ["<tool_call>f</tool_call><|im_end|>", "It is 4.<|im_end|>"]),
        (CALLS, [USER, dict(role="assistant", content="42", reasoning_content="it is 42, so 42")],
         ["<think>\nit is 42, so 42\n</think>\n\n42<|im_end|>"]),
        (NO_PROMPT, [USER, TALK[2], USER, dict(role="assistant", content="n")], ["It is 4.<|im_end|>", "n<|im_end|>"]),
        (SYSTEM, [dict(role="assistant", content="You are")], ["You are<|im_end|>\n<|begin|>"]),
        (SYSTEM, [USER, TALK[2], USER, TALK[2], USER], ["It is 4.<|im_end|>"] * 2),
        (CHATML, [USER, dict(role="assistant", content=" "), USER, TALK[2]],
         ["<think>\n\n</think>\n\nIt is 4.<|im_end|>"]),
        (NO_PROMPT, [TALK[2], TALK[2]], ["It is 4.<|im_end|>"] * 2),
    ],
)  # fmt: skip
def test_turns(template, talk, answers):
    """Answers that are found in what the template writes, reasoning, calls of tools, empty answers, no user's turn."""
    assert encoded(template, talk)[1] == answers


def test_a_prompt_does_not_count():
    assert encoded(BEGINS, TALK, first=3)[1] == [" 5 of course\n<|im_end|>"]


@pytest.mark.parametrize(
    "message",
    [
        dict(role="user", content="say <|im_end|>"),
        dict(role="user<|im_end|>", content="a"),
        dict(role="user", content="a", reasoning_content="<|im_start|>"),
        dict(role="user", content="a", tool_calls=[dict(function=dict(name="f", arguments={"x": ["<|im_end|>"]}))]),
    ],
)
def test_names_of_control_tokens_in_any_field(message):
    talk = [message, dict(role="assistant", content="no")]
    with pytest.raises(ValueError, match=r"in message 0: --special-tokens control"):
        encoded(CHATML, talk)
    assert encoded(CHATML, talk, control=True)[1] == ["<think>\n\n</think>\n\nno<|im_end|>"]


def test_control_tokens_that_are_not_special():
    tokenizer = train_tokenizer(["What is it? It is 4. assistant user"] * 5, 300)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<tool>"])
    tokenizer.chat_template = NO_PROMPT
    encoder = Encoder(tokenizer, begin=False, end=True, control=False)
    with pytest.raises(ValueError, match=r"has <\|im_end\|> in message 0"):
        encoder.encode(Conversation([dict(role="user", content="<|im_end|>"), TALK[2]]))
    found = encoder.encode(Conversation([dict(role="user", content="<tool>"), TALK[2], USER, TALK[2]]))
    assert tokenizer.decode(found.tokens[found.counts > 0]) == "It is 4.<|im_end|>" * 2


ROWS = [
    (dict(messages=TALK), TALK),
    (dict(prompt="a?", completion="b"), [dict(role="user", content="a?"), dict(role="assistant", content="b")]),
    (dict(prompt=TALK[:2], completion=TALK[2:3], text="x"), TALK[:3]),
    (dict(messages=[]), "has an empty list under 'messages'"),
    (dict(messages="x"), "has str under 'messages'"),
    (dict(messages=[dict(role="user")]), "a message 0 under 'messages' without the text 'content'"),
    (dict(messages=[dict(content="a")]), "a message 0 under 'messages' without the text 'role'"),
    (dict(messages=[dict(role="assistant", content=[1])]), "a message 0 under 'messages' without"),
    (dict(messages=[USER, CALL | dict(content=None)]), [USER, CALL]),
    (
        dict(messages=[USER, dict(role="assistant", content=[dict(type="text", text="b")])]),
        [USER, dict(role="assistant", content="b")],
    ),
    (dict(messages=TALK, tools="f"), "has 'tools' that are not a list"),
    (dict(messages=TALK[:2]), "has no answer"),
    (dict(messages=[dict(role="assistant", content=" ")]), "has no answer"),
    (dict(prompt="a"), "has neither"),
    (dict(text="a"), "it has: text"),
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
        assert [Conversation.from_json(one).messages for one in found] == [expected] * 2 and not report.bad
        assert [Conversation.from_json(one).first for one in found] == [
            len(row.get("prompt", ""))
        ] * 2 or "x" not in row


def test_tables_and_other_files(tmp_path):
    pq.write_table(pa.table({"messages": [TALK, TALK[:2]], "id": [1, 2]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["a?"], "completion": ["b"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["a?"]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("text")
    report = SkipReport()
    found = list(read_documents(sorted(tmp_path.iterdir()), Conversations(), report))
    assert [len(Conversation.from_json(one).messages) for one in found] == [5, 2]
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
    chat_tokenizer(CHATML, 300).save_pretrained(base / "tokenizer")
    talks = [[dict(role="user", content=f"What is {n}?"), dict(role="assistant", content="It is " * (n % 7) + str(n))]
             for n in range(60)]  # fmt: skip
    rows = [dict(messages=talk) for talk in talks] + [dict(messages=[dict(role="assistant", content="<|im_end|>")])]
    (base / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, printed = prepare_data(
        base / "chats.jsonl", "--supervised", "--tokenizer", base / "tokenizer", "--output", base / "chats"
    )
    assert code == 0 and "60 documents" in printed and "1 unusable document skipped" in printed, printed
    assert "has <|im_end|> in message 0" in printed and "chats.jsonl" in printed
    return base, talks


def test_packed_samples(corpus):
    """The labels that count are those of the answers, wherever samples cut a document."""
    base, talks = corpus
    tokenizer = chat_tokenizer(CHATML, 300)
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
    chat_tokenizer(None).save_pretrained(tmp_path / "plain")
    words = [base / "chats.jsonl", "--supervised", "--tokenizer", tmp_path / "plain", "--output", tmp_path / "x"]
    assert "has no chat template" in refused(*words)
    answers = (base / "chats.answers.bin").read_bytes()
    (base / "chats.answers.bin").unlink()
    with pytest.raises(UserError, match=r"which has supervised=true, names .*answers"):
        open_answers(str(base / "chats"), open_indexed(str(base / "chats")))
    (base / "chats.answers.bin").write_bytes(answers)


def test_a_corpus_without_its_description(corpus, tmp_path):
    """Its loss mask is found all the same."""
    base, _ = corpus
    for ending in ("bin", "idx", "answers.bin", "answers.idx"):
        (tmp_path / f"copy.{ending}").write_bytes((base / f"chats.{ending}").read_bytes())
    assert Corpus.open(str(tmp_path / "copy")).answers is not None
    for ending in ("answers.bin", "answers.idx"):
        (tmp_path / f"copy.{ending}").unlink()
    assert Corpus.open(str(tmp_path / "copy")).answers is None


@pytest.mark.slow
def test_parts_of_another_template_are_made_again(tmp_path, monkeypatch):
    """A stopped preparation does not mix templates."""
    monkeypatch.setattr("inplace_ttt.data.prepare.PART_BYTES", 1000)
    tokenizer, rows = chat_tokenizer(NO_PROMPT, 300), [Conversation(TALK[:3]).to_json()]
    made = dict(settings={}, workers=1, progress=lambda *_: None)

    def stopped():
        yield from rows
        raise KeyboardInterrupt

    def tokens(prefix):
        indexed = open_indexed(str(tmp_path / prefix))
        return np.concatenate([indexed[number] for number in range(len(indexed))]).tolist()

    options = Options(supervised=True)
    rows = rows * 40  # in many parts
    with pytest.raises(KeyboardInterrupt):
        prepare(stopped(), tokenizer, str(tmp_path / "a"), options=options, **made)
    assert list((tmp_path / "a.parts").glob("0*"))
    tokenizer.chat_template = CHATML
    for prefix in ("a", "b"):
        prepare(rows, tokenizer, str(tmp_path / prefix), options=options, **made)
    assert tokens("a") == tokens("b")


def test_steps_and_evaluations_without_answers(corpus, tmp_path):
    """They are named, not shown as perfect."""
    base, _ = corpus
    talk = [dict(role="user", content="What is it? " * 300), dict(role="assistant", content="4")]
    (tmp_path / "long.jsonl").write_text("\n".join([json.dumps(dict(messages=talk))] * 2))
    words = [tmp_path / "long.jsonl", "--supervised", "--tokenizer", base / "tokenizer", "--output", tmp_path / "long"]
    assert prepare_data(*words)[0] == 0
    options = [
        "data.kind=indexed", f"data.sources=[{{path: {tmp_path / 'long'}}}]", "data.seq_length=64", "train.steps=1",
        f"data.validation=[{{path: {tmp_path / 'long'}}}]", "train.global_batch_size=2", "train.eval_samples=1",
        "data.reset_at_documents=true", "model.vocab_size=null", "model.sliding_window=null", f"run.dir={tmp_path}/run",
    ]  # fmt: skip
    code, printed = run_ranks(1, run_main, *SMALL, *options)[0]
    assert code == 0 and "no token of its samples counts in the loss" in printed, printed
    assert "no held-out loss: none of the held-out tokens counts" in printed
    assert "has the same content as one of data.sources" in printed
