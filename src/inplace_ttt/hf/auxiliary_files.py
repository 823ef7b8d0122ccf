"""Copy the files of a model other than its weights: tokenizer, generation config and the original config.json.

A run keeps copies in ``run.dir/hf``, so that it can be exported even if the files it was started with are gone.
"""

import contextlib
import shutil
from pathlib import Path

from inplace_ttt.config import Config, UserError, config_from_values
from inplace_ttt.files import read_json, read_yaml, user_path, write_json

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
FOLDER = "hf"


def copy_auxiliary_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy the files that exist.

    Raises UserError for a link that leads out of ``source``, since it could expose any file that the user can read.
    """
    for name in names:
        path = source / name
        if path.is_file():
            if not _inside(path, source):
                raise UserError(f"'{path}' is a link that leads out of its folder: replace it by a copy of the file")
            shutil.copyfile(path, target / name)


def save_auxiliary_files(config: Config, run: Path) -> None:
    """Copy the auxiliary files of a run into ``run.dir/hf``, unless that folder exists."""
    target = run / FOLDER
    if target.exists():
        return
    base, tokenizer = find_base_folder(config, run), find_tokenizer_folder(config, run)
    if base is None and tokenizer is None:
        return
    partial = run / f".{FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if base is not None:
        copy_auxiliary_files(base, partial, (CONFIG, GENERATION, *TOKENIZER))
    if tokenizer is not None:
        copy_auxiliary_files(tokenizer, partial, TOKENIZER)
    partial.rename(target)


def find_base_folder(config: Config, run: Path, seen: frozenset[Path] = frozenset()) -> Path | None:
    """Return the folder with the config.json that a run was started from; follow ``checkpoint.load`` through earlier
    runs. Return None if the run was started from random weights."""
    if (run / FOLDER / CONFIG).is_file():
        return run / FOLDER
    if not config.checkpoint.load:
        return None
    load = _found(config.checkpoint.load, run)
    if load is None or load in seen:
        return None
    if (load / FOLDER / CONFIG).is_file():
        return load / FOLDER
    for before in (load, load.parent.parent):
        if (before / "config.yaml").is_file() and before.resolve() not in seen | {run.resolve()}:
            return find_base_folder(read_run_config(before), before, seen | {load, run.resolve(), before.resolve()})
    return None


def find_tokenizer_folder(config: Config, run: Path) -> Path | None:
    """Return the folder of the tokenizer of a run's data; None: the run names none.

    Raises UserError if the named tokenizer does not exist.
    """
    kept = run / FOLDER
    if any((kept / name).is_file() for name in TOKENIZER):
        return kept
    if config.data.kind != "indexed":
        return None
    named = [config.data.tokenizer] if config.data.tokenizer else []
    named += [f"{source.path}.tokenizer" for source in config.data.sources[:1]]
    for name in named:
        folder = _found(name, run)
        if folder is not None:
            return folder
        if config.data.tokenizer == name and not name.startswith((".", "/", "~")):
            return _from_hub(name)
    if named and any(_found(f"{source.path}.json", run) for source in config.data.sources[:1]):
        raise UserError(
            f"the tokenizer '{named[-1]}' of run '{run}' does not exist: restore it, or name another with "
            f"data.tokenizer (training) or --base (export)"
        )
    return None


def read_run_config(run: Path) -> Config:
    """Return the configuration of a run. Raises UserError if config.yaml is missing or damaged."""
    path = run / "config.yaml"
    return config_from_values(read_yaml(path), f"'{path}'")


def token_ids(tokenizer: Path | None, base: dict | None, generation: dict | None, strict: bool = True) -> dict:
    """Return eos_token_id (an ID or a list) and bos_token_id, from the original configs and the tokenizer.

    Raises UserError if ``strict`` and the tokenizer cannot be loaded.
    """
    base, generation = base or {}, generation or {}
    ends = _as_list(generation.get("eos_token_id", base.get("eos_token_id")))
    begin = generation.get("bos_token_id", base.get("bos_token_id"))
    if tokenizer is not None and any((tokenizer / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        from inplace_ttt.hf.tokenizer import load_tokenizer

        try:
            loaded = load_tokenizer(str(tokenizer))
        except UserError:
            if strict:
                raise
            return _tokens(ends, begin)
        if loaded.eos_token_id is not None and loaded.eos_token_id not in ends:
            ends = [loaded.eos_token_id, *ends]
        begin = loaded.bos_token_id if begin is None else begin
    return _tokens(ends, begin)


def _tokens(ends: list[int], begin: int | None) -> dict:
    found = {} if not ends else dict(eos_token_id=ends[0] if len(ends) == 1 else ends)
    return found if begin is None else found | dict(bos_token_id=begin)


def _as_list(value) -> list[int]:
    return [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]


def _from_hub(name: str) -> Path:
    """Return the cache folder of a tokenizer of the hub; download it if necessary."""
    from huggingface_hub import snapshot_download

    from inplace_ttt.hub import hub_is_reached

    try:
        return Path(snapshot_download(name, allow_patterns=list(TOKENIZER), local_files_only=not hub_is_reached()))
    except Exception as error:
        raise UserError(
            f"the tokenizer '{name}' cannot be downloaded from the hub: name its folder with --base"
        ) from error


def _found(name: str, run: Path) -> Path | None:
    """Find a path of a run's configuration, relative to the working directory or to a parent folder of the run."""
    path = user_path(name)
    for root in (Path(), *run.resolve().parents):
        with contextlib.suppress(OSError):
            if (root / path).exists():
                return (root / path).resolve()
    return None


def _inside(path: Path, folder: Path) -> bool:
    """Return True if a file is inside the folder, or in the hub's cache that links of a snapshot folder point to."""
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent)
    return any(path.resolve().is_relative_to(one) for one in allowed)


def name_tokenizer_class(folder: Path) -> None:
    """Set tokenizer_class in a model folder if it is missing.

    Without it AutoTokenizer looks in the model's own code and asks for trust_remote_code.
    """
    path = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file():
        settings = read_json(path, "replace it") if path.is_file() else {}
        settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        write_json(path, settings, indent=2)


def read_base(folder: Path | None, name: str) -> dict | None:
    """Return the content of an auxiliary JSON file; None if it does not exist."""
    return read_json(folder / name, "replace it") if folder and (folder / name).is_file() else None
