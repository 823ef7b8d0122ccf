"""From text to samples: every format read, every token used once an epoch, an order that the seed alone decides."""

import gzip
import itertools
import json
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from inplace_ttt.config import UserError
from inplace_ttt.data.batch import MicroBatch, Sample
from inplace_ttt.data.build import StepSampleIndices, micro_batches
from inplace_ttt.data.documents import SkipReport, find_files, read_documents, read_hub_dataset
from inplace_ttt.data.packed import BlendedDataset, PackedDocuments
from inplace_ttt.data.recall import KeyValueRecall
from inplace_ttt.hf.tokenizer import load_tokenizer, train_tokenizer
from launching import ROOT


class Indexed:
    """Documents in memory; token values say which document and which place."""

    def __init__(self, lengths):
        self.sequence_lengths = np.array(lengths)
        self.content = [1000 * (number + 1) + np.arange(length) for number, length in enumerate(lengths)]

    def get(self, number, offset, length):
        return self.content[number][offset : offset + length]


def packed(lengths, **options):
    settings = dict(seq_length=32, align=8, reset=True, seed=3) | options
    return PackedDocuments(Indexed(lengths), np.arange(len(lengths)), **settings)


@pytest.mark.parametrize("reset", [True, False])
def test_an_epoch_uses_every_token_once(reset):
    lengths = [5, 40, 17, 100, 9, 2]
    data = packed(lengths, reset=reset)
    inputs = Counter()
    for number in range(data.samples):
        sample = data[number]
        counted = sample.loss_mask > 0
        assert (sample.labels[counted] == sample.tokens[counted] + 1).all()
        inputs.update(sample.tokens[counted].tolist())
    expected = {1000 * (n + 1) + i for n, length in enumerate(lengths) for i in range(length - 1)}
    assert set(inputs) == expected and set(inputs.values()) == {1}


