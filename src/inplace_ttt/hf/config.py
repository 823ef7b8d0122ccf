"""Hugging Face's config.json and our Model and TTT sections, both ways."""

import math
from functools import partial

from inplace_ttt.config import TARGETS, TTT, Config, Model, RopeScaling, UserError, ttt_layers
from inplace_ttt.validation import check_model

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


class _Keys:
    """A config.json whose values are looked at as they are read; without a ``default`` a key must be there."""

    def __init__(self, config: dict, place: str):
        self.config, self.place = config, place

    def whole(self, key: str, *default: int | None) -> int | None:
        return self._read(key, default, "a whole number above 0", lambda value: type(value) is int and value > 0)

    def number(self, key: str, *default: float | None) -> float | None:
        return self._read(key, default, "a number above 0", lambda value: _is_number(value) and value > 0)

    def factor(self, key: str, *default: float) -> float:
        return self._read(key, default, "a number", _is_number)

    def one_of(self, choices: tuple[str, ...], key: str, *default: str) -> str:
        return self._read(key, default, f"one of {', '.join(choices)}", lambda value: value in choices)

    def flag(self, key: str, *default: bool) -> bool:
        return self._read(key, default, "true or false", lambda value: isinstance(value, bool))

    def _read(self, key: str, default: tuple, what: str, fits):
        value = self.config.get(key)
        if value is None and default:
            return default[0]
        if not fits(value):
            found = f"has no {key}" if key not in self.config else f"says {key}={value!r}"
            raise UserError(f"{self.place} {found}, where there should be {what}")
        return value


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
    keys = _Keys(config, place)
    hidden, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    scaling, theta = _read_rope(config, place)
    model = Model(
        num_layers=keys.whole("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=keys.whole("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=keys.whole("num_key_value_heads", heads),
        kv_channels=keys.whole("head_dim", 128 if family == "qwen3" else max(1, hidden // heads)),
        vocab_size=keys.whole("vocab_size"),
        qk_layernorm=family == "qwen3",
        layernorm_epsilon=keys.number("rms_norm_eps", 1e-6),
        rotary_base=theta,
        rope_scaling=scaling,
        max_position_embeddings=keys.whole("max_position_embeddings", None),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        init_method_std=keys.number("initializer_range", 0.02),
    )
    try:
        check_model(model)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return model


def _read_rope(config: dict, place: str) -> tuple[RopeScaling, float]:
    """Scaling, and the base of the frequencies, from where any version of transformers writes them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{place} says rope_parameters={rope!r}, where there should be keys and values")
    rope = {key: value for key, value in rope.items() if value is not None}
    if "type" in rope:  # as older versions wrote it
        rope["rope_type"] = rope.pop("type")
    theta = rope.pop("rope_theta", config.get("rope_theta"))
    keys = _Keys(rope | dict(rope_theta=theta), f"{place}: rope_parameters")
    unknown = sorted(rope.keys() - set(ROPE_KEYS))
    if unknown:
        raise UserError(f"{place}: RoPE parameter '{unknown[0]}' is not supported: use {', '.join(ROPE_KEYS)}")
    scaling = RopeScaling(**{key: value if key == "rope_type" else keys.number(key) for key, value in rope.items()})
    return scaling, float(keys.number("rope_theta", 10000.0))


def read_ttt(config: dict, place: str) -> TTT:
    """The TTT section of a config.json; not enabled where it has none. Raises UserError for what it cannot be."""
    if not config.get("ttt_mode"):
        return TTT(enabled=False)
    keys, known = _Keys(config, place), TTT()
    layers = config.get("ttt_layers")
    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise UserError(f"{place} says ttt_layers={layers!r}, where there should be a list of layer numbers from 0")
    read = dict(
        chunk_size=keys.whole,
        eta=keys.factor,
        project=keys.flag,
        target=partial(keys.one_of, TARGETS),
        conv_kernel=keys.whole,
    )
    values = {ours: read[ours](theirs, getattr(known, ours)) for theirs, ours in TTT_KEYS.items()}
    # the authors' list for 36 layers also names layer 36
    return TTT(layers=[layer for layer in layers if layer < config["num_hidden_layers"]], **values)


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
