"""Settings of the engine that fast weights need, checked before the model is loaded."""

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.config import VerifyAndUpdateConfig

OPERATION = "inplace_ttt::fast_weight_mlp"  # graphs are split at it, so that prompts run outside of graphs
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
        if vllm_config.cache_config.enable_prefix_caching:
            raise ValueError(PREFIX_CACHING)
        if vllm_config.speculative_config is not None:
            raise ValueError("speculative decoding is not supported with fast weights: leave speculative_config out")
        if vllm_config.parallel_config.pipeline_parallel_size > 1 and keys.ttt_target == "input_embed":
            raise ValueError("pipeline_parallel_size > 1 is not supported with ttt_target=input_embed: use 1")
        if getattr(keys, "ttt_bound", None) is not None:
            raise ValueError(f"ttt_bound={keys.ttt_bound} is not supported yet: export the model with --bound none")
        compilation = vllm_config.compilation_config
        if compilation.cudagraph_mode == CUDAGraphMode.FULL:
            raise ValueError(
                "cudagraph_mode=FULL is not supported with fast weights, because prompts run outside of graphs: use "
                "FULL_AND_PIECEWISE (the default), FULL_DECODE_ONLY, PIECEWISE or NONE"
            )
        if compilation.splitting_ops is not None and OPERATION not in compilation.splitting_ops:
            compilation.splitting_ops.append(OPERATION)


def refuse_prefix_caching(architectures: tuple[str, ...]) -> None:
    """Make prefix caching off by default for these architectures, and an error if it is requested.

    vLLM switches it on for every decoder unless the caller says otherwise, and keeps no record of who asked for it. So
    the method that applies the default is wrapped.
    """
    name = "_set_default_chunked_prefill_and_prefix_caching_args"
    before = getattr(EngineArgs, name, None)
    if before is None or getattr(before, "knows_fast_weights", False):
        return

    def wrapped(self, model_config):
        if model_config.architecture in architectures:
            if self.enable_prefix_caching:
                raise ValueError(PREFIX_CACHING)
            self.enable_prefix_caching = False
        before(self, model_config)

    wrapped.knows_fast_weights = True
    setattr(EngineArgs, name, wrapped)