def test_documents_start_on_chunk_boundaries_and_do_not_mix():
    data = packed([5, 40, 17, 100, 9, 2])
    for number in range(20):
        sample = data[number]
        assert sample.documents[0] == 0 and sample.documents[-1] == 32
        assert all(bound % 8 == 0 for bound in sample.documents)
        for start, end in itertools.pairwise(sample.documents):
            counted = sample.tokens[start:end][sample.loss_mask[start:end] > 0]
            assert len({int(token) // 1000 for token in counted}) <= 1


def test_order_depends_on_seed_and_epoch_alone():
    assert torch.equal(packed([50] * 9)[7].tokens, packed([50] * 9)[7].tokens)
    assert any(not torch.equal(packed([50] * 9)[i].tokens, packed([50] * 9, seed=4)[i].tokens) for i in range(5))
    data = packed([33] * 16)
    assert data.samples == 16
    first, second = ([data[e * 16 + i].tokens.tolist() for i in range(16)] for e in range(2))
    assert first != second and sorted(first) == sorted(second)


def test_a_long_document_does_not_fill_a_stretch_of_training():
    data = packed([2000, 2000])
    documents = [int(data[number].tokens[0]) // 1000 for number in range(data.samples)]
    runs = [len(list(run)) for _, run in itertools.groupby(number > 2 for number in documents)]
    assert max(runs) < 15  # of 63 samples each


def test_blend_keeps_shares_and_order():
    parts = [[Sample(number, None, None, (name,)) for number in range(1000)] for name in "ab"]

    def drawn(samples):
        blend = BlendedDataset(parts, [3.0, 1.0], samples)
        return [(blend[i].documents[0], blend[i].source, blend[i].tokens) for i in range(400)]

    found = drawn(400)
    first = [number for name, _, number in found if name == "a"]
    assert abs(len(first) - 300) <= 1 and first == list(range(len(first)))
    assert {(name, source) for name, source, _ in found} == {("a", 0), ("b", 1)}
    assert drawn(800) == found  # a longer run begins alike


def test_collate_packs_rows_and_restarts_positions():
    def sample(first):
        tokens = torch.arange(first, first + 16)
        return Sample(tokens, tokens + 1, torch.ones(16), (0, 8, 16))

    whole = MicroBatch.collate([sample(0), sample(100)], 1, 0, 8)
    assert whole.tokens.shape == (1, 32) and whole.layout.documents == (0, 8, 16, 24, 32)
    assert whole.position_ids[0].tolist() == list(range(8)) * 4
    parts = [MicroBatch.collate([sample(0), sample(100)], 2, rank, 8) for rank in range(2)]
    assert parts[0].tokens[0].tolist() == [*range(8), *range(108, 116)]
    assert parts[1].tokens[0].tolist() == [*range(8, 16), *range(100, 108)]
    assert torch.equal(parts[1].labels, parts[1].tokens + 1)
    assert whole.layout.plan.chunk_lengths == (8, 8, 8, 8) and parts[1].layout.plan.cp_rank == 1
    assert parts[1].layout.chunk_ids.tolist() == [0] * 8 + [1] * 8
    assert pickle.loads(pickle.dumps(parts[1])).layout.plan == parts[1].layout.plan  # it comes from a worker
    plain = MicroBatch.collate([sample(0)], 1, 0, None)
    assert plain.layout.plan is None and plain.to(torch.device("cpu")).layout.documents == (0, 8, 16)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_pack_and_plan(workers):
    """Batches of workers are those of one process, with their plans."""
    data = packed([5, 40, 17, 100, 9, 2])
    options = dict(micro_batch_size=2, cp_size=2, cp_rank=1, chunk_size=8, device=torch.device("cpu"))
    alone, together = (list(micro_batches(data, range(6), num_workers=n, **options)) for n in (0, workers))
    assert len(alone) == len(together) == 3
    for batch, expected in zip(together, alone, strict=True):
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))
        assert batch.layout.plan == expected.layout.plan is not None
        assert torch.equal(batch.layout.chunk_ids, expected.layout.chunk_ids)


def test_batches_pin_all_their_memory(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    batch = MicroBatch.collate([packed([40])[0]], 1, 0, 8)
    copy = batch.pin_memory()
    tensors = (getattr(batch, name) for name in ("tokens", "labels", "loss_mask", "position_ids", "sources"))
    tensors = *tensors, batch.layout.chunk_ids
    assert {id(tensor) for tensor in pinned} == {id(tensor) for tensor in tensors}
    assert copy.layout.plan is batch.layout.plan and copy.tokens is not batch.tokens


def test_recall_questions_lie_beyond_the_window():
    sample = KeyValueRecall(256, 16, 100, seed=0)[5]
    text, labels = sample.tokens.tolist(), sample.labels.tolist()
    asked = sample.loss_mask.nonzero().flatten().tolist()
    assert len(asked) == 16
    for place in asked:
        told = text.index(text[place])
        assert place - told > 30 and text[told + 1] == labels[place]
    with pytest.raises(UserError, match=r"data\.recall_pairs=100"):
        KeyValueRecall(256, 100, 100, seed=0)


TEXTS = ["one document\nof two lines", "another, with ünïcödé", "third"]


def write_json_lines(stream):
    for text in TEXTS:
        stream.write((json.dumps({"text": text, "id": 1}) + "\n").encode())


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "jsonl.gz", "json", "parquet", "txt"])
def test_every_format_is_read(kind, tmp_path):
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        with path.open("wb") as stream:
            write_json_lines(stream)
    elif kind == "jsonl.zst":
        with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as stream:
            write_json_lines(stream)
    elif kind == "jsonl.gz":
        with gzip.open(path, "wb") as stream:
            write_json_lines(stream)
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "id": [1, 2, 3]}), path)
    else:
        path.write_text(TEXTS[0])
    expected = TEXTS[:1] if kind == "txt" else TEXTS
    assert list(read_documents(find_files([str(tmp_path)]), "text")) == expected


@pytest.mark.parametrize("kind", ["folder of files", "saved", "saved with splits"])
def test_a_dataset_on_disk_is_read(kind, tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"words": ["one", "two"]})
    if kind == "folder of files":
        rows.to_parquet(tmp_path / "part.parquet")
    else:
        saved = rows if kind == "saved" else datasets.DatasetDict(train=rows)
        saved.save_to_disk(tmp_path)
    assert list(read_hub_dataset(str(tmp_path), None, "train", "words")) == ["one", "two"]
    with pytest.raises(UserError, match="set --text-key to the field"):
        list(read_hub_dataset(str(tmp_path), None, "train", "text"))


