"""RULER's samples against the table of its tasks: templates, counts, depths, lengths; and its metric."""

import itertools
import math
import random
import re
import time
from collections import Counter
from random import Random

import pytest

from inplace_ttt.config import UserError
from inplace_ttt.evaluation.ruler import TASKS, make_tasks, prompts
from inplace_ttt.evaluation.ruler.fit import Fitter
from inplace_ttt.evaluation.ruler.metric import score
from inplace_ttt.evaluation.ruler.needles import DEPTHS, NOISE
from inplace_ttt.evaluation.ruler.prompts import Rendering
from inplace_ttt.evaluation.ruler.sources import Sources
from inplace_ttt.evaluation.ruler.task import Draft
from inplace_ttt.hf.tokenizer import train_tokenizer
from ruler_data import write_ruler_data

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORD = r"[^\s:]+-[^\s:]+"
NUMBER = r"[1-9][0-9]{6}"


def count_tokens(text: str) -> int:
    """As many as a tokenizer of words and signs finds."""
    return len(re.findall(r"\w{1,5}|[^\w\s]", text))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ruler_data(tmp_path_factory.mktemp("ruler"))


@pytest.fixture(scope="module")
def tasks(folder):
    return make_tasks(Sources(folder), count_tokens, seed=42)


def drafts(tasks, name, size, count=20, length=8192):
    return [tasks[name].draft(Random(f"{name} {n}"), size, n, length) for n in range(count)]


def test_there_are_thirteen(tasks):
    assert tuple(tasks) == TASKS and len(TASKS) == 13
    assert {name: task.new_tokens for name, task in tasks.items() if "niah" not in name} == dict(
        vt=30, cwe=120, fwe=50, qa_1=32, qa_2=32
    )


@pytest.mark.parametrize(
    ("name", "haystack", "key", "value", "needles", "answers"),
    [
        ("niah_single_1", "noise", WORD, NUMBER, 1, 1),
        ("niah_single_2", "essay", WORD, NUMBER, 1, 1),
        ("niah_single_3", "essay", WORD, UUID, 1, 1),
        ("niah_multikey_1", "essay", WORD, NUMBER, 4, 1),
        ("niah_multikey_2", "needle", WORD, NUMBER, 31, 1),
        ("niah_multikey_3", "needle", UUID, UUID, 31, 1),
        ("niah_multivalue", "essay", WORD, NUMBER, 4, 4),
        ("niah_multiquery", "essay", WORD, NUMBER, 4, 4),
    ],
)
def test_needles(tasks, name, haystack, key, value, needles, answers):
    size = 500 if haystack == "essay" else 30
    kinds = "uuids" if value == UUID else "numbers"
    kind = kinds if answers > 1 else kinds[:-1]
    for draft in drafts(tasks, name, size):
        assert tasks[name].new_tokens == 128 and not tasks[name].any_answer
        found = re.findall(rf"One of the special magic {kinds} for ({key}) is: ({value})\.", draft.prompt)
        assert len(found) == needles and len(draft.answers) == answers
        if answers == 1:
            head = f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
            tail = rf"\nWhat is the special magic {kind} for (.*) mentioned in the provided text\?"
        else:
            head = f"Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
            tail = rf"\nWhat are all the special magic {kind} for (.*) mentioned in the provided text\?"
        head += f"I will quiz you about the {kind} afterwards.\n"
        assert draft.prompt.startswith(head)
        (asked,) = re.findall(tail + "$", draft.prompt)
        are = "is" if answers == 1 else "are"
        assert draft.answer_prefix == f" The special magic {kind} for {asked} mentioned in the provided text {are}"
        names = re.split(", and |, ", asked)
        assert len(names) == (4 if name == "niah_multiquery" else 1)
        assert Counter(draft.answers) == Counter(v for k, v in found if k in names)
        context = draft.prompt.removeprefix(head).rsplit("\nWhat ", 1)[0]
        lines = context.split("\n")
        if haystack == "noise":
            assert len(lines) == 31 and lines.count(NOISE) == 30
        if haystack == "needle":
            assert len(lines) == 31
        if haystack == "essay":
            rest = re.sub(rf"One of the special magic {kinds} for {key} is: {value}\.", "", context)
            assert rest.split() == tasks[name].sources.essay_words[:500]


