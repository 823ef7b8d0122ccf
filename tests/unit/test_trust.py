"""What comes from strangers is data: reading it runs nothing, and nothing outside its folder is read."""

import hashlib
import io
import json
import pickle
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from inplace_ttt.config import UserError
from inplace_ttt.files import read_json, read_yaml
from inplace_ttt.hf.auxiliary_files import copy_auxiliary_files
from inplace_ttt.hf.convert import SafetensorsFolder
from inplace_ttt.megatron import safe_load
from inplace_ttt.megatron.tensors import PlannedTensor, TensorReader, write_tensors
from inplace_ttt.resilience.checksums import corruption, damage, write_manifest


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_tensors(
        folder, {"a.weight": PlannedTensor((4, 3), torch.float32, lambda: torch.ones(4, 3))}, lambda size: None
    )
    (folder / "run.json").write_text('{"step": 0, "samples": 0}')
    write_manifest(folder)
    return folder


def test_a_sound_checkpoint_is_read(checkpoint):
    assert torch.equal(TensorReader(checkpoint).read("a.weight"), torch.ones(4, 3))
    assert safe_load.read_common_state(checkpoint) == {}


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in the metadata"])
def test_code_in_the_metadata_does_not_run(inside, checkpoint, tmp_path):
    metadata = safe_load.read_metadata(checkpoint)
    if inside:
        metadata.planner_data = Payload(tmp_path / "ran")
    with (checkpoint / ".metadata").open("wb") as file:
        pickle.dump(metadata if inside else Payload(tmp_path / "ran"), file)
    for read in (safe_load.read_metadata, safe_load.read_common_state, lambda folder: TensorReader(folder).shapes):
        with pytest.raises(UserError, match=r"names '(_io|io)\.open', which no checkpoint needs"):
            read(checkpoint)
    with pytest.raises(UserError, match="which no checkpoint needs"):
        safe_load.Reader(checkpoint).read_metadata()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", [b"builtins\ngetattr", b"functools\npartial", b"torch\nload", b"torch.serialization\nload", b"os\nsystem"]
)
def test_names_that_run_are_not_resolved(name, checkpoint):
    (checkpoint / ".metadata").write_bytes(b"c" + name + b"\n.")
    with pytest.raises(UserError, match="which no checkpoint needs"):
        safe_load.read_metadata(checkpoint)


@pytest.mark.parametrize(
    "name",
    [b"pathlib\nPosixPath", b"torch.distributed.checkpoint.metadata\nMetadata", b"torch.serialization\n_get_layout"],
)
def test_attributes_of_classes_are_not_set(name, checkpoint):
    """A pickle can give a class that it may name another method, for the rest of the process."""
    whole = (checkpoint / ".metadata").read_bytes()
    setter = b"c" + name + b"\nN}(X\x07\x00\x00\x00is_filecpathlib\nPosixPath\nu\x86b0"
    (checkpoint / ".metadata").write_bytes(b"\x80\x04" + setter + whole[2:])
    with pytest.raises(UserError, match=r"sets attributes of a '(type|function)', which no checkpoint needs"):
        safe_load.read_metadata(checkpoint)
    assert not isinstance(type(checkpoint).is_file, type)


def test_weights_of_another_kind_are_refused(checkpoint):
    metadata = safe_load.read_metadata(checkpoint)
    metadata.state_dict_metadata["a.weight"].properties.dtype = torch.int32  # of the same size
    with (checkpoint / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    with pytest.raises(UserError, match=r"weight 'a\.weight' has dtype torch\.int32"):
        TensorReader(checkpoint).read("a.weight")


@pytest.mark.parametrize("how", ["zeros", "a pickle"])
def test_a_shard_that_holds_no_tensor_is_named(how, checkpoint, tmp_path):
    for shard in checkpoint.glob("*.distcp"):
        content = b"" if how == "zeros" else pickle.dumps(Payload(tmp_path / "ran"))
        shard.write_bytes(content.ljust(shard.stat().st_size, b"\0"))
    with pytest.raises(UserError, match=r"\.distcp' holds something other than tensors, or is damaged") as caught:
        TensorReader(checkpoint).read("a.weight")
    assert "weights_only" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_code_in_an_object_does_not_run(checkpoint, tmp_path):
    content = io.BytesIO()
    torch.save([{"a": 1, "b": Payload(tmp_path / "ran")}], content)
    with pytest.raises(UserError, match="which no checkpoint needs"):
        safe_load.read_object(content, "an object")
    with pytest.raises(UserError, match="is damaged"):
        safe_load.read_object(io.BytesIO(pickle.dumps(Payload(tmp_path / "ran"))), "an object")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (safe_load.LIMIT + 1))
    with pytest.raises(UserError, match="more than"):
        safe_load.read_object(bomb, "an object")
    assert not (tmp_path / "ran").exists()


def test_megatron_reads_through_ours():
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import torch as strategy

    assert strategy.FileSystemReader is safe_load.Reader and strategy.MCoreLoadPlanner is safe_load.Planner
    assert serialization.load_common_state_dict is safe_load.read_common_state