def test_unreadable_input_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UserError, match=r"a\.jsonl:2 is not JSON"):
        list(read_documents([tmp_path / "a.jsonl"], "text"))
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match=r"no field 'text'.*body"):
        list(read_documents([tmp_path / "a.jsonl"], "text"))
    (tmp_path / "b.jsonl.zst").write_bytes(b"not zstandard")
    with pytest.raises(UserError, match="cannot be read"):
        list(read_documents([tmp_path / "b.jsonl.zst"], "text"))
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        list(read_documents([tmp_path / "c.parquet"], "text"))
    with pytest.raises(UserError, match="does not exist"):
        find_files([str(tmp_path / "nothing")])


@pytest.mark.parametrize(
    ("name", "content", "texts", "said"),
    [
        ("a.jsonl", b'{"text": "a\\ud800b"}\n', ["a\ufffdb"], "lone surrogates"),
        ("a.jsonl", b'{"text": null}\n{"text": "x"}\n', ["x"], "1 empty documents"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "x"}\n', ["x"], None),
        ("a.txt", b"\xef\xbb\xbfx\r\ny", ["x\ny"], None),
        ("a.ndjson", b'{"text": "x"}\n{"text": "y"}\n', ["x", "y"], None),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n[]\n', ["x"], "a.jsonl:2 has int in field 'text'"),
        ("a.jsonl", b'{"n": ' + b"1" * 5000 + b'}\n{"text": "x"}\n', ["x"], "a.jsonl:1 is not JSON (a number has"),
        ("a.jsonl", b"[" * 100_000 + b'\n{"text": "x"}\n', ["x"], "nested too deep"),
        ("a.jsonl", b'{"text": "\xff"}\n{"text": "x"}\n', ["x"], "a.jsonl:1 is not JSON (byte 11 is not UTF-8)"),
        ("a.json", b"[" * 100_000, [], "nested too deep"),
        ("a.json", b'[{"text": "x"}, {"no": 1}]', ["x"], "element 2 has no field 'text'"),
        ("a.txt", "größer".encode("latin-1"), [], "a.txt' cannot be read"),
        ("a.txt.gz", b"\x1f\x8b\x08\x00garbage", [], "a.txt.gz' cannot be read"),
    ],
)
def test_text_from_the_street(name, content, texts, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    report = SkipReport()
    assert list(read_documents([tmp_path / name], "text", report)) == texts
    assert (said is None and not report.lines()) or said in "\n".join(report.lines())


def test_parquet_of_another_type_and_with_nulls(tmp_path):
    report = SkipReport()
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x", None, ""]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.array(["y", "y"]).dictionary_encode()}), tmp_path / "c.parquet")
    assert list(read_documents(find_files([str(tmp_path)]), "text", report)) == ["x", "y", "y"]
    assert report.bad == 1 and report.empty == 2 and "has type int64 in column 'text'" in report.places[0]


def test_only_the_first_ten_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n" * 30)
    report = SkipReport()
    assert list(read_documents([tmp_path / "a.jsonl"], "text", report)) == []
    assert (
        report.bad == 30 and len(report.places) == 10 and report.lines()[0].startswith("30 unusable documents skipped")
    )


def test_hidden_and_unknown_files_are_left_out_and_counted(tmp_path):
    for name in ("a.txt", "._a.txt", ".git/b.txt", "c.xyz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    report = SkipReport()
    assert [path.name for path in find_files([str(tmp_path)], report)] == ["a.txt"] and report.skipped_files == 3
    (tmp_path / "t.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"t\.csv' has an unknown extension \(\.csv\).*--format"):
        list(read_documents([tmp_path / "t.csv"], "text"))
    assert list(read_documents([tmp_path / "t.csv"], "text", None, "text")) == ["a,b"]


def test_no_sample_of_padding_alone():
    """The last sample of an epoch may begin after the last document's end; before version 2 it held no token."""
    lengths, options = [60, 7], dict(seq_length=100, align=64)
    old, new = (packed(lengths, shuffle=False, packing=version, **options) for version in (1, 2))
    assert [bool((old[number].loss_mask > 0).any()) for number in range(2)] == [True, False]
    assert all((new[number].loss_mask > 0).any() for number in range(2))
    assert torch.equal(old[0].tokens, new[0].tokens)


def test_the_numbers_of_many_steps_are_not_stored():
    numbers = StepSampleIndices(range(3, 10**9), 8, 2, 1)
    assert len(numbers) == (10**9 - 3) * 4 and [numbers[i] for i in range(6)] == [28, 29, 30, 31, 36, 37]
    with pytest.raises(IndexError):
        numbers[len(numbers)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some text", "and more of it <|endoftext|>"] * 20, 300)


def prepared(prefix, texts, tokenizer, **options):
    from inplace_ttt.data import prepare as module
    from inplace_ttt.data.indexed import IndexedDataset

    module.prepare(texts, tokenizer, str(prefix), settings={}, workers=1, progress=lambda *_: None, **options)
    indexed = IndexedDataset(str(prefix))
    return [indexed[number].tolist() for number in range(len(indexed))]


def test_begin_and_end_and_special_tokens(tokenizer, tmp_path):
    from inplace_ttt.data.prepare import Options, read_description

    end = tokenizer.eos_token_id
    (ids,) = prepared(tmp_path / "a", ["x<|endoftext|>y"], tokenizer)
    assert ids.count(end) == 1 and ids[-1] == end
    (ids,) = prepared(tmp_path / "b", ["x<|endoftext|>y"], tokenizer, options=Options(special_tokens="control"))
    assert ids.count(end) == 2
    (ids,) = prepared(tmp_path / "c", ["x<|endoftext|>y"], tokenizer, options=Options(end=False))
    assert end not in ids and read_description(str(tmp_path / "c")).end is False
    with pytest.raises(UserError, match="no begin-of-text token"):
        prepared(tmp_path / "d", ["x"], tokenizer, options=Options(begin=True))


def test_a_corpus_is_not_overwritten_unasked(tokenizer, tmp_path):
    first = prepared(tmp_path / "a", ["x"], tokenizer)
    with pytest.raises(UserError, match=r"a\.bin' already exists: use --overwrite"):
        prepared(tmp_path / "a", ["y"], tokenizer)
    assert prepared(tmp_path / "a", ["y"], tokenizer, overwrite=True) != first


@pytest.mark.parametrize("how", ["settings", "foreign", "link"])
def test_parts_that_are_damaged_or_not_ours(how, tokenizer, tmp_path):
    parts = tmp_path / "a.parts"
    target = tmp_path / "mine" if how == "link" else parts
    target.mkdir()
    (target / "work").write_text("precious")
    if how == "link":
        parts.symlink_to(target)
    if how == "settings":
        (parts / ".inplace_ttt_parts").touch()
        (parts / "settings.json").write_text("{")
        assert prepared(tmp_path / "a", ["x"], tokenizer)
    else:
        with pytest.raises(UserError, match="was not made by this program"):
            prepared(tmp_path / "a", ["x"], tokenizer)
        assert (parts / "work").read_text() == "precious"


def prepare(*arguments, cwd):
    command = [sys.executable, str(ROOT / "launch/prepare_data.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_prepare_is_taken_up_where_it_stopped(tmp_path):
    from inplace_ttt.data import prepare as module
    from inplace_ttt.data.indexed import IndexedDataset

    texts = [f"document {number} " * 50 for number in range(40)]
    tokenizer = train_tokenizer(texts, 300)
    part_bytes, module.PART_BYTES = module.PART_BYTES, 2000
    try:

        def run(prefix, documents):
            seen = []
            return module.prepare(
                documents, tokenizer, str(tmp_path / prefix), settings={}, workers=2, progress=lambda *n: seen.append(n)
            )

        def breaks_off():
            yield from texts[:25]
            raise UserError("the disk was pulled")

        with pytest.raises(UserError, match="pulled"):
            run("a", breaks_off())
        done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a.parts").glob("*.bin")}
        assert done and not (tmp_path / "a.bin").exists()
        whole = run("b", texts)
        assert run("a", texts) == whole
    finally:
        module.PART_BYTES = part_bytes
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert not (tmp_path / "a.parts").exists()
    indexed, again = IndexedDataset(str(tmp_path / "a")), load_tokenizer(str(tmp_path / "a.tokenizer"))
    assert len(indexed) == 40 and indexed[7][-1] == again.eos_token_id
    assert again.decode(indexed[7][:-1]) == texts[7]


def test_prepare_command_refuses_in_one_line(tmp_path):
    for arguments, expected in (
        (["--output", "x", "--train-tokenizer", 300], "exactly one source"),
        (["--output", "x", "--python-packages"], "exactly one of --tokenizer"),
        (["--output", "x", "--tokenizer", "/nowhere", "nothing.txt"], "does not exist"),
    ):
        result = prepare(*arguments, cwd=tmp_path)
        assert result.returncode == 2 and expected in result.stderr and "Traceback" not in result.stderr
