"""Load and save books over the API: a request starts from saved fast weights, or saves those after its prompt.

The server reads and writes files of one folder, given as ``--additional-config '{"ttt_books": FOLDER}'``. A request
names a file in ``extra_args`` of its sampling parameters (``vllm_xargs`` over HTTP): ``ttt_load`` or ``ttt_save``. The
files are those of the exported model (``FastWeights.save``).
"""

import contextlib
import json
import os
import re
import stat
import time
import uuid
from collections import OrderedDict
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
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
LARGEST = 1e4  # of the numbers of a book; those of real ones are below 100. Others could overflow in products
OLD_RESERVATION = 3600.0  # seconds


class Books:
    """Check the books that requests name, load and save them. There is one in each process of the server."""

    def __init__(self, vllm_config):
        self.config = vllm_config.model_config
        self.keys = self.config.hf_config
        settings = vllm_config.additional_config
        settings = settings if isinstance(settings, dict) else {}
        unknown = [key for key in settings if key.startswith("ttt_") and key != SETTING]
        if unknown:
            raise ValueError(f"additional_config has {unknown[0]}, which is not known: use {SETTING}")
        folder = settings.get(SETTING)
        if folder is not None and not (isinstance(folder, str) and Path(folder).is_dir()):
            raise ValueError(f"additional_config has {SETTING}={folder!r}, which is not a folder: create it first")
        if folder is not None and vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError(f"{SETTING} is not supported with pipeline_parallel_size > 1: use 1, or leave it out")
        self.folder = None if folder is None else Path(folder).resolve()
        self.checked: dict[Path, tuple] = {}  # files that were checked: time, size and inode then
        # running requests, and as many that have ended or were preempted
        self.requests: OrderedDict[str, Request] = OrderedDict()
        self.idle_requests = vllm_config.scheduler_config.max_num_seqs
        if folder is not None and Path(self.config.model).is_dir():
            _ = self.fingerprint  # of the weights that are loaded now

    def check(self, extra_args: dict | None, samples: int = 1) -> None:
        """Check the arguments of a request, before it is queued. Raise ValueError if it cannot be served.

        A name to save is reserved by an empty file.
        """
        asked = {key: value for key, value in (extra_args or {}).items() if key.startswith("ttt_")}
        for key, name in asked.items():
            if not self.keys.ttt_mode or not self.keys.ttt_layers:
                raise ValueError(f"{key}={name}: this model has no fast weights (ttt_mode, ttt_layers)")
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
            try:
                self._check_file(self.folder / asked[LOAD])
            except OSError as error:
                raise ValueError(f"{LOAD}={asked[LOAD]}: the server cannot read it ({error.strerror})") from None
        if SAVE in asked:
            if samples > 1:
                raise ValueError(f"{SAVE}={asked[SAVE]} with n={samples}: a state is saved for one sample; use n=1")
            if not self.reserve(asked[SAVE]):
                raise ValueError(f"{SAVE}={asked[SAVE]}: a file of this name exists; choose another name")

    def reserve(self, name: str) -> bool:
        """Create an empty file, and return False if there is one already. Raise ValueError if it cannot be created."""
        path = self.folder / name
        try:
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                old = time.time() - status.st_mtime > OLD_RESERVATION
                if old and status.st_size == 0 and stat.S_ISREG(status.st_mode):
                    path.unlink()  # of a request that never ran
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        except OSError as error:
            raise ValueError(f"{SAVE}={name}: the server cannot write it ({error.strerror})") from None
        return True

    def release(self, name: str) -> None:
        """Remove the empty file of a name whose state was not saved."""
        path = self.folder / name
        with contextlib.suppress(OSError):
            if path.lstat().st_size == 0:
                path.unlink()

    def _check_file(self, path: Path) -> None:
        if not path.is_file() or path.resolve().parent != self.folder:
            raise ValueError(f"{LOAD}={path.name}: there is no such file in the server's folder of books")
        status = path.stat()
        seen = status.st_mtime_ns, status.st_size, status.st_ino
        if self.checked.get(path) != seen:
            found = self.read(path)
            for state in found.states():
                for tensor in (one for one in (*state.sums, *state.tails) if one is not None):
                    if not bool((tensor.abs() <= LARGEST).all()):  # also false for NaN
                        raise ValueError(f"'{path.name}' holds fast weights that are not finite, or above {LARGEST:g}")
            self.checked[path] = seen

    def read(self, path: Path) -> FastWeights:
        """Open a book. Raise ValueError if it is damaged, or does not fit the model."""
        keys = self.keys
        try:
            with safe_open(path, framework="pt") as file:
                if len(file.keys()) > 3 * (len(keys.ttt_layers) + 1) + 1:
                    raise ValueError(f"'{path}' holds more tensors than a book of this model with one text")
            found = FastWeights.load(str(path))
            shapes = {layer: (keys.hidden_size, keys.intermediate_size) for layer in keys.ttt_layers}
            found.check_fits(str(path), shapes, keys.ttt_chunk, keys.ttt_target == "input_embed")
            found.check_made_with(str(path), lambda: self.fingerprint, self.tokenizer)
        except SafetensorError as error:
            raise ValueError(f"'{path.name}' is not a valid file of fast weights ({error})") from None
        except ValueError as error:  # a client does not see the folder
            raise ValueError(str(error).replace(str(path), path.name)) from None
        if found.rows != 1:
            raise ValueError(f"'{path.name}' holds {found.rows} texts: a request takes a file with one")
        return found

    @cached_property
    def tokenizer(self):
        """Return the tokenizer of the model; None if the server uses none."""
        if self.config.skip_tokenizer_init:
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.config.tokenizer, revision=self.config.tokenizer_revision)

    @cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint of the model, as the exported model computes it, from the files of its weights."""
        return fingerprint_of_weights(self._weights(), {key: getattr(self.keys, key) for key in FINGERPRINT_KEYS})

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

        Raises ValueError or OSError if its book has gone, or was replaced by a damaged one, since it was checked.
        """
        asked = {key: value for key, value in (extra_args or {}).items() if key in (LOAD, SAVE)}
        found = self.requests.get(request)
        if found is None or (found.prompt, found.asked) != (prompt, asked):
            found = Request(prompt, asked)
            if LOAD in asked:
                found.book = self.read(self.folder / asked[LOAD])
        elif found.save is not None:
            self.reserve(found.save)  # it was released as the request was preempted
        if asked:
            self.requests[request] = found
            found.runs = True
        return found

    def end(self, request: str) -> None:
        """Note that a request has ended, or was preempted and will begin again."""
        found = self.requests.get(request)
        if found is None:
            return
        found.runs = False
        if found.save is not None:
            self.release(found.save)
        self.requests.move_to_end(request)
        idle = [name for name, one in self.requests.items() if not one.runs]
        for name in idle[: -self.idle_requests]:
            del self.requests[name]


class Request:
    """Hold the loaded book of a request, and the name under which to save its state."""

    def __init__(self, prompt: list[int], asked: dict[str, str]):
        self.prompt, self.asked = prompt, asked
        self.book: FastWeights | None = None
        self.save: str | None = asked.get(SAVE)  # None: nothing is left to save
        self.runs = False


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
    path, beside = books.folder / request.save, books.folder / f".{request.save}.{uuid.uuid4().hex}"
    try:
        before, tokenizer = request.book, books.tokenizer
        found.model = books.fingerprint
        found.tokenizer = None if tokenizer is None else fingerprint_of_tokenizer(tokenizer)
        texts = before.texts[0] if before is not None and before.texts else []
        found.texts = [[*texts, text_record(request.prompt, None)]]
        found.save(str(beside))
        if path.exists() and path.stat().st_size:  # only the empty file that reserves the name is replaced
            raise FileExistsError("a file of this name exists")
        os.replace(beside, path)
    except Exception as error:  # safetensors raises a class of its own; no other request must fail
        logger.error("fast weights were not saved as %s: %s", path, error)
        books.release(request.save)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