@pytest.mark.parametrize("place", ["../other", "/etc/hostname", "a/b", ".."])
def test_tensors_outside_the_folder_are_not_read(place, checkpoint):
    metadata = safe_load.read_metadata(checkpoint)
    for info in metadata.storage_data.values():
        info.relative_path = place
    with (checkpoint / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    with pytest.raises(UserError, match="not a file of the checkpoint"):
        TensorReader(checkpoint).read("a.weight")


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", '{"../../etc/hostname": 3}', '{"a": {"b": 1}}', "[" * 100_000, '{"run.json": [1, 2, 3]}', "\xff"],
)
def test_a_manifest_that_is_none(content, checkpoint):
    (checkpoint / "manifest.json").write_text(content, encoding="latin-1")
    assert "is damaged" in damage(checkpoint) and "is damaged" in corruption(checkpoint)


def test_aliases_of_yaml_end_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    started = time.monotonic()
    with pytest.raises(UserError, match="uses an alias"):
        read_yaml(tmp_path / "bomb.yaml")
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "content", ["!!python/object/apply:os.system [true]", "[" * 5000, "x" * 300_000, "a: [", "- 1"]
)
def test_yaml_that_is_no_configuration(content, tmp_path):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b"\xff\xfe", b"", b"3"])
def test_json_that_is_none(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json' is damaged"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", ""])
def test_an_index_that_leaves_its_folder(place, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map={"w": place})))
    with pytest.raises(UserError, match="outside of its folder"):
        SafetensorsFolder(folder)


def test_a_link_to_a_secret_is_not_copied(tmp_path):
    for name in ("model", "out", "models/snapshots/1", "models/blobs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model/tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="leads out of its folder"):
        copy_auxiliary_files(tmp_path / "model", tmp_path / "out", ("tokenizer.json",))
    # as the hub's client keeps files
    (tmp_path / "models/blobs/1").write_text("{}")
    (tmp_path / "models/snapshots/1/tokenizer.json").symlink_to("../../blobs/1")
    copy_auxiliary_files(tmp_path / "models/snapshots/1", tmp_path / "out", ("tokenizer.json",))
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"


def test_a_tokenizers_own_code_does_not_run(tmp_path, monkeypatch):
    from inplace_ttt.hf.tokenizer import load_tokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    for name, key in (("tokenizer_config.json", "AutoTokenizer"), ("config.json", "AutoConfig")):
        value = ["evil.Evil", "evil.Evil"] if key == "AutoTokenizer" else "evil.Evil"
        (folder / name).write_text(json.dumps(dict(auto_map={key: value}, model_type="evil")))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(str(folder))
    assert not (tmp_path / "ran").exists()


def test_an_index_that_cannot_be(tmp_path):
    from inplace_ttt.data.indexed import IndexedDatasetBuilder
    from inplace_ttt.data.packed import open_indexed

    prefix = tmp_path / "data"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in (30, 20):
        builder.add_document(np.arange(length), [length])
    builder.finalize(f"{prefix}.idx")
    sound = (tmp_path / "data.idx").read_bytes()
    lengths, pointers = 34, 34 + 2 * 4
    for place, value, said in (
        (lengths, (-5).to_bytes(4, "little", signed=True), "negative length"),
        (pointers, (-8).to_bytes(8, "little", signed=True), "outside of its tokens"),
        (pointers + 8, (2**62).to_bytes(8, "little"), "but its index needs"),
        (pointers, (1).to_bytes(8, "little"), "inside a token"),
        (17, bytes([6]), "float"),
        (17, bytes([99]), "unknown dtype code"),
        (18, (2**60).to_bytes(8, "little"), "sequences need"),
        (34 + 2 * 12 + 8, (77).to_bytes(8, "little"), "do not match its sequences"),
    ):
        changed = bytearray(sound)
        changed[place : place + len(value)] = value
        (tmp_path / "data.idx").write_bytes(changed)
        with pytest.raises(UserError, match=said):
            open_indexed(str(prefix))
    (tmp_path / "data.idx").write_bytes(sound)
    assert len(open_indexed(str(prefix))) == 2


def test_tokens_beyond_the_vocabulary(tmp_path):
    from inplace_ttt.data.identity import check_tokens, identity
    from inplace_ttt.data.indexed import IndexedDatasetBuilder
    from inplace_ttt.data.packed import open_indexed

    prefix = str(tmp_path / "data")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(np.array([3, 250, 7]), [3])
    builder.finalize(f"{prefix}.idx")
    indexed = open_indexed(prefix)
    known = identity(prefix, indexed, None)
    assert (known["documents"], known["tokens"]) == (1, 3)
    check_tokens(prefix, indexed, known, 251)
    assert json.loads((tmp_path / "data.checked").read_text())["largest"] == 250
    with pytest.raises(UserError, match="contains token ID 250, but the vocabulary has 250"):
        check_tokens(prefix, indexed, known, 250)
    before = hashlib.sha256((tmp_path / "data.bin").read_bytes()).hexdigest()
    (tmp_path / "data.bin").write_bytes(np.array([3, -1, 7], dtype=np.int32).tobytes())
    assert before != hashlib.sha256((tmp_path / "data.bin").read_bytes()).hexdigest()
    assert identity(prefix, indexed, None)["digest"] != known["digest"]
    with pytest.raises(UserError, match="contains token ID -1"):
        check_tokens(prefix, indexed, identity(prefix, indexed, None), 251)
