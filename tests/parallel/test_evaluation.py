"""launch/evaluate.py and compare.py: every task on small models, on several ranks, stopped, killed, asked wrongly."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from inplace_ttt.config import UserError
from inplace_ttt.data.prepare import prepare
from inplace_ttt.evaluation import answering_task
from inplace_ttt.evaluation.compare import compare
from inplace_ttt.evaluation.ruler import TASKS
from inplace_ttt.hf.convert import export_checkpoint, import_checkpoint
from inplace_ttt.hf.tokenizer import train_tokenizer
from launching import ROOT, kill_all, run_evaluate, run_main, torchrun, workers
from ranks import run_ranks
from ruler_data import write_ruler_data

CHUNK, LENGTH = 16, 256
TRAIN = [
    "recipe=tiny_ttt", "log.wandb=disabled", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.kv_channels=8", "ttt.layers=all",
    f"ttt.chunk_size={CHUNK}", "ttt.eta=0.3", "ttt.proj_init_std=0.5", f"data.seq_length={LENGTH}", "train.steps=3",
    "train.global_batch_size=2", "train.eval_samples=2", "data.validation_fraction=0.4", "optim.lr=1e-2",
    "ttt.lr_multiplier=30", "ttt.max_update_ratio=null", "parallel.context_parallel_size=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """A run on a small corpus of words, its export, RULER's stand-in data, and files of text."""
    base = tmp_path_factory.mktemp("world")
    (base / "ruler").mkdir()
    data = write_ruler_data(base / "ruler")
    essays = json.loads((data / "PaulGrahamEssays.json").read_text())["text"]
    tokenizer = train_tokenizer([essays, (data / "squad.json").read_text()[:20000]], 700)
    rng = random.Random(0)
    words = essays.split()
    texts = [" ".join(rng.choices(words, k=rng.choice([80, 400, 600]))) for _ in range(40)]
    prepare(texts, tokenizer, str(base / "corpus"), settings={}, workers=1, progress=lambda *_: None)
    ((code, printed),) = run_ranks(
        1, run_main, *TRAIN, f"data.sources=[{{path: {base / 'corpus'}}}]", f"run.dir={base / 'run'}"
    )
    assert code == 0, printed
    export_checkpoint(base / "run", base / "exported")
    (base / "text").mkdir()
    for number, text in enumerate(texts[:6]):
        (base / f"text/{number}.txt").write_text(text)
    return {name: base / name for name in ("run", "exported", "ruler", "text", "corpus", "kept")}


@pytest.fixture(scope="module")
def measure(world, tmp_path_factory):
    """Run a task once on some ranks; return its folder."""
    known = {}

    def run(ranks: int, *arguments: str) -> Path:
        if (ranks, arguments) not in known:
            output = tmp_path_factory.mktemp("results") / "out"
            for code, printed in run_ranks(ranks, run_evaluate, *arguments, "--output", str(output)):
                assert code == 0, printed
            known[ranks, arguments] = output
        return known[ranks, arguments]

    return run


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict:
    return {
        (one["model"].replace("exported", "run"), one["index"]): [part["loss"] for part in one["ranges"]]
        for one in samples(folder)
    }


def close(a: dict, b: dict, bound=1e-5) -> bool:
    assert a.keys() == b.keys() and a
    return all(abs(x - y) <= bound for key in a for x, y in zip(a[key], b[key], strict=True))


def position(world, model: str, *more: str) -> list[str]:
    return ["position", str(world[model]), "--samples", "5", "--fast-weights", "on,off,clip=0.05", *more]


@pytest.mark.parametrize(("ranks", "layout"), [(2, "context"), (4, "context"), (2, "pipeline_model"), (2, "data")])
def test_position_in_every_layout(world, measure, ranks, layout):
    keys = [] if layout == "data" else [f"parallel.{layout}_parallel_size={ranks}"]
    assert close(losses(measure(ranks, *position(world, "run", *keys))), losses(measure(1, *position(world, "run"))))


@pytest.mark.parametrize("ranks", [1, 2])
def test_position_of_checkpoint_and_export(world, measure, ranks):
    names = ["--documents", str(world["corpus"]), "--length", "200"]
    exported = losses(measure(ranks, *position(world, "exported", *names)))
    assert close(exported, losses(measure(1, *position(world, "run", *names))))
    labels = ("run", "run (fast weights off)", "run (clip=0.05)")
    on, off, clipped = ([exported[label, n] for n in range(5)] for label in labels)
    assert on != off and clipped != on and clipped != off
    # the first chunk of a document has nothing to remember
    assert [one[0] for one in on] == pytest.approx([one[0] for one in off], abs=0.2)


