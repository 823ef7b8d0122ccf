"""Hugging Face's config.json and our Model and TTT sections, both ways."""

from inplace_ttt.config import TTT, Config, Model, RopeScaling, UserError, ttt_layers

FAMILIES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
# with fast weights, for the code in modeling_inplace_ttt.py
PREFIX, CODE = "inplace_ttt_", "modeling_inplace_ttt"
# keys of the authors' checkpoints: theirs, ours
TTT_KEYS = {
    "ttt_chunk": "chunk_size",
    "ttt_lr": "eta",
    "ttt_proj": "project",
    "ttt_target": "target",
    "ttt_conv_kernel": "conv_kernel",
}
# what a configuration may say only in one way, for the model has nothing else
FIXED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "use_sliding_window": False}
ROPE_KEYS = tuple(RopeScaling.__dataclass_fields__)


def read_model(config: dict, place: str) -> Model:
    """The Model section of a config.json; raises UserError for what the model cannot be."""
    family = str(config.get("model_type"))
    if config.get("ttt_mode"):  # ours, or another code's name for the same model
        family = next((known for known in FAMILIES if known in family), family)
    if family not in FAMILIES:
        raise UserError(f"{place}: model_type '{family}' is not supported: use one of {', '.join(FAMILIES)}")
    for key, only in FIXED.items():
        if config.get(key, only) != only:
            raise UserError(f"{place}: {key}={config[key]} is not supported: only {key}={only} is")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "type" in rope:  # as older versions of transformers wrote it
        rope["rope_type"] = rope.pop("type")
    theta = rope.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    unknown = sorted(key for key, value in rope.items() if key not in ROPE_KEYS and value is not None)
    if unknown:
        raise UserError(f"{place}: RoPE parameter '{unknown[0]}' is not supported: use {', '.join(ROPE_KEYS)}")
    return Model(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        qk_layernorm=family == "qwen3",
        layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
        rotary_base=float(theta),
        rope_scaling=RopeScaling(**rope),
        max_position_embeddings=config.get("max_position_embeddings"),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        init_method_std=config.get("initializer_range", 0.02),
    )


def read_ttt(config: dict) -> TTT:
    """The TTT section of a config.json; not enabled where it has none."""
    if not config.get("ttt_mode"):
        return TTT(enabled=False)
    values = {ours: config[theirs] for theirs, ours in TTT_KEYS.items() if theirs in config}
    # the authors' list for 36 layers also names layer 36
    layers = [layer for layer in config["ttt_layers"] if layer < config["num_hidden_layers"]]
    return TTT(layers=layers, **values)


def write_config(config: Config, dtype: str, base: dict | None) -> dict:
    """config.json of a model; ``base`` is what it was imported from, whose other keys are kept."""
    model, ttt = config.model, config.ttt
    family = "qwen3" if model.qk_layernorm else "llama"
    rope = {key: value for key, value in vars(model.rope_scaling).items() if value is not None}
    written = dict(base or {})
    for old in ("rope_scaling", "rope_theta", "torch_dtype"):
        written.pop(old, None)
    written |= dict(
        architectures=[FAMILIES[family]],
        model_type=family,
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels,
        vocab_size=model.vocab_size,
        rms_norm_eps=model.layernorm_epsilon,
        rope_parameters={"rope_theta": model.rotary_base, **rope},
        rope_theta=model.rotary_base,  # these two as transformers 4, and modeling code written for it, read them
        rope_scaling=rope if model.rope_scaling.rope_type != "default" else None,
        max_position_embeddings=model.max_position_embeddings or config.data.seq_length,
        tie_word_embeddings=model.tie_word_embeddings,
        initializer_range=model.init_method_std,
        hidden_act="silu",
        attention_bias=False,
        dtype=dtype,
    )
    written.pop("auto_map", None)
    if ttt.enabled:
        name = "InPlaceTTT" + FAMILIES[family]
        configuration = name.replace("ForCausalLM", "Config")
        written |= dict(architectures=[name], model_type=PREFIX + family)
        written["auto_map"] = dict(AutoConfig=f"{CODE}.{configuration}", AutoModelForCausalLM=f"{CODE}.{name}")
        written |= dict(ttt_mode=True, ttt_layers=ttt_layers(ttt, model.num_layers))
        written |= {theirs: getattr(ttt, ours) for theirs, ours in TTT_KEYS.items()}
    return written
