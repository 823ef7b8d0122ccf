"""Run vLLM's engine: engine.py MODEL REQUESTS.json SETTINGS.json. Prints tokens and log-probabilities as JSON.

It runs on a GPU if there is one, else on a CPU, in the environment of launch/setup_vllm.sh. There, the second model
runner, which has the hooks that the plugin uses, has Triton kernels; they run in Triton's interpreter, which wants a
backend that says that it is active.
"""

import gc
import importlib.metadata
import json
import os
import random
import sys
import types

import torch

os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


def interpret_kernels() -> None:
    """Run Triton's kernels in its interpreter, on a CPU."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1")
    import triton.backends

    triton.backends.backends["cpu"] = types.SimpleNamespace(compiler=None, driver=_Driver)
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "0.26.0+cpu" if name == "vllm" else version(name)


def put_fault(fault: str) -> None:
    """Change the plugin so that it is wrong, to show that tests see it."""
    from inplace_ttt_vllm import books, mlp

    if fault == "slots are not cleared":
        mlp.FastWeightMLP.clear = lambda self, slot: None
    elif fault == "slots are exchanged":
        store = mlp.FastWeightMLP.store
        mlp.FastWeightMLP.store = lambda self, slot, total: store(self, (slot + 1) % self.slots.number, total)
    elif fault == "decoded chunks are forgotten":
        mlp.FastWeightMLP.fold = lambda self, slot, chunks: None
    elif fault == "books are gone":
        begin = books.Books.begin

        def gone(self, request, prompt, extra_args):
            if (extra_args or {}).get("ttt_load"):
                raise FileNotFoundError("no such file")
            return begin(self, request, prompt, extra_args)

        books.Books.begin = gone
    elif fault == "the disk is full":

        def full(self, path):
            raise books.SafetensorError("no space left on device")

        books.FastWeights.save = full
    else:
        raise SystemExit(fault)


def bytes_of_tensors() -> int:
    """Return the bytes of all tensors that live, on a GPU of those on it."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and one.device.type == "cpu" and one.layout == torch.strided:
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())


def churn(engine, number: int) -> list[int]:
    """Run many random requests, and abort every third before it ends. Return the bytes of tensors in between."""
    from vllm import SamplingParams

    choices, found = random.Random(0), []
    for first in range(0, number, 50):
        for name in map(str, range(first, first + 50)):
            prompt = choices.choices(range(1, 199), k=choices.randint(1, 70))
            params = SamplingParams(max_tokens=choices.randint(1, 8), temperature=0, detokenize=False, ignore_eos=True)
            engine.add_request(name, dict(prompt_token_ids=prompt), params)
        aborted = set(range(first, first + 50, 3))
        while engine.has_unfinished_requests():
            engine.step()
            if aborted:
                engine.abort_request([str(aborted.pop())])
        found.append(bytes_of_tensors())
    return found


def main(model: str, requests: str, settings: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if torch.cuda.is_available():
        os.environ["TRITON_F32_DEFAULT"] = "ieee"  # products of fp32 in attention's kernels are not TF32
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # torch has started CUDA, so a fork cannot use it
    else:
        interpret_kernels()
    from vllm import LLM, SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler

    preempt, preempted = Scheduler._preempt_request, []

    def counted(self, request, *args):
        preempted.append(request.request_id)
        return preempt(self, request, *args)

    Scheduler._preempt_request = counted
    with open(settings) as file:
        options = json.load(file)
    fault, number = options.pop("broken", None), options.pop("churn", 0)
    if fault:
        put_fault(fault)
    with open(requests) as file:
        asked = json.load(file)
    default = dict(skip_tokenizer_init=True, dtype="float32", max_model_len=512, max_num_seqs=3, enforce_eager=True)
    if torch.cuda.is_available():
        default |= dict(gpu_memory_utilization=0.1, kv_cache_memory_bytes=2**28)
    engine = LLM(model, **default | options)
    if number:
        print("BYTES", json.dumps(churn(engine.llm_engine, number)))

    def params_of(one: dict) -> SamplingParams:
        options = dict(temperature=0, detokenize=False, ignore_eos=True, logprobs=0)
        if one.get("samples"):
            options |= dict(n=one["samples"], temperature=1, top_k=1)  # greedy by another name: n needs sampling
        return SamplingParams(max_tokens=one["tokens"], extra_args=one.get("extra"), **options)

    refused = []
    for one in list(asked):
        if one.get("refused"):
            asked.remove(one)
            try:
                engine.generate([dict(prompt_token_ids=one["prompt"])], params_of(one))
                refused.append("")
            except ValueError as error:
                refused.append(str(error))
    print("REFUSED", json.dumps(refused))
    params = [params_of(one) for one in asked]
    outputs = engine.generate([dict(prompt_token_ids=one["prompt"]) for one in asked], params)
    results = [sample for one in outputs for sample in one.outputs]
    print("PREEMPTED", len(preempted))
    print("TOKENS", json.dumps([list(one.token_ids) for one in results]))
    logprobs = [
        [places[token].logprob for places, token in zip(one.logprobs, one.token_ids, strict=True)] for one in results
    ]
    print("LOGPROBS", json.dumps(logprobs), flush=True)
    os._exit(0)  # vLLM's threads end with it


if __name__ == "__main__":
    main(*sys.argv[1:])
