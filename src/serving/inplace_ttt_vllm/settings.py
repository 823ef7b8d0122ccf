"""Check the engine's settings that fast weights need, before the model is loaded."""

from collections.abc import Callable

import torch
from vllm.config import CompilationConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from inplace_ttt_vllm.books import Books
from inplace_ttt_vllm.hf.modeling_inplace_ttt import check_keys, complete_keys

OPERATION = "inplace_ttt::fast_weight_mlp"  # graphs are split at it, so that prompts run outside of graphs
CACHE_UPDATES = ("vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update")  # vLLM splits there by default
PREFIX_CACHING = (
    "prefix caching is not supported with fast weights: a cached prefix has keys and values, but not its fast weights; "
    "leave enable_prefix_caching out, or set it to False"
)


class FastWeightSettings(VerifyAndUpdateConfig):
    """Check and complete the configuration of a model with fast weights."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Split graphs at the fast-weight operation. Raise ValueError for a setting that does not fit fast weights."""
        keys = vllm_config.model_config.hf_config
        complete_keys(keys)
        check_keys(keys)
        if getattr(keys, "mlp_bias", False):
            raise ValueError("mlp_bias=true is not supported with fast weights")
        if vllm_config.cache_config.enable_prefix_caching:
            raise ValueError(PREFIX_CACHING)
        unsupported = {
            "speculative decoding": ("speculative_config", vllm_config.speculative_config),
            "LoRA adapters": ("enable_lora", vllm_config.lora_config),
            "transfer of keys and values": ("kv_transfer_config", vllm_config.kv_transfer_config),
            "offloading of keys and values": ("kv_offloading_size", vllm_config.cache_config.kv_offloading_size),
            "quantization": ("quantization", vllm_config.model_config.quantization),
        }
        for what, (setting, value) in unsupported.items():
            if value is not None:
                raise ValueError(f"{what}: not supported with fast weights; leave {setting} out")
        if vllm_config.parallel_config.pipeline_parallel_size > 1 and keys.ttt_target == "input_embed":
            raise ValueError("pipeline_parallel_size > 1 is not supported with ttt_target=input_embed: use 1")
        check_runner(vllm_config)
        check_graphs(vllm_config.compilation_config)
        check_memory(vllm_config)
        check_requests(Books(vllm_config))
        compilation = vllm_config.compilation_config
        if compilation.splitting_ops is None:  # vLLM would add its own after this
            compilation.splitting_ops = [*CompilationConfig._attention_ops, *CACHE_UPDATES]
        if OPERATION not in compilation.splitting_ops:
            compilation.splitting_ops.append(OPERATION)


def check_runner(vllm_config: VllmConfig) -> None:
    """Raise ValueError if vLLM would use its first model runner, which has no hooks for the state of requests."""
    runner = vllm_config.model_config.runner_type
    if runner != "generate":
        raise ValueError(f"runner={runner} is not supported with fast weights: use generate")
    if not vllm_config.use_v2_model_runner:
        causes = getattr(vllm_config, "_get_v2_model_runner_unsupported_features", list)()
        said = f", which these settings rule out: {', '.join(causes)}" if causes else ""
        raise ValueError(
            f"fast weights need vLLM's second model runner{said}; leave such settings out, and do not set "
            f"VLLM_USE_V2_MODEL_RUNNER=0"
        )


BOOKS: list[Books] = []  # of the engines of this process


def check_requests(books: Books) -> None:
    """Make vLLM check the requests of this process: the books that they name, and that they are complete."""
    BOOKS.append(books)

    def books_of(verify, self, model_config, *args, **options):
        for one in BOOKS:
            if one.config is model_config:
                one.check(self.extra_args, self.n)
        return verify(self, model_config, *args, **options)

    def no_parts(process, self, *args, resumable=False, **options):
        if resumable and any(one.config is self.vllm_config.model_config for one in BOOKS):
            raise ValueError("streaming input is not supported with fast weights: send the whole prompt")
        return process(self, *args, resumable=resumable, **options)

    _wrap(SamplingParams, "verify", books_of)
    _wrap(InputProcessor, "process_inputs", no_parts)


