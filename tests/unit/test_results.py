"""Folders of results: labels, what survives, what another may have put there."""

import json
import random
from pathlib import Path

import pytest

from inplace_ttt.config import UserError
from inplace_ttt.evaluation.compare import compare
from inplace_ttt.evaluation.results import Column, Results, label_columns, read_results
from inplace_ttt.evaluation.ruler import TASKS


def test_labels_tell_models_apart():
    a, b, c = Path("/x/one/ckpt"), Path("/x/two/ckpt"), Path("/x/base")
    assert label_columns([(a, "on"), (b, "on"), (c, "none")]) == ["one/ckpt", "two/ckpt", "base"]
    labels = label_columns([(c, "on"), (c, "off"), (c, "clip=0.1")])
    assert labels == ["base", "base (fast weights off)", "base (clip=0.1)"]


def sample(model: str, index: int, value: float, length=4096, kind="vt") -> dict:
    return dict(
        model=model, model_digest=model, task=f"{kind} at {length}", sample=f"{kind}{length}{index}", index=index,
        length=length, kind=kind, score=value,
    )  # fmt: skip


def write(folder: Path, models: dict[str, list[dict]]) -> Path:
    folder.mkdir()
    results = Results(folder, 0)
    columns = [Column(model, f"/{model}", "none", model) for model in models]
    results.claim("ruler", {}, columns)
    results.open()
    for records in models.values():
        for record in records:
            results.add(record)
    results.close()
    results.finish(dict(task="ruler", settings={}, columns=list(map(vars, columns)), scores=[]))
    return folder


def test_two_models_with_a_known_difference(tmp_path):
    """The second answers one sample in ten that the first does not; each of two tasks counts alike."""
    rng = random.Random(0)
    first, second = [], []
    for kind, count in (("vt", 200), ("cwe", 50)):
        for index in range(count):
            right = rng.random() < 0.5
            first.append(sample("a", index, float(right), kind=kind))
            second.append(sample("b", index, float(right or index % 10 == 0), kind=kind))
    folders = [write(tmp_path / "a", {"a": first}), write(tmp_path / "b", {"b": second})]
    task, scores, notes = compare(*map(str, folders))
    assert task == "ruler" and not notes and [row[1] for row in scores.cells] == ["vt", "cwe", "mean"]
    gains = {}
    for kind in ("vt", "cwe"):
        own = [(a["score"], b["score"]) for a, b in zip(first, second, strict=True) if a["kind"] == kind]
        gains[kind] = 100 * sum(b - a for a, b in own) / len(own)
        found = scores.differences["4096", kind]["b"]
        assert found.mean == pytest.approx(gains[kind]) and found.samples == len(own)
    mean = scores.differences["4096", "mean"]["b"]
    assert mean.mean == pytest.approx((gains["vt"] + gains["cwe"]) / 2) and mean.excludes_zero(1) and mean.paired
    assert scores.cells["4096", "mean"]["a"].low < scores.cells["4096", "mean"]["b"].mean  # unpaired they overlap


def test_other_samples_are_compared_unpaired(tmp_path):
    first = [sample("a", n, n % 2) for n in range(40)]
    second = [sample("b", n + 100, 1.0) for n in range(30)]
    _, scores, _ = compare(str(write(tmp_path / "a", {"a": first})), str(write(tmp_path / "b", {"b": second})))
    found = scores.differences["4096", "vt"]["b"]
    assert found.mean == pytest.approx(50) and found.low < 50 < found.high and found.samples == 70
    assert not found.paired


def test_what_only_one_has_is_said(tmp_path):
    first = [sample("a", n, n % 2, length) for n in range(20) for length in (4096, 8192)]
    second = [sample("b", n, n % 2, length) for n in range(20) for length in (4096, 16384)]
    folders = write(tmp_path / "a", {"a": first}), write(tmp_path / "b", {"b": second})
    _, scores, notes = compare(*map(str, folders))
    assert list(scores.cells) == [("4096", "vt"), ("4096", "mean")]
    assert notes == ["only a has vt at 8192", "only b has vt at 16384"]
    other = write(tmp_path / "c", {"c": [sample("c", 0, 1.0, 32768)]})
    with pytest.raises(
        UserError, match="no common rows: the first has vt at 16384, vt at 4096, the second has vt at 32768"
    ):
        compare(str(folders[1]), str(other))


def test_a_folder_belongs_to_one_evaluation(tmp_path):
    """More samples or models extend it; another task, model or setting would replace what it says."""
    columns = [Column(name, f"/{name}", mode, "x") for name, mode in (("a", "on"), ("a off", "off"))]
    results = Results(tmp_path / "out", 0)
    settings = dict(seed=1, template="base", samples=5)
    results.claim("ruler", settings, columns[:1])
    results.finish(dict(task="ruler", settings=settings, columns=[vars(columns[0])], scores=[]))
    results.claim("ruler", settings | dict(samples=9), columns)
    for task, changed, others, why in (
        ("needle", {}, columns, "contains results of the task ruler"),
        ("ruler", dict(seed=2), columns, "was made with seed=1, not 2"),
        ("ruler", {}, columns[1:], "has results of a, which this command does not name"),
    ):
        with pytest.raises(UserError, match=f"{why}: use another folder, or remove this one"):
            results.claim(task, settings | changed, others)


