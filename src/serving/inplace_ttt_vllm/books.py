"""Books over the API: a request starts from saved fast weights, or saves those after its prompt.

The server reads and writes files of one folder, given as ``--additional-config '{"ttt_books": FOLDER}'``. A request
names a file in ``extra_args`` of its sampling parameters (``vllm_xargs`` over HTTP): ``ttt_load`` or ``ttt_save``. The
files are those of the exported model (``FastWeights.save``).
"""

import json
import os
import re
from collections import OrderedDict
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from vllm.logger import init_logger

from inplace_ttt_vllm.hf.modeling_inplace_ttt import (
    FINGERPRINT_KEYS,
    FastWeights,
    LayerState,
    fingerprint_of_tokenizer,
    fingerprint_of_weights,
    text_record,
)

logger = init_logger(f"vllm.{__name__}")
SETTING, LOAD, SAVE = "ttt_books", "ttt_load", "ttt_save"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
KNOWN_REQUESTS = 4096  # of which loaded files are kept, so that a preempted request loads the same one again


class Books:
    """Check the books that requests name, load and save them. There is one in each process of the server."""

    def __init__(self, vllm_config):
        self.config = vllm_config.model_config
        self.keys = self.config.hf_config
        folder = (vllm_config.additional_config or {}).get(SETTING)
        if folder is not None and not (isinstance(folder, str) and Path(folder).is_dir()):
            raise ValueError(f"additional_config has {SETTING}={folder!r}, which is not a folder: create it first")
        if folder is not None and vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError(f"{SETTING} is not supported with pipeline_parallel_size > 1: use 1, or leave it out")
        self.folder = None if folder is None else Path(folder).resolve()
        self.checked: dict[Path, tuple] = {}  # files that were checked: time, size and inode then
        self.requests: OrderedDict[str, Request] = OrderedDict()
        self._fingerprint: str | None = None

    def check(self, extra_args: dict | None) -> None:
        """Check the arguments of a request, before it is queued. Raise ValueError if it cannot be served."""
        asked = {key: value for key, value in (extra_args or {}).items() if key.startswith("ttt_")}
        for key, name in asked.items():
            if key not in (LOAD, SAVE):
                raise ValueError(f"{key} is not an argument of fast weights: use {LOAD} or {SAVE}")
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ValueError(
                    f"{key}={name!r} is not a file name: use letters, digits, '.', '_' and '-', and no folder"
                )
            if self.folder is None:
                setting = json.dumps({SETTING: "FOLDER"})
                raise ValueError(f"{key}={name}: this server has no folder of books (--additional-config '{setting}')")
        if LOAD in asked:
            path = self.folder / asked[LOAD]
            if not path.is_file() or path.resolve().parent != self.folder:
                raise ValueError(f"{LOAD}={asked[LOAD]}: there is no such file in the server's folder of books")
            self._check_file(path)
        if SAVE in asked:
            if os.path.lexists(self.folder / asked[SAVE]):
                raise ValueError(f"{SAVE}={asked[SAVE]}: a file of this name exists; choose another name")
            if not os.access(self.folder, os.W_OK):
                raise ValueError(f"{SAVE}={asked[SAVE]}: the server may not write to its folder of books")

    def _check_file(self, path: Path) -> None:
        status = path.stat()
        seen = status.st_mtime_ns, status.st_size, status.st_ino
        if self.checked.get(path) != seen:
            found = self.read(path)
            tensors = (one for state in found.states() for one in (*state.sums, *state.tails) if one is not None)
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                raise ValueError(f"'{path.name}' holds fast weights that are not finite")
            self.checked[path] = seen

    def read(self, path: Path) -> FastWeights:
        """Open a book. Raise ValueError if it is damaged, or does not fit the model."""
        try:
            found = FastWeights.load(str(path))
            keys = self.keys
            shapes = {layer: (keys.hidden_size, keys.intermediate_size) for layer in keys.ttt_layers}
            found.check_fits(str(path), shapes, keys.ttt_chunk, keys.ttt_target == "input_embed")
            found.check_made_with(str(path), self.fingerprint, self.tokenizer)
        except ValueError as error:  # a client does not see the folder
            raise ValueError(str(error).replace(str(path), path.name)) from error
        if found.rows != 1:
            raise ValueError(f"'{path.name}' holds {found.rows} texts: a request takes a file with one")
        return found

    @cached_property
    def tokenizer(self):
        """The tokenizer of the model; None if the server uses none."""
        if self.config.skip_tokenizer_init:
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.config.tokenizer, revision=self.config.tokenizer_revision)

    def fingerprint(self) -> str:
        """Return the fingerprint of the model, as the exported model computes it, from the files of its weights."""
        if self._fingerprint is None:
            settings = {key: getattr(self.keys, key) for key in FINGERPRINT_KEYS}
            self._fingerprint = fingerprint_of_weights(self._weights(), settings)
        return self._fingerprint

    def _weights(self):
        folder = Path(self.config.model)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(self.config.model, revision=self.config.revision, local_files_only=True))
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name != "lm_head.weight" or not self.keys.tie_word_embeddings:
                        yield name, file.get_tensor(name)

    def begin(self, request: str, prompt: list[int], extra_args: dict | None) -> "Request":
        """Return what a request loads and saves. A request that starts again, after it was preempted, is known.

        Raises ValueError if its book has gone, or was replaced by a damaged one, since it was checked.
        """
        found = self.requests.get(request)
        if found is None:
            found = Request()
            asked = extra_args or {}
            found.save, found.prompt = asked.get(SAVE), prompt
            if asked.get(LOAD) is not None:
                found.book = self.read(self.folder / asked[LOAD])
            if found.book is not None or found.save is not None:
                self.requests[request] = found
                if len(self.requests) > KNOWN_REQUESTS:
                    self.requests.popitem(last=False)
        return found