def test_bounded_past_the_trained_length(world, measure, tmp_path_factory):
    """By one rank, by two that share the columns, and by ranks that share the text: a checkpoint is its export."""
    base = tmp_path_factory.mktemp("bounded")
    export_checkpoint(world["run"], base / "exported", bound="0.5")
    config = json.loads((base / "exported/config.json").read_text())
    assert config["ttt_trained_length"] == LENGTH
    config["ttt_trained_length"] = 2 * CHUNK
    (base / "exported/config.json").write_text(json.dumps(config))
    import_checkpoint(base / "exported", base / "run")
    more = ["--documents", str(world["corpus"]), "--length", "200", "--samples", "5", "--fast-weights"]

    def losses_of(ranks, name, modes, *keys):
        return losses(measure(ranks, "position", str(base / name), *more, modes, *keys))

    both = losses_of(1, "exported", "on,clip=none")
    assert close(both, losses_of(1, "run", "on,clip=none"))
    assert close(both, losses_of(2, "run", "on,clip=none", "parallel.tensor_model_parallel_size=2"))
    bounded, free = ([both[label, n] for n in range(5)] for label in ("run", "run (clip=none)"))
    assert bounded != free
    assert close(both, losses_of(2, "run", "on,clip=none", "parallel.context_parallel_size=2"))
    keys = ["parallel.context_parallel_size=2", "parallel.tensor_model_parallel_size=2"]
    assert close(both, losses_of(4, "run", "on,clip=none", *keys))


def test_position_by_hand(world, measure):
    """Compare with transformers' own logits of the exported model."""
    from inplace_ttt.evaluation.mode import FastWeightMode
    from inplace_ttt.evaluation.models import open_model

    folder = measure(
        1, "position", str(world["exported"]), "--documents", str(world["text"]), "--length", "100", "--ranges",
        "10,50,100", "--min-length", "60",
    )  # fmt: skip
    model = open_model(world["exported"], "m", FastWeightMode(), torch.device("cpu"), torch.float32)
    texts = [path.read_text() for path in sorted(world["text"].glob("*.txt"))]
    for one in samples(folder):
        ids = torch.tensor(model.tokenizer(texts[one["index"]])["input_ids"][:101])
        with torch.no_grad():
            logits = model.network(ids[None, :-1]).logits[0]
        found = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        expected = [found[10:50].mean().item(), found[50:100].mean().item()]
        assert [part["loss"] for part in one["ranges"]] == pytest.approx(expected, abs=1e-5)
        assert [part["tokens"] for part in one["ranges"]] == [40, len(ids) - 51]


def test_final_block(world, measure):
    """A block has the same tokens after every context; after the longest, what a whole reading gives."""
    common = ["final-block", "--samples", "4", "--contexts", "16,64,128", "--block", "32"]
    corpus = ["--documents", str(world["corpus"])]
    run, exported = (measure(1, *common, str(world[name]), *corpus) for name in ("run", "exported"))
    assert close(losses(run), losses(exported))
    records = samples(run)
    assert [one["context"] for one in records] == [16] * 4 + [64] * 4 + [128] * 4
    assert all(part["tokens"] == 32 for one in records for part in one["ranges"])
    whole = measure(
        1, "position", str(world["run"]), "--documents", str(world["corpus"]), "--samples", "4", "--length", "160",
        "--ranges", "0,128,160",
    )  # fmt: skip
    last = {("run", n + 8): [one[1]] for (_, n), one in losses(whole).items()}
    assert close(last, {key: value for key, value in losses(run).items() if key[1] >= 8})


def test_recall_runs_have_held_out_samples_too(measure, tmp_path_factory):
    from launching import SMALL

    run = tmp_path_factory.mktemp("recall") / "run"
    ((code, printed),) = run_ranks(1, run_main, *SMALL, "train.steps=2", f"run.dir={run}")
    assert code == 0, printed
    folder = measure(1, "position", str(run), "--samples", "3", "--fast-weights", "on,off")
    # questions begin in the second half
    assert {part["from"] for one in samples(folder) for part in one["ranges"]} == {128, 160, 192, 224}


def ruler(world, *more: str, model: str = "exported") -> list[str]:
    return [
        "ruler", str(world[model]), "--lengths", "3k", "--samples", "2", "--ruler-data", str(world["ruler"]),
        "--kept", str(world["kept"]), "--workers", "2", *more,
    ]  # fmt: skip