def test_essay_needles_lie_between_sentences_at_forty_depths(tasks):
    seen = Counter()
    sentences = tasks["niah_single_2"].sources.essay_sentences(4000)
    for draft in drafts(tasks, "niah_single_2", 4000, count=400):
        before = draft.prompt.split("afterwards.\n", 1)[1].split("One of the special", 1)[0].strip()
        place = next(n for n in range(len(sentences) + 1) if " ".join(sentences[:n]) == before)
        seen[place] += 1
    assert set(seen) <= {len(sentences) * depth // 100 for depth in DEPTHS}
    assert len(DEPTHS) == 40 and (DEPTHS[0], DEPTHS[-1]) == (0, 100)
    # 400 draws of 40 depths: a chi-square beyond 80 has a probability of 1e-4
    assert len(seen) >= 39 and sum((seen[n] - 10) ** 2 / 10 for n in seen) < 80


def test_essays_repeat_when_they_are_too_short(folder):
    sources = Sources(folder)
    words = len(sources.essay_words)
    sentences = sources.essay_sentences(2 * words + 7)
    assert " ".join(sentences).split() == (sources.essay_words * 3)[: 2 * words + 7]
    assert len(sources.essay_sentences(words)) == 700  # Mr. ends no sentence


def test_variable_tracking(tasks):
    head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    for draft in drafts(tasks, "vt", 50):
        example, problem = draft.prompt.split("\n\n" + head)
        assert example.startswith(head) and count_tokens(example) <= 500 + 10
        value = re.search(r"assigned the value (\d{5}) in the text above\.$", problem)[1]
        context = problem.rsplit("\nQuestion: ", 1)[0].split("\n")
        chain = [line for line in context if line.startswith("VAR ")]
        names = list(draft.answers)
        assert chain == [f"VAR {names[0]} = {value}"] + [
            f"VAR {after} = VAR {before} " for before, after in itertools.pairwise(names)
        ]
        assert len(names) == len(set(names)) == 5 and all(re.fullmatch("[A-Z]{5}", name) for name in names)
        assert context.count(NOISE) == 50 and len(context) == 55
        assert draft.answer_prefix == (
            " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
            f"value {value}, they are: "
        )
        solved = re.search(r"5 variables are assigned the value (\d{5}), they are:  ((?:[A-Z]{3} ?){5})$", example)
        assert solved and example.count(f"VAR {solved[2].split()[0]} = {solved[1]}") == 1
    assert len({draft.prompt.split("they are:", 1)[1][:20] for draft in drafts(tasks, "vt", 50)}) == 20  # new names


@pytest.mark.parametrize(
    ("length", "example", "often", "seldom"), [(8192, (40, 10, 3), 30, 3), (2048, (20, 3, 1), 6, 1)]
)
def test_common_words(tasks, length, example, often, seldom):
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    tail = "\nQuestion: What are the 10 most common words in the above list?"
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    for draft in drafts(tasks, "cwe", 60, length=length):
        _, solved, problem = draft.prompt.split(head)
        assert problem.endswith(tail) and draft.answer_prefix == prefix
        words, answer = solved.removesuffix("\n").split(tail + prefix + " ")
        for text, (size, many, few), common in (
            (words, example, re.split(r"\s?\d+\. ", answer)[1:]),
            (problem.removesuffix(tail), (60, often, seldom), draft.answers),
        ):
            numbered = re.findall(r"(\d+)\. (.*?)(?= \d+\. |$)", text)
            assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
            counts = Counter(word for _, word in numbered)
            assert len(counts) == size and len(common) == 10
            assert all(counts.pop(word) == many for word in common) and set(counts.values()) == {few}


def test_frequent_words(tasks):
    for draft in drafts(tasks, "fwe", 3000):
        text = draft.prompt.split("appeared coded words. ", 1)[1].rsplit("\nQuestion: ", 1)[0]
        counts = Counter(text.split(" "))
        ranks = [int(3000 * k**-2 / (math.pi**2 / 6)) for k in range(1, 163)]
        assert sorted(counts.values(), reverse=True) == [count for count in ranks if count]
        assert counts["..."] == ranks[0]
        assert [counts[word] for word in draft.answers] == ranks[1:4]
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")
        assert draft.prompt.endswith(
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?"
        )


@pytest.mark.parametrize(("name", "own"), [("qa_1", 1), ("qa_2", 10)])
def test_question_answering(tasks, name, own):
    only = "Only give me the answer and do not output any other words."
    places = set()
    for number, draft in enumerate(drafts(tasks, name, 25, count=30)):
        questions, documents = getattr(tasks[name].sources, tasks[name].data)
        question = questions[number]
        assert draft.answers == question.answers and draft.answer_prefix == " Answer:" and tasks[name].any_answer
        head = f"Answer the question based on the given documents. {only}\n\nThe following are given documents.\n\n"
        tail = f"\n\nAnswer the question based on the given documents. {only}\n\nQuestion: {question.text}"
        context = draft.prompt.removeprefix(head).removesuffix(tail)
        assert head + context + tail == draft.prompt
        parts = re.split(r"(?:^|\n\n)Document (\d+):\n", context)[1:]
        assert [int(one) for one in parts[::2]] == list(range(1, 26))
        texts = parts[1::2]
        assert len(set(texts)) == 25 and set(texts) <= set(documents)
        assert len(question.documents) == own and {documents[n] for n in question.documents} <= set(texts)
        places.add(texts.index(documents[question.documents[0]]))
    assert len(places) > 10  # shuffled
    if name == "qa_1":
        assert all("not there" not in question.text for question in questions)


@pytest.mark.parametrize("length", [2500, 4096, 16384])
def test_samples_fit_and_fill(tasks, length):
    for name, task in tasks.items():
        fitter = Fitter(task, length, 7, lambda draft: draft.prompt + draft.answer_prefix, count_tokens)
        samples = list(fitter.samples(4))
        for sample in samples:
            assert sample.tokens == count_tokens(sample.prompt)
            assert sample.tokens + sample.new_tokens <= length
            if length >= 16384:
                assert sample.tokens + sample.new_tokens >= 0.97 * length, name
        assert len({sample.digest for sample in samples}) == 4
        again = Fitter(task, length, 7, lambda draft: draft.prompt + draft.answer_prefix, count_tokens)
        assert again.sample(3) == samples[3]  # whatever came before it


def test_a_length_that_holds_no_sample_is_named(tasks):
    with pytest.raises(UserError, match=r"--lengths 200 is too short for cwe: its sample 0 needs \d+ tokens"):
        Fitter(tasks["cwe"], 200, 7, lambda draft: draft.prompt, count_tokens)


def test_a_tokenizer_that_makes_no_tokens_ends(tasks):
    with pytest.raises(UserError, match=r"produces 0 tokens for .* words or lines"):
        Fitter(tasks["vt"], 4096, 42, lambda draft: draft.prompt, lambda text: 0)


def test_chat_templates_are_tried_first(monkeypatch):
    """With a short question and with a long one."""
    tokenizer = train_tokenizer(["some words " * 50], 300)
    with pytest.raises(UserError, match="has no chat template"):
        Rendering(tokenizer, "chat", 4096)
    tokenizer.chat_template = "{% for one in messages %}<u>{{ one.content }}</u>{% endfor %}<a>"
    rendering = Rendering(tokenizer, "chat", 4096)
    assert rendering.render(Draft("What?", " It is", ())) == "<u>What?</u><a> It is"
    for template, message in [
        ("{{ messages.nothing.there }}", "the tokenizer's chat template fails"),
        ("hello", "drops the question"),
        ("{{ messages[0].content[:100] }}", "drops the question"),
        ("{{ messages[0].content }}\ud800", "produces invalid Unicode"),
    ]:
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=message):
            Rendering(tokenizer, "chat", 4096)
    monkeypatch.setattr(prompts, "RENDER_TIMEOUT", 0.3)
    for slow_from in (0, 100):
        monkeypatch.setattr(
            Rendering, "render", lambda self, draft, n=slow_from: time.sleep(len(draft.prompt) > n) or draft.prompt
        )
        with pytest.raises(UserError, match="returns no prompt within 0 s"):
            Rendering(tokenizer, "chat", 4096)


