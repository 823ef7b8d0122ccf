"""Files and folders that are not ours stay as they are, and what cannot be meant is one sentence."""

import json
import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inplace_ttt.config import UserError
from inplace_ttt.data import prepare
from inplace_ttt.data.documents import SkipReport, find_files, read_documents
from inplace_ttt.data.indexed import IndexedDataset
from inplace_ttt.data.packed import open_indexed
from inplace_ttt.files import user_path
from inplace_ttt.hf.tokenizer import embedding_rows, load_tokenizer, train_tokenizer
from inplace_ttt.plots import axes, save
from inplace_ttt.resilience.lock import lock_beside
from inplace_ttt.training.records import read_metrics
from inplace_ttt.training.status import Status, picture, screen
from inplace_ttt.training.timeline import Timeline

TEXTS = ["a document of some words " * 20, "another one"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def make(prefix, tokenizer, **options):
    return prepare.prepare(
        TEXTS, tokenizer, str(prefix), settings={}, workers=1, progress=lambda *numbers: None, **options
    )


def test_a_tokenizer_folder_of_the_users_is_left_alone(tokenizer, tmp_path):
    folder = tmp_path / "own.tokenizer"
    tokenizer.save_pretrained(folder)
    (folder / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"own\.tokenizer' would be replaced but was not made by this program"):
            make(tmp_path / "own", load_tokenizer(str(folder)), overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == "precious"
    make(tmp_path / "mine", tokenizer)
    make(tmp_path / "mine", load_tokenizer(str(tmp_path / "mine.tokenizer")), overwrite=True)  # its own again


def test_files_beside_the_output_are_left_alone(tokenizer, tmp_path):
    (tmp_path / "notes.json").write_text('["my text"]')
    with pytest.raises(UserError, match=r"notes\.json' was not made by this program"):
        make(tmp_path / "notes", tokenizer, overwrite=True)
    (tmp_path / "other.checked").write_text("precious")
    with pytest.raises(UserError, match=r"other\.checked' was not made by this program"):
        make(tmp_path / "other", tokenizer)
    (tmp_path / "link.json").symlink_to(tmp_path / "notes.json")
    for name in ("notes.json", "link.json"):
        with pytest.raises(UserError, match="would replace its own input"):
            find_files([str(tmp_path / name)], SkipReport(), tmp_path / "notes")
    assert (tmp_path / "notes.json").read_text() == '["my text"]'


def test_a_vocabulary_with_gaps(tokenizer, tmp_path):
    """Numbers of tokens may lie beyond the number of entries: files and embedding hold them all."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    word = next(word for word, number in content["model"]["vocab"].items() if number == content["model"]["vocab"]["a"])
    content["model"]["vocab"][word] = 70_000
    tokenizer.save_pretrained(tmp_path / "gap")
    (tmp_path / "gap/tokenizer.json").write_text(json.dumps(content))
    gap = load_tokenizer(str(tmp_path / "gap"))
    assert embedding_rows(gap) == 70_001
    description = make(tmp_path / "data", gap)
    assert description.vocab_size == 70_001
    indexed = IndexedDataset(str(tmp_path / "data"))
    assert gap.decode(indexed[0][:-1]) == TEXTS[0] and indexed[0].dtype == np.int32


def test_links_in_a_run_folder_lead_nowhere(tmp_path):
    (tmp_path / "precious").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("loss.png", "timeline.jsonl"):
        (run / name).symlink_to(tmp_path / "precious")
    figure, _ = axes("a", "b", "c")
    save(figure, run / "loss.png")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG") and not (run / "loss.png").is_symlink()
    with pytest.raises(OSError):
        Timeline(run).start(run / "metrics.jsonl", 0, ["here"])
    assert (tmp_path / "precious").read_text() == "precious"


def test_any_backend_of_matplotlib(tmp_path):
    import subprocess

    code = "from inplace_ttt.plots import axes, save; from pathlib import Path; import sys; "
    code += "save(axes('a', 'b', 'c')[0], Path(sys.argv[1]))"
    environment = {**os.environ, "MPLBACKEND": "module://nobody.knows"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], env=environment, check=True)
    assert (tmp_path / "a.png").is_file()


def test_the_home_of_nobody():
    with pytest.raises(UserError, match=r"'~nobody_at_all' is not a home folder here"):
        user_path("~nobody_at_all/x")
    assert user_path("./~nobody_at_all/x").name == "x" and str(user_path("~/a")).startswith("/")


@pytest.mark.parametrize("name", ["", "/", "..", "a/.."])
def test_outputs_without_a_name(name, tmp_path):
    from pathlib import Path

    with pytest.raises(UserError, match="is not a valid output name"):
        lock_beside(Path(name), "--output")


def test_an_empty_bin_file_is_named(tokenizer, tmp_path):
    make(tmp_path / "data", tokenizer)
    (tmp_path / "data.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"data\.bin' is empty"):
        open_indexed(str(tmp_path / "data"))


def test_a_parquet_file_with_two_columns_of_a_name(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    report = SkipReport()
    assert list(read_documents([tmp_path / "a.parquet"], "text", report)) == []
    assert "has 2 columns 'text'" in report.lines()[-1] or "has 2 columns 'text'" in str(report.lines())


@pytest.mark.parametrize("line", ['"loss": NaN', f'"loss": {10**400}', '"loss": 1e999', '"update_ratio/layer_0": "a"'])
def test_numbers_that_are_none_in_metrics(line, tmp_path):
    whole = dict(step=1, loss=1.0, grad_norm=1.0, tokens_per_second=1.0, step_seconds=1.0, peak_memory_gib=1.0)
    text = json.dumps(whole) + "\n" + json.dumps(whole | {"step": 2})[:-1] + f", {line}}}\n"
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "config.yaml").write_text("run: {name: a}\ntrain: {steps: 4}\n")
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    status = Status.read(tmp_path)
    screen(status, 100)
    picture(status, tmp_path / "a.png")