def test_ruler_from_end_to_end(world, measure):
    one, two = measure(1, *ruler(world)), measure(2, *ruler(world, model="run"))
    found = samples(one)
    assert len(found) == 26 and {sample["kind"] for sample in found} == set(TASKS)
    assert all(sample["prompt_tokens"] <= 3072 and 0 <= sample["score"] <= 1 for sample in found)
    answers = [{(s["task"], s["index"]): (s["sample"], s["answer"]) for s in samples(folder)} for folder in (one, two)]
    assert answers[0] == answers[1] and len(answers[0]) == 26
    results = json.loads((one / "results.json").read_text())
    assert [row["task"] for row in results["scores"]] == [*TASKS, "mean"]
    assert results["scores"][-1]["samples"] == 26
    for name in ("ruler.png", "ruler_tasks.png"):
        assert (one / name).stat().st_size > 10_000


@pytest.mark.parametrize(("kind", "expected"), [("right", 100.0), ("wrong", 0.0), ("half", 50.0)])
def test_scripted_models(world, tmp_path, monkeypatch, kind, expected):
    known = {}
    make = answering_task.samples_of

    def samples_of(*args, **kwargs):
        found = make(*args, **kwargs)
        known.update({sample.prompt: sample for made in found.values() for sample in made})
        return found

    def answer(model, batch, speed):
        texts = []
        for prompt in batch:
            sample = known[model.tokenizer.decode(list(prompt.tokens))]
            right = " and ".join(sample.answers).upper()
            texts.append(right if kind == "right" or (kind == "half" and sample.index % 2) else "nothing")
        return texts

    monkeypatch.setattr(answering_task, "samples_of", samples_of)
    monkeypatch.setattr(answering_task, "answer", answer)
    code, printed = run_evaluate(*ruler(world, "--output", str(tmp_path / "out"), "--workers", "1"))
    assert code == 0, printed
    scores = json.loads((tmp_path / "out/results.json").read_text())["scores"]
    assert {row["mean"] for row in scores} == {expected}
    assert {row["low"] for row in scores} == {None}  # of two samples there is no interval


def needle(world, *more: str) -> list[str]:
    return [
        "needle", str(world["exported"]), "--lengths", "512,1k", "--depths", "0,50,100", "--samples", "2",
        "--ruler-data", str(world["ruler"]), "--kept", str(world["kept"]), "--workers", "1", *more,
    ]  # fmt: skip


def test_needle_lies_where_it_is_said(world, measure):
    folder = measure(1, *needle(world))
    assert len(samples(folder)) == 12 and (folder / "needle.png").stat().st_size > 5_000
    for path in world["kept"].glob("*/needle_essay_*_1024_42_base.jsonl"):
        depth = int(path.name.split("_")[2])
        for line in path.read_text().splitlines():
            prompt = json.loads(line)["prompt"]
            body = prompt.split("afterwards.\n")[1].split("\nWhat is")[0]
            place = body.index("One of the special magic numbers") / len(body)
            assert abs(100 * place - depth) < 8, (depth, place)