class Request:
    """Hold the loaded book of a request, and the name under which to save its state."""

    def __init__(self):
        self.book: FastWeights | None = None
        self.save: str | None = None  # None: nothing is left to save
        self.prompt: list[int] = []


def load_slot(layers: list, slot: int, book: FastWeights, rank: int) -> None:
    """Copy a book with one text to a slot of the layers; ``rank`` is the tensor-parallel rank."""
    slots = layers[0].slots
    count = book.counts[0]
    for layer in layers:
        state, width = book.layers[layer.number], layer.updates.shape[2]
        if state.sums[0] is not None:
            part = LayerState(1)
            columns = slice(rank * width, (rank + 1) * width)
            part.sums = [state.sums[0][:, columns]]
            part.rests = [None if state.rests[0] is None else state.rests[0][:, columns]]
            layer.store(slot, part.sum_of(0, layer.updates.device))
            slots.loaded[slot] = True
        layer.limits[slot] = state.limits[0]
        if count:
            layer.put_tail(slot, state.tails[0].to(layer.tails), 0, None)
    if slots.embed_tails is not None and count:
        slots.embed_tails[slot, :count] = book.embeds.tails[0].to(slots.embed_tails)
    slots.chunks[slot] = book.chunks[0]
    slots.earlier[slot] = book.chunks[0] * slots.chunk + count


def state_of_slot(layers: list, slot: int, tokens: int) -> FastWeights:
    """Return the state of a slot as a book with one text, on every tensor-parallel rank.

    ``tokens``: tokens in the state; chunks that they complete are in the sums.
    """
    slots, found = layers[0].slots, FastWeights()
    count = tokens % slots.chunk
    found.counts, found.chunks = [count], [slots.chunks[slot]]
    for layer in layers:
        state = found.layers[layer.number] = LayerState(1)
        if slots.chunks[slot] or slots.loaded[slot]:
            state.sums = [layer.gather(layer.updates[slot]).cpu()]
            if layer.rests is not None:
                state.rests = [layer.gather(layer.rests[slot]).cpu()]
        state.limits = [layer.limits[slot].item()]
        if count:
            state.tails = [layer.tails[slot, :count].cpu()]
    if slots.embed_tails is not None:
        found.embeds = LayerState(1)
        found.embeds.tails = [slots.embed_tails[slot, :count].cpu() if count else None]
    return found


def save_state(books: Books, found: FastWeights, request: Request) -> None:
    """Write a state to the folder of books. An error is logged: the answers of all requests go on."""
    before, tokenizer = request.book, books.tokenizer
    found.model = books.fingerprint()
    found.tokenizer = None if tokenizer is None else fingerprint_of_tokenizer(tokenizer)
    found.texts = [
        (before.texts[0] if before is not None and before.texts else []) + [text_record(request.prompt, None)]
    ]
    path = books.folder / request.save
    try:
        if os.path.lexists(path):
            raise OSError("a file of this name exists")
        found.save(str(path))
    except (OSError, RuntimeError, ValueError) as error:
        logger.error("fast weights were not saved as %s: %s", path, error)
