"""Measure vLLM with the plugin inplace-ttt-vllm, against the same engine without fast weights and transformers."""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from inplace_ttt.benchmarks import decode
from inplace_ttt.config import Config, UserError
from inplace_ttt.hf.config import write_config

BASE, OURS, TRANSFORMERS = "vLLM, off", "vLLM, on", "transformers, on"
ENGINE = Path(__file__).with_name("serve_engine.py")


class Engine:
    """Run ``serve_engine.py`` in a process of its own."""

    def __init__(self, python: str, settings: dict, folder: Path, log: Path):
        path = folder / "settings.json"
        path.write_text(json.dumps(settings))
        self.log = log.open("w+")
        self.process = subprocess.Popen(
            [python, str(ENGINE), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def answer(self) -> dict:
        """Wait for an answer. Raises UserError with the engine's last error if it has ended."""
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
            self.log.write(line)
        self.log.seek(0)
        lines = [line.strip() for line in self.log if "Error" in line]
        raise UserError(
            f"vLLM's engine has ended: {lines[-1] if lines else 'no error is known'} (log: {self.log.name})"
        )

    def measure(self, **asked) -> dict:
        """Measure one request, or several streams; see ``serve_engine.Engine``."""
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def python_with_vllm(asked: str | None, root: Path) -> str:
    """Return the interpreter of the environment with vLLM: the given one, this one, or that of .venv-vllm.

    Raises UserError if none of them has vLLM.
    """
    if asked is None and find_spec("vllm") is not None:
        return sys.executable
    python = asked or str(root / ".venv-vllm/bin/python")
    code = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('vllm', 'inplace_ttt_vllm'))))"
    with contextlib.suppress(OSError):
        if subprocess.run([python, "-c", code], check=False).returncode == 0:
            return python
    raise UserError(
        f"{python} has no vLLM with the plugin inplace-ttt-vllm: install both (pip install vllm ./src/serving), and "
        "give that environment's interpreter with --vllm-python"
    )


@contextlib.contextmanager
def engines(
    config: Config, python: str, length: int, tokens: int, streams: int, logs: Path
) -> Iterator[dict[str, Engine]]:
    """Start an engine without and one with fast weights, with random weights, on the same device.

    Args:
        length: tokens of the longest text.
        tokens: tokens whose keys and values are stored at a time.
        streams: most requests at a time.
        logs: folder for the engines' logs.
    """
    logs.mkdir(parents=True, exist_ok=True)
    model, found = config.model, {}
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        for name, enabled in ((BASE, False), (OURS, True)):
            folder = Path(place) / name
            folder.mkdir()
            variant = replace(config, ttt=replace(config.ttt, enabled=enabled))
            keys = write_config(variant, "bfloat16", base=None) | dict(max_position_embeddings=length)
            keys.pop("auto_map", None)
            (folder / "config.json").write_text(json.dumps(keys))
            each = 2 * 2 * model.num_layers * model.num_query_groups * model.kv_channels  # bytes of a token
            settings = dict(
                model=str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", seed=0,
                max_model_len=length, max_num_seqs=streams, enable_prefix_caching=False, gpu_memory_utilization=0.4,
                kv_cache_memory_bytes=int(1.1 * each * tokens) + 2**28, vocab_size=model.vocab_size,
                chunk=config.ttt.chunk_size,
            )  # fmt: skip
            engine = Engine(python, settings, folder, logs / f"engine_{'on' if enabled else 'off'}.log")
            stack.callback(engine.stop)
            engine.answer()  # one after the other: vLLM measures the free memory as it starts
            found[name] = engine
        yield found


def measure(
    config: Config,
    python: str,
    streams: list[tuple[int, int]],
    tokens: int,
    prompts: list[int],
    rounds: int,
    logs: Path,
) -> list[dict]:
    """Return records of decoding with several streams, and of the time to the first token.

    Args:
        python: interpreter of an environment with vLLM and the plugin.
        streams: numbers of requests that decode at a time, with the prompt tokens of the shortest one; the others are
            longer by up to a chunk, so that their chunks end at different steps.
        tokens: decoded tokens per request.
        prompts: lengths of the prompts whose first token is timed.
        rounds: rounds in turns; each value is the median. A round before them is a warm-up.
        logs: folder for the engines' logs.
    """
    records = []
    more = config.ttt.chunk_size + tokens + 1024
    length = max(*(after + more for _, after in streams), *(prompt + 16 for prompt in prompts))
    stored = max(*(number * (after + more) for number, after in streams), *(prompt + 16 for prompt in prompts))
    most = max(number for number, _ in streams)
    with engines(config, python, length, stored, most, logs) as found:
        for number, after in streams:
            asked = dict(streams=number, after=after, tokens=tokens)
            rows = _in_turns(found, rounds, "tokens_per_second", asked)
            for name, speeds in rows.items():
                ratio = statistics.median(a / b for a, b in zip(speeds, rows[BASE], strict=True))
                value = statistics.median(speeds)
                case = f"{number} x {after}"
                records.append(dict(variant=name, case=case, value=value, unit="tokens/s", ratio=ratio))
        for prompt in prompts:
            rows = _in_turns(found, rounds, "seconds", dict(prompt=prompt))
            for name, times in rows.items():
                ratio = statistics.median(a / b for a, b in zip(times, rows[BASE], strict=True))
                value = 1e3 * statistics.median(times)
                records.append(dict(variant=name, case=f"first token, {prompt}", value=value, unit="ms", ratio=ratio))
    models = decode.Models.build(config, torch.device("cuda", torch.cuda.current_device()))
    for number, after in streams:
        step = decode.one_decode(models, number, after, min(tokens, 128))
        case = f"{number} x {after}"
        speed = 1e3 * number / step["mean_ms"]
        plain = next(one["value"] for one in records if one["variant"] == BASE and one["case"] == case)
        records.append(dict(variant=TRANSFORMERS, case=case, value=speed, unit="tokens/s", ratio=speed / plain))
    return records


def _in_turns(found: dict[str, Engine], rounds: int, key: str, asked: dict) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, engine in found.items():
            value = engine.measure(**asked)[key]
            print(f"{name}, {asked}: {value:,.3f} {key}", file=sys.stderr, flush=True)
            if number:
                values[name].append(value)
    return values
