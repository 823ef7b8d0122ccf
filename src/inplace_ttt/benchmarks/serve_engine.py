"""Run one vLLM engine for ``benchmark.py serve``: serve_engine.py SETTINGS.json. It needs vLLM, not this package.

It reads requests to measure from standard input, one JSON object per line, and answers each with a line that starts
with ``RESULT``. The engine runs in this process, so no time between processes is measured.
"""

import json
import os
import random
import sys
import time

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="1")


class Engine:
    """Measure an engine with random prompts."""

    def __init__(self, settings: dict):
        from vllm import LLM

        self.vocab_size, self.chunk = settings.pop("vocab_size"), settings.pop("chunk")
        self.engine = LLM(**settings).llm_engine
        self.number = 0

    def add(self, length: int, tokens: int) -> str:
        """Add a request with this many random prompt tokens, and tokens to generate."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.number += 1
        prompt = dict(prompt_token_ids=random.Random(self.number).choices(range(1, self.vocab_size), k=length))
        options = dict(temperature=0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA)
        self.engine.add_request(str(self.number), prompt, SamplingParams(max_tokens=tokens, **options))
        return str(self.number)  # the engine adds to it, but answers by it

    def step(self) -> dict[str, int]:
        """Run a step and return the number of new tokens per request."""
        return {one.request_id: len(one.outputs[0].token_ids) for one in self.engine.step()}

    def decode(self, streams: int, after: int, tokens: int) -> dict:
        """Return tokens per second of all streams, while all of them decode after this many tokens.

        Chunks end at different steps in each stream.
        """
        names = {self.add(after + number * self.chunk // streams, tokens + 1024) for number in range(streams)}
        waiting = set(names)
        while waiting:
            waiting -= {name for name, count in self.step().items() if count}
        started, found = time.perf_counter(), 0
        while found < streams * tokens:
            found += sum(self.step().values())
        seconds = time.perf_counter() - started
        self.engine.abort_request(list(names))
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return dict(tokens_per_second=found / seconds, ms_per_step=1e3 * seconds * streams / found)

    def first_token(self, prompt: int) -> dict:
        """Return the seconds from a request with this many prompt tokens to its first token."""
        started = time.perf_counter()
        self.add(prompt, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return dict(seconds=time.perf_counter() - started)


def main(path: str) -> None:
    lines = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # processes that vLLM starts must not read the lines
    with open(path) as file:
        engine = Engine(json.load(file))
    print("RESULT {}", flush=True)  # ready
    for line in lines:
        asked = json.loads(line)
        measure = engine.first_token if "prompt" in asked else engine.decode
        print("RESULT", json.dumps(measure(**asked)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