def test_killed_and_resumed(world, measure, tmp_path):
    """A process that is killed loses what it was at; the next one asks only what is left, and ends alike."""
    arguments = [*needle(world), "--batch-tokens", "1", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "launch/evaluate.py"), *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    partial = tmp_path / "out/samples.rank_0.jsonl"
    deadline = time.monotonic() + 120
    while not (partial.is_file() and partial.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = partial.read_text().splitlines()
    with partial.open("a") as file:
        file.write('{"model": "cut o')
    code, printed = run_evaluate(*arguments)
    assert code == 0, printed
    assert f"{len(done)} of 12 samples are already done" in printed
    found = samples(tmp_path / "out")
    assert [json.dumps(one) in done for one in found].count(True) == len(done) and not partial.exists()
    expected = samples(measure(1, *needle(world)))
    assert [one["answer"] for one in found] == [one["answer"] for one in expected]


def test_asked_to_stop(world, tmp_path):
    arguments = [*needle(world), "--batch-tokens", "1", "--samples", "40", "--output", str(tmp_path / "out")]
    command = [sys.executable, str(ROOT / "launch/evaluate.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    partial = tmp_path / "out/samples.rank_0.jsonl"
    deadline = time.monotonic() + 120
    while not (partial.is_file() and partial.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "samples are done; rerun the same command to resume" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_fails_ends_the_others(world, tmp_path, fault):
    arguments = [*needle(world), "--batch-tokens", "1", "--samples", "200", "--output", str(tmp_path / "out")]
    log = tmp_path / "log"
    process = torchrun(2, *arguments, "parallel.timeout_minutes=0.1", log=log, script="evaluate.py")
    try:
        partial = tmp_path / "out/samples.rank_1.jsonl"
        deadline = time.monotonic() + 120
        while not (partial.is_file() and partial.read_text().count("\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        victim = next(rank for rank in workers(process) if rank.environ()["RANK"] == "1")
        victim.send_signal(fault)
        assert process.wait(timeout=90) == 1
        text = log.read_text()
        if fault == signal.SIGSTOP:
            assert "stopped: rank 1" in text and "no longer responds" in text and "to resume" in text
        else:
            assert "stopped: rank 1 was killed by SIGKILL; rerun the same command" in text
            assert "Traceback" not in text
        done = sum(len(path.read_text().splitlines()) for path in (tmp_path / "out").glob("samples.rank_*.jsonl"))
        arguments[arguments.index("200")] = "4"  # some of which are done
        code, printed = run_evaluate(*arguments)
        assert code == 0 and "samples are already done" in printed and done >= 2
    finally:
        kill_all(process)


def test_compare(world, measure, tmp_path):
    both = measure(1, *position(world, "run"))
    task, scores, notes = compare(f"{both}:run", f"{both}:run (fast weights off)")
    assert not notes and task == "position" and len(scores.cells) == 8
    on, off = ([one for one in samples(both) if one["model"] == label] for label in ("run", "run (fast weights off)"))
    for number, row in enumerate(scores.cells):
        expected = sum(b["ranges"][number]["loss"] - a["ranges"][number]["loss"] for a, b in zip(on, off, strict=True))
        (difference,) = scores.differences[row].values()
        assert difference.mean == pytest.approx(expected / len(on)) and difference.samples == len(on)
    with pytest.raises(UserError, match="does not name one model: use one of"):
        compare(str(both), str(both))
    with pytest.raises(UserError, match=r"has results of position and .* of ruler"):
        compare(f"{both}:run", str(measure(1, *ruler(world))))
    with pytest.raises(UserError, match="contains no results"):
        compare(f"{both}:run", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["position"], "no model is given"),
        (["position", "/nowhere"], "'/nowhere' is not a folder"),
        (["dance", "RUN"], "invalid choice: 'dance'"),
        (["position", "RUN", "--dance"], "unknown option --dance"),
        (["position", "RUN", "--fast-weights", "on,half"], "--fast-weights half is not a valid mode"),
        (["position", "RUN", "RUN"], "'run' is named twice"),
        (["position", "RUN", "--length", "9k"], "has no document of more than 9216 tokens, the longest has"),
        (["position", "RUN", "--length", "0"], "'0' is not a number of tokens"),
        (["position", "RUN", "--ranges", "5,1"], "is not increasing"),
        (["position", "RUN", "--ranges", "5"], "use at least two edges"),
        (["position", "EXPORTED"], "set --documents"),
        (["position", "EXPORTED", "--documents", "/nowhere"], "input '/nowhere' does not exist"),
        (["position", "RUN", "optim.lr=1"], "optim.lr cannot be set by this command"),
        (["position", "RUN", "parallel.dance=1"], "parallel.dance does not exist"),
        (["position", "RUN", "parallel.context_parallel_size=x"], "takes int"),
        (["position", "RUN", "parallel.context_parallel_size=2"], "needs a multiple of 2 processes"),
        (["ruler", "RUN", "parallel.context_parallel_size=2"], "ruler exports checkpoints first"),
        (["position", "EXPORTED", "parallel.context_parallel_size=1"], "is in Hugging Face format"),
        (["position", "RUN", "--fast-weights", "clip=0"], "--fast-weights clip=0 is not a valid mode"),
        (["final-block", "RUN", "--contexts", "0,16"], "use 1 or more"),
        (["final-block", "RUN", "--block", "1k"], "leaves no context"),
        (["ruler", "EXPORTED", "--tasks", "niah"], "--tasks niah is not a task of RULER"),
        (["ruler", "EXPORTED", "--template", "chat"], "has no chat template"),
        (["position", "EXPORTED", "parallel.timeout_minutes=-1"], "parallel.timeout_minutes=-1"),
        (["position", "EXPORTED", "parallel.timeout_minutes=nan"], "parallel.timeout_minutes=nan"),
        (["position", "RUN", "parallel.context_parallel_size=0"], "parallel.context_parallel_size=0 is out of range"),
        (["position", "RUN", "train.eval_positions=[64,0]"], "takes increasing numbers such as 0,1k,4k"),
        (["needle", "RUN", "--depths", "33.33333,40"], "is not a list of depths"),
        (["needle", "RUN", "--samples", "00000000019999999999"], "is not a whole number from 1"),
        (["ruler", "EXPORTED", "--lengths", "200"], "--lengths 200 is too short for"),
        (["ruler", "EXPORTED", "--ruler-data", "/nowhere"], "'/nowhere' has no"),
        (["needle", "EXPORTED", "--depths", "50,101"], "is not a list of depths"),
        (["harness", "EXPORTED", "--tasks", "no_such_task"], "--tasks no_such_task is not a task of lm-eval"),
        (["position", "RUN", "--output", "FULL"], "contains files that are not from an evaluation"),
    ],
)
def test_what_is_asked_wrongly(world, tmp_path, arguments, sentence):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").touch()
    names = dict(RUN=str(world["run"]), EXPORTED=str(world["exported"]), FULL=str(tmp_path / "full"))
    words = [names.get(word, word) for word in arguments]
    if "--output" not in words:
        words += ["--output", str(tmp_path / "out")]
    if words[0] == "ruler":
        words += ["--kept", str(tmp_path / "kept"), "--workers", "1", "--samples", "1"]
        words += [] if "--ruler-data" in words else ["--ruler-data", str(world["ruler"])]
    ((code, printed),) = run_ranks(1, run_evaluate, *words)
    assert code == 2 and sentence in printed and printed.startswith("error: "), printed
    assert len(printed.strip().splitlines()) == 1 and (tmp_path / "full/precious").exists()


def run_harness(folder: str, *arguments: str) -> tuple[int, str]:
    """Run with the tasks of a folder, rather than those of the package, whose questions come from the network."""
    from lm_eval.tasks import TaskManager

    from inplace_ttt.evaluation import harness_task

    harness_task.task_manager = lambda: TaskManager(include_path=folder, include_defaults=False)
    return run_evaluate(*arguments)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Two tasks of multiple choice, and the group of them."""
    folder = tmp_path_factory.mktemp("questions")
    rng = random.Random(0)
    for name in ("first", "second"):
        lines = [
            dict(q=f"Essay sentence number {rng.randrange(700)} says", choices=["little", "green words"], answer=n % 2)
            for n in range(11)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
            "doc_to_target: '{{answer}}'\nmetric_list:\n- {metric: acc}\n- {metric: acc_norm}\n"
        )
    (folder / "both.yaml").write_text("group: both\ntask: [first, second]\n")
    return folder


def test_harness(world, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        arguments = ["harness", str(world["run"]), "--tasks", "both,first", "--fast-weights", "on,off"]
        for code, printed in run_ranks(ranks, run_harness, str(questions), *arguments, "--output", str(output)):
            assert code == 0, printed
        found.append({(s["model"], s["task"], s["sample"]): s.get("score") for s in samples(output)})
        scores = json.loads((output / "results.json").read_text())["scores"]
        assert [(one["task"], one["metric"], one["samples"]) for one in scores[::2]] == [
            ("both", "acc_norm", 22), ("first", "acc_norm", 11)
        ]  # fmt: skip
    assert found[0] == found[1] and len(found[0]) == 2 * (22 + 2)
    # a second start has nothing to do
    ((code, printed),) = run_ranks(1, run_harness, str(questions), *arguments, "--output", str(output))
    assert code == 0 and "harness of" not in printed


@pytest.mark.slow
def test_harness_without_a_network(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["harness", str(world["exported"]), "--tasks", "piqa", "--output", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, str(ROOT / "launch/evaluate.py"), *arguments], capture_output=True, text=True
    )
    assert result.returncode == 2 and "the questions of piqa cannot be loaded (the Hugging Face hub" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_whoever_reads_the_output_may_leave(world, tmp_path):
    """As head does: the evaluation goes on to its end."""
    arguments = [*needle(world), "--output", str(tmp_path / "out")]
    command = [sys.executable, str(ROOT / "launch/evaluate.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert (tmp_path / "out/results.json").is_file()


def test_documents_that_cannot_be_read_are_named(world, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    words = ["position", str(world["exported"]), "--documents", str(tmp_path / "latin.txt"), "--length", "20"]
    code, printed = run_evaluate(*words, "--output", str(tmp_path / "out"))
    assert code == 2 and "no text found" in printed and "latin.txt" in printed and "utf-8" in printed
    text = (world["text"] / "0.txt").read_text()
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(text)
    code, printed = run_evaluate(*words[:3], str(tmp_path), *words[4:], "--output", str(tmp_path / "out"))
    assert code == 0 and "1 duplicate documents are read once" in printed and "1 cannot be read" in printed
    assert len(samples(tmp_path / "out")) == 1
