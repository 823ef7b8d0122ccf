"""Decoding with the exported model, fast weights on against off: one text, token by token."""

import statistics
import time
from dataclasses import replace

import torch

from inplace_ttt.benchmarks.timing import ratio
from inplace_ttt.config import Config
from inplace_ttt.hf import modeling_inplace_ttt as exported
from inplace_ttt.hf.config import write_config


class Text:
    """A model with random weights that has read a prompt of ``prompt`` tokens and goes on from it."""

    def __init__(self, config: Config, prompt: int, device: torch.device):
        keys = write_config(config, "bfloat16", base=None)
        kind = getattr(exported, keys["architectures"][0])  # transformers' own class without fast weights
        with torch.device(device):
            torch.manual_seed(0)
            self.model = kind._from_config(kind.config_class.from_dict(keys), dtype=torch.bfloat16).eval()
        self.tokens = torch.randint(0, config.model.vocab_size, (1, prompt), device=device)
        self.cache = None
        self.read(self.tokens)

    @torch.no_grad()
    def read(self, tokens: torch.Tensor) -> None:
        found = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.tokens = found.past_key_values, found.logits[:, -1:].argmax(-1)

    def decode(self, count: int) -> None:
        for _ in range(count):
            self.read(self.tokens)


def measure(config: Config, tokens: int, rounds: int) -> list[dict]:
    """Return a record with fast weights and one without; each decodes ``tokens``, in ``rounds`` parts in turns.

    The prompt is one chunk, so every token is decoded with weights that were learned; with ``tokens`` a multiple of the
    chunk size an update is paid as often as in a long text.
    """
    # cuDNN's attention makes a plan for every new length of the keys, a millisecond each in every layer; which of the
    # two models torch gives to it depends on their masks, so neither gets it
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cuda", torch.cuda.current_device())
    configs = {"off": replace(config, ttt=replace(config.ttt, enabled=False)), "on": config}
    texts = {name: Text(variant, config.ttt.chunk_size, device) for name, variant in configs.items()}
    for text in texts.values():
        text.decode(min(16, tokens))  # kernels are loaded, libraries have chosen
    times = {name: [] for name in texts}
    for _ in range(rounds):
        for name, text in texts.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            text.decode(tokens // rounds)
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - started) / (tokens // rounds))
    return [
        dict(
            ttt=name,
            layers=config.model.num_layers,
            prompt=config.ttt.chunk_size,
            decoded=tokens // rounds * rounds,
            ms_per_token=1e3 * statistics.median(times[name]),
            slowest_round_ms=1e3 * max(times[name]),
            device_ms_per_token=_device_ms(text),
            ratio=ratio(times[name], times["off"]),
        )
        for name, text in texts.items()
    ]


def _device_ms(text: Text, count: int = 16) -> float:
    """Return the milliseconds of kernels a token: what is left where the host does not limit (CUDA graphs)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        text.decode(count)
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / count / 1e3
