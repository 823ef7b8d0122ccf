"""Run vLLM's engine on a CPU: engine.py MODEL REQUESTS.json SETTINGS.json. Prints the tokens of each request as JSON.

It needs the environment of launch/setup_vllm.sh. The second model runner, which has the hooks that the plugin uses, has
Triton kernels; they run in Triton's interpreter, which wants a backend that says that it is active.
"""

import importlib.metadata
import json
import os
import sys
import types

os.environ.update(
    VLLM_USE_V2_MODEL_RUNNER="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    TRITON_INTERPRET="1",
    TORCHDYNAMO_DISABLE="1",
)
import triton.backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends["cpu"] = types.SimpleNamespace(compiler=None, driver=_Driver)
_version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.26.0+cpu" if name == "vllm" else _version(name)


def main(model: str, requests: str, settings: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler

    preempt, preempted = Scheduler._preempt_request, []

    def counted(self, request, *args):
        preempted.append(request.request_id)
        return preempt(self, request, *args)

    Scheduler._preempt_request = counted
    with open(settings) as file:
        options = json.load(file)
    broken = options.pop("broken", None)  # a fault that must be seen in the tokens
    if broken:
        from inplace_ttt_vllm import mlp

        if broken == "slots are not cleared":
            mlp.FastWeightMLP.clear = lambda self, slot: None
        elif broken == "slots are exchanged":
            read = mlp.FastWeightMLP.store
            mlp.FastWeightMLP.store = lambda self, slot, total: read(self, (slot + 1) % self.slots.number, total)
        elif broken == "decoded chunks are forgotten":
            mlp.FastWeightMLP.fold = lambda self, slot: None
        else:
            raise SystemExit(broken)
    with open(requests) as file:
        asked = json.load(file)
    default = dict(skip_tokenizer_init=True, dtype="float32", max_model_len=512, max_num_seqs=3, enforce_eager=True)
    engine = LLM(model, **default | options)
    params = [
        SamplingParams(max_tokens=one["tokens"], temperature=0, detokenize=False, ignore_eos=True) for one in asked
    ]
    outputs = engine.generate([dict(prompt_token_ids=one["prompt"]) for one in asked], params)
    print("PREEMPTED", len(preempted))
    print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in outputs]), flush=True)
    os._exit(0)  # vLLM's threads end with it


if __name__ == "__main__":
    main(*sys.argv[1:])