def test_what_a_stranger_may_send(tmp_path):
    """Lines and files of any content give a sentence, or are left out; never anything else."""
    good = write(tmp_path / "good", {"a": [sample("a", n, 0.5) for n in range(5)]})
    rng = random.Random(0)
    junk = [None, True, -1, 1e400, float("nan"), 10**400, "", "x" * 1000, [], {}, [[]], {"from": 1}, "needle_x_y"]
    for number in range(150):
        folder = tmp_path / str(number)
        folder.mkdir()
        results = json.loads((good / "results.json").read_text())
        task = rng.choice(["ruler", "needle", "position", "final-block", "harness"])
        results["task"] = task
        lines = []
        for n in range(5):
            record = sample("a", n, 0.5, kind=rng.choice([*TASKS, "needle_essay_5"]))
            record |= dict(metric="acc", context=4, ranges=[{"from": 0, "to": 4, "tokens": 4, "loss": 1.0}])
            if rng.random() < 0.6:
                record[rng.choice(list(record))] = rng.choice(junk)
            lines.append(json.dumps(record))
        if rng.random() < 0.3:
            results[rng.choice(list(results))] = rng.choice(junk)
        if rng.random() < 0.2:
            lines.append("{" * rng.choice([1, 100_000]))
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "samples.jsonl").write_text("\n".join(lines))
        other = tmp_path / f"{number}b"
        other.mkdir()
        (other / "samples.jsonl").write_text((folder / "samples.jsonl").read_text())
        (other / "results.json").write_text((folder / "results.json").read_text())
        try:
            compare(str(folder), str(other))
        except UserError as error:
            assert "\n" not in str(error)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"has no results\.json"):
        read_results(tmp_path)
    (tmp_path / "samples.rank_0.jsonl").touch()
    with pytest.raises(UserError, match="its evaluation is not finished"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="does not list the models"):
        read_results(tmp_path)
    (tmp_path / "samples.rank_0.jsonl").unlink()
    (tmp_path / "samples.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="is a symbolic link"):
        Results(tmp_path, 0).open()


def claimed(folder: Path, task="ruler", **settings) -> Results:
    results = Results(folder, 0, task)
    results.claim(task, settings, [Column("a", "/a", "none", "a")])
    results.open()
    return results


def test_an_evaluation_that_was_killed_keeps_its_folder(tmp_path):
    """Before results.json is there, too."""
    results = claimed(tmp_path / "out", seed=42)
    results.add(sample("a", 0, 1.0))
    results.close()
    for task, settings, message in (
        ("ruler", dict(seed=7), "made with seed=42"),
        ("position", {}, "of the task ruler"),
    ):
        with pytest.raises(UserError, match=message):
            claimed(tmp_path / "out", task, **settings)
    again = claimed(tmp_path / "out", seed=42)
    assert len(again.known) == 1
    again.finish(dict(task="ruler", settings={}, columns=[vars(Column("a", "/a", "none", "a"))], scores=[]))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "samples.jsonl"]
    nothing = claimed(tmp_path / "other", seed=1)
    nothing.unclaim()
    assert not (tmp_path / "other").exists()


def test_samples_that_are_no_longer_asked_for_do_not_count(tmp_path):
    results = claimed(tmp_path / "out")
    for index in range(20):
        results.add(sample("a", index, float(index < 10)))
    keys = list(results.known)
    for key in keys[:10]:
        results.use(key)
    results.close()
    results.finish(dict(task="ruler", settings={}, columns=[vars(Column("a", "/a", "none", "a"))], scores=[]))
    other = write(tmp_path / "b", {"b": [sample("b", index, 0.0) for index in range(20)]})
    _, scores, _ = compare(str(tmp_path / "out"), str(other))
    assert scores.cells["4096", "vt"]["a"].mean == 100 and scores.cells["4096", "vt"]["a"].samples == 10
    assert scores.differences["4096", "vt"]["b"].paired and scores.differences["4096", "vt"]["b"].mean == -100
    assert len(claimed(tmp_path / "out").known) == 20  # they are there if they are asked for again


@pytest.mark.parametrize(
    "damage",
    [
        lambda one: one.pop("score"),
        lambda one: one.update(score=None),
        lambda one: one.update(score="x"),
        lambda one: one.update(score=[1]),
        lambda one: one.update(score=5.0),
        lambda one: one.update(score=float("nan")),
        lambda one: one.update(index="x"),
        lambda one: one.update(length=None),
        lambda one: one.update(kind="no such task"),
    ],
)
def test_damaged_samples_are_asked_again(tmp_path, damage):
    folder = write(tmp_path / "a", {"a": [sample("a", 0, 1.0), sample("a", 1, 1.0)]})
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    damage(lines[0])
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [record["index"] for record in claimed(folder).known.values()] == [1]


def test_a_damaged_results_file_is_to_be_removed(tmp_path):
    folder = write(tmp_path / "a", {"a": [sample("a", 0, 1.0)]})
    (folder / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"is damaged .*: remove '.*results.json'"):
        claimed(folder)


def test_subsets_are_compared_pair_by_pair(tmp_path):
    first = [sample("a", n, n % 2) for n in range(24)]
    second = [sample("b", n, 1.0) for n in range(12)]
    _, scores, _ = compare(str(write(tmp_path / "a", {"a": first})), str(write(tmp_path / "b", {"b": second})))
    found = scores.differences["4096", "vt"]["b"]
    assert found.paired and found.samples == 12 and found.mean == pytest.approx(50)


def test_names_are_shown_as_they_are(tmp_path, capsys):
    """Also those that look like rich's markup."""
    from rich.console import Console

    label = "x[/m] [red]y"
    folders = [
        write(tmp_path / name, {label + name: [sample(label + name, n, 1.0) for n in range(12)]}) for name in "ab"
    ]
    _, scores, _ = compare(*map(str, folders))
    scores.show(Console(width=120))
    assert "x[/m] [red]ya" in capsys.readouterr().out