def check_graphs(compilation: CompilationConfig) -> None:
    """Raise ValueError if prompts would run inside of graphs."""
    if compilation.cudagraph_mode == CUDAGraphMode.FULL:
        raise ValueError(
            "cudagraph_mode=FULL is not supported with fast weights, because prompts run outside of graphs: use "
            "FULL_AND_PIECEWISE (the default), FULL_DECODE_ONLY, PIECEWISE or NONE"
        )


def rest_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype of what ``split_sum`` stores beside sums rounded to a dtype; None: nothing."""
    return {torch.float32: None, torch.bfloat16: torch.int16}.get(dtype, torch.float32)


def bytes_of_request(model_config, ranks: int) -> int:
    """Return the device memory of the state of one request on each of this many tensor-parallel ranks, in bytes."""
    keys, dtype = model_config.hf_config, model_config.dtype
    complete_keys(keys)
    if not keys.ttt_mode or not keys.ttt_layers:
        return 1
    rest = rest_dtype(dtype)
    d, f = keys.hidden_size, keys.intermediate_size // ranks
    tails = len(keys.ttt_layers) + (keys.ttt_target == "input_embed")
    each = dtype.itemsize + (0 if rest is None else rest.itemsize)
    return len(keys.ttt_layers) * d * f * each + tails * keys.ttt_chunk * d * dtype.itemsize


def check_memory(vllm_config: VllmConfig) -> None:
    """Raise ValueError if the states of max_num_seqs requests do not fit in the memory that vLLM may use."""
    parallel, number = vllm_config.parallel_config, vllm_config.scheduler_config.max_num_seqs
    each = bytes_of_request(vllm_config.model_config, parallel.tensor_parallel_size)
    usable = vllm_config.cache_config.gpu_memory_utilization * current_platform.get_device_total_memory()
    if (number + 1) * each > usable:
        raise ValueError(
            f"max_num_seqs={number} needs {number * each / 1e9:,.0f} GB for fast weights ({each / 1e9:.2f} GB per "
            f"request), and vLLM may use {usable / 1e9:,.0f} GB of the device: use at most "
            f"{requests_that_fit(each, usable)}"
        )


def requests_that_fit(each: int, usable: float, share: float = 0.25) -> int:
    """Return how many states of this many bytes fit in a share of the usable memory; at least 1."""
    return max(1, int(usable * share / each) - 1)


def set_defaults(architectures: tuple[str, ...]) -> None:
    """Change two defaults of vLLM for these architectures.

    Prefix caching is off, and an error if it is requested. Without max_num_seqs, the engine takes as many requests as
    have their states in a quarter of the device's memory. vLLM keeps no record of which settings a caller gave, so the
    methods that apply the defaults are wrapped.
    """

    def prefix_caching(apply, self, model_config):
        if model_config.architecture in architectures:
            if self.enable_prefix_caching:
                raise ValueError(PREFIX_CACHING)
            self.enable_prefix_caching = False
        apply(self, model_config)

    def requests(apply, self, usage_context, model_config, parallel_config):
        default = self.max_num_seqs is None
        apply(self, usage_context, model_config, parallel_config)
        if default and model_config.architecture in architectures:
            usable = self.gpu_memory_utilization * current_platform.get_device_total_memory()
            each = bytes_of_request(model_config, self.tensor_parallel_size)
            self.max_num_seqs = min(self.max_num_seqs, requests_that_fit(each, usable))

    _wrap(EngineArgs, "_set_default_chunked_prefill_and_prefix_caching_args", prefix_caching)
    _wrap(EngineArgs, "_set_default_max_num_seqs_and_batched_tokens_args", requests)


def _wrap(kind: type, name: str, action: Callable) -> None:
    """Replace a method of a class by ``action(method, self, *args)``, once. Do nothing where vLLM lacks it."""
    method = getattr(kind, name, None)
    if method is not None and not hasattr(method, "before_fast_weights"):

        def wrapped(self, *args, **options):
            return action(method, self, *args, **options)

        wrapped.before_fast_weights = method
        setattr(kind, name, wrapped)