def test_long_samples_are_full():
    """From 16k tokens on, also where the parts of a haystack are long ones of unlike length."""
    rng = random.Random(0)
    lengths = [rng.randint(20, 900) for _ in range(400)]

    class Task:
        name, new_tokens, any_answer = "qa_1", 32, True

        def step(self, length):
            return 10

        def draft(self, rng, size, index, length):
            return Draft(" ".join("x" * lengths[n] for n in rng.sample(range(400), size)), "", ("a",))

    fitter = Fitter(Task(), 16384, 42, lambda draft: draft.prompt, lambda text: len(text))
    for index in range(60):
        found = fitter.sample(index)
        assert 0.97 * 16384 <= found.tokens + 32 <= 16384 and found == fitter.sample(index)


def test_short_samples_have_fewer_parts_than_a_step():
    class Task:
        name, new_tokens, any_answer = "qa_1", 32, True

        def step(self, length):
            return 10

        def draft(self, rng, size, index, length):
            return Draft("x" * (size * (450 if index else 100)), "", ("a",))

    fitter = Fitter(Task(), 4096, 42, lambda draft: draft.prompt, lambda text: len(text))
    assert fitter.sample(0).tokens > 3900 and fitter.sample(1).tokens == 9 * 450


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"has no squad\.json.*--ruler-data"):
        _ = Sources(tmp_path).squad
    (tmp_path / "squad.json").write_text('{"data": [{}]}')
    with pytest.raises(UserError, match="is not SQuAD"):
        _ = Sources(tmp_path).squad
    (tmp_path / "hotpotqa.json").write_text("[1,")
    with pytest.raises(UserError, match="is damaged"):
        _ = Sources(tmp_path).hotpotqa
    (tmp_path / "english_words.json").write_text('{"1": "one", "2": "two"}')
    with pytest.raises(UserError, match="has 2 words, but 100000 are needed"):
        Sources(tmp_path).words(100_000)


@pytest.mark.parametrize(
    ("written", "answers", "any_answer", "expected"),
    [
        ("It is 1234567.", ["1234567"], False, 1.0),
        ("It is 123456.", ["1234567"], False, 0.0),
        ("1. APPLE 2. pear", ["apple", "Pear", "plum", "fig"], False, 0.5),
        ("In france, I think", ["France", "the French Republic"], True, 1.0),
        ("In Spain", ["France", "the French Republic"], True, 0.0),
        ("", ["France"], True, 0.0),
    ],
)
def test_metric(written, answers, any_answer, expected):
    assert score(written, answers, any_answer) == expected
