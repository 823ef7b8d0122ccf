"""Serve models with In-Place Test-Time Training in vLLM.

The entry point ``vllm.general_plugins`` calls ``register``. ``vllm serve exported/`` and ``LLM("exported/")`` then load
folders that ``launch/export_hf.py`` has written.
"""

ARCHITECTURES = {
    "InPlaceTTTQwen3ForCausalLM": "inplace_ttt_vllm.model:InPlaceTTTQwen3ForCausalLM",
    "InPlaceTTTQwen2ForCausalLM": "inplace_ttt_vllm.model:InPlaceTTTQwen2ForCausalLM",
    "InPlaceTTTLlamaForCausalLM": "inplace_ttt_vllm.model:InPlaceTTTLlamaForCausalLM",
}


def register() -> None:
    """Register the model classes, and the settings that they need, with vLLM."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from inplace_ttt_vllm.settings import FastWeightSettings, set_defaults

    known = ModelRegistry.get_supported_archs()
    for architecture, place in ARCHITECTURES.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, place)
        MODELS_CONFIG_MAP[architecture] = FastWeightSettings
    set_defaults(tuple(ARCHITECTURES))
