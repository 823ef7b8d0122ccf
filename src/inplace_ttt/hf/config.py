"""Convert config.json to the Model and TTT sections of a configuration, and back."""

import json
import logging
from functools import partial

import transformers
from transformers import PretrainedConfig

from inplace_ttt.config import TARGETS, TTT, Config, Model, RopeScaling, UserError, one_line, ttt_layers
from inplace_ttt.models import FAMILIES, family_of
from inplace_ttt.models.family import WINDOW_KEYS, Family
from inplace_ttt.validation import ROPE_SCALING, check_model

# module with the classes of exported models that have fast weights
CODE = "modeling_inplace_ttt"
# keys of config.json (as in the checkpoints of the paper's authors) and the fields of TTT
TTT_KEYS = {
    "ttt_chunk": "chunk_size",
    "ttt_lr": "eta",
    "ttt_clip": "clip",  # not in the authors' checkpoints
    "ttt_proj": "project",
    "ttt_target": "target",
    "ttt_conv_kernel": "conv_kernel",
}
# keys for inference that only exported models have
EXPORT_ONLY_KEYS = ("ttt_update_norms", "ttt_bound", "ttt_trained_length")
# keys of config.json with the only value that is supported, in every family
FIXED = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
# keys that are read below
READ = {
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
}
# keys that do not change what the model computes
HARMLESS = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "transformers_version",
    "use_cache",
}
ROPE_KEYS = tuple(RopeScaling.__dataclass_fields__)


class _Keys:
    """Read and check values of a config.json. A key without a ``default`` is required."""

    def __init__(self, config: dict, place: str):
        self.config, self.place = config, place

    def whole(self, key: str, *default: int | None) -> int | None:
        """Return an integer from 1 to 10^9. Raises UserError for another value, or none without a default."""
        return self._read(
            key, default, "an integer from 1 to 10^9", lambda value: type(value) is int and 0 < value <= 10**9
        )

    def number(self, key: str, *default: float | None) -> float | None:
        """Return a number above 0 and below 3e38. Raises UserError like ``whole``."""
        return self._read(key, default, "a number above 0", lambda value: _is_number(value) and value > 0)

    def factor(self, key: str, *default: float) -> float:
        """Return a number between -3e38 and 3e38. Raises UserError like ``whole``."""
        return self._read(key, default, "a number that fp32 can represent", _is_number)

    def one_of(self, choices: tuple[str, ...], key: str, *default: str) -> str:
        """Return a value that is one of ``choices``. Raises UserError like ``whole``."""
        return self._read(key, default, f"one of {', '.join(choices)}", lambda value: value in choices)

    def flag(self, key: str, *default: bool) -> bool:
        """Return a boolean. Raises UserError like ``whole``."""
        return self._read(key, default, "true or false", lambda value: isinstance(value, bool))

    def _read(self, key: str, default: tuple, what: str, fits):
        value = self.config.get(key)
        if value is None and default:
            return default[0]
        if not fits(value):
            found = f"has no {key}" if key not in self.config else f"has {key}={value!r}"
            raise UserError(f"{self.place} {found}: it must be {what}")
        return value


def _is_number(value) -> bool:
    """Return True if a value is a number in the range of fp32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3e38


def read_model(config: dict, place: str) -> Model:
    """Return the Model section of a config.json.

    Raises UserError for a missing key, an invalid value or an unsupported model; ``place`` names the file in messages.
    """
    family = config.get("model_type")
    if not isinstance(family, str):
        raise UserError(f"{place} has model_type={_shown(family)}: it must be a name such as qwen3")
    if not isinstance(config.get("ttt_mode", False), bool | None):
        raise UserError(f"{place} has ttt_mode={config['ttt_mode']!r}: it must be true or false")
    if config.get("ttt_mode"):  # the name that other code gives the same model
        family = next((known for known in FAMILIES if known in family), family)
    if family not in FAMILIES:
        raise UserError(f"{place}: model_type '{family}' is not supported: use one of {', '.join(FAMILIES)}")
    known = FAMILIES[family]
    _check_fixed(config, known, place)
    model = _model(config, known, place)  # raises for keys that are there
    resolved = _as_transformers_reads(config, known, place)
    # a key that is missing has the default of the class in transformers
    config = {key: getattr(resolved, key) for key in READ if hasattr(resolved, key)} | config
    model = _model(config, known, place)
    _compare_rope(resolved, model.rope_scaling, model.rotary_base, place)
    model.sliding_window, model.window_attn_skip_freq = _read_window(config, resolved, place)
    return model


def _model(config: dict, family: Family, place: str) -> Model:
    """Return the Model section without windows. Raises UserError for a missing key or an invalid value."""
    keys = _Keys(config, place)
    hidden, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    scaling, theta = _read_rope(config, place)
    model = Model(
        family=family.name,
        num_layers=keys.whole("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=keys.whole("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=keys.whole("num_key_value_heads", heads),
        kv_channels=keys.whole("head_dim", family.head_dim(hidden, heads)),
        vocab_size=keys.whole("vocab_size"),
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


def _as_transformers_reads(config: dict, family: Family, place: str) -> PretrainedConfig:
    """Return a config.json as the configuration class of transformers reads it.

    Raises UserError if a key of the class that this module does not read differs from the default of the class.
    """
    own = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    if isinstance(own.get("layer_types"), list) and set(map(str, own["layer_types"])) == {"full_attention"}:
        del own["layer_types"]  # the default
    logger = logging.getLogger("transformers")
    before, logger.disabled = logger.disabled, True  # warnings that matter are errors below
    try:
        kind = getattr(transformers, family.config_class)
        resolved, defaults = kind.from_dict(own), kind().to_dict()
    except Exception as error:
        raise UserError(f"{place} cannot be read as a {family.config_class}: {one_line(error)}") from error
    finally:
        logger.disabled = before
    for key, value in own.items():
        if key in READ or key in HARMLESS or key not in defaults:
            continue
        if value is not None and value != defaults[key]:
            raise UserError(f"{place}: {key}={_shown(value)} is not supported: use {key}={defaults[key]}")
    return resolved


def _check_fixed(config: dict, family: Family, place: str) -> None:
    """Raise UserError if a key has an unsupported value."""
    for key, only in (FIXED | family.fixed).items():
        if config.get(key, only) not in (only, None):
            raise UserError(f"{place}: {key}={_shown(config[key])} is not supported: use {key}={json.dumps(only)}")


def _shown(value) -> str:
    return str(value) if len(str(value)) <= 60 else f"{str(value)[:57]}..."


def _read_window(config: dict, resolved: PretrainedConfig, place: str) -> tuple[int | None, int | None]:
    """Return the sliding window in tokens (None: none) and N if every Nth layer has full attention (else None).

    Raises UserError for other patterns of layers.
    """
    kinds = getattr(resolved, "layer_types", None) or ["full_attention"]
    if set(kinds) == {"full_attention"}:
        if not hasattr(resolved, "layer_types") and (config.get("use_sliding_window") or config.get("sliding_window")):
            families = ", ".join(one.name for one in FAMILIES.values() if one.has_windows)
            raise UserError(
                f"{place}: sliding_window={config.get('sliding_window')} is not supported for model_type "
                f"'{config.get('model_type')}', only for {families}: use a model without a sliding window"
            )
        return None, None
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else None
    if kinds != _layer_types(len(kinds), every) or every == 1:
        raise UserError(
            f"{place}: layer_types (use_sliding_window, max_window_layers) give layers different attention "
            f"({', '.join(sorted(set(map(str, kinds))))}) in a pattern that is not supported: use full_attention in "
            f"every Nth layer and sliding_attention in the others, or one kind for all layers"
        )
    if type(resolved.sliding_window) is not int or resolved.sliding_window < 1:
        said = _shown(resolved.sliding_window)
        raise UserError(f"{place} has sliding_window={said}: it must be a number of tokens")
    return resolved.sliding_window, every


def _layer_types(layers: int, every: int | None) -> list[str]:
    """Return ``layer_types`` of a model with sliding windows in all layers but every Nth."""
    return [
        "full_attention" if every is not None and layer % every == 0 else "sliding_attention"
        for layer in range(1, layers + 1)
    ]


def _read_rope(config: dict, place: str) -> tuple[RopeScaling, float]:
    """Return RoPE scaling and base frequency, from the keys of any version of transformers.

    If both rope_scaling and rope_parameters exist, rope_scaling is used, as in transformers. Raises UserError for
    unsupported parameters.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{place} has rope_parameters={_shown(rope)}: it must be an object with keys and values")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.pop("type", None)  # key of older versions
    rope.setdefault("rope_type", "default" if kind is None else kind)
    if not isinstance(rope["rope_type"], str):
        raise UserError(f"{place} has rope_type={_shown(rope['rope_type'])}: it must be a name such as yarn")
    theta = rope.pop("rope_theta", config.get("rope_theta"))
    if rope.get("partial_rotary_factor", 1.0) == 1.0:
        rope.pop("partial_rotary_factor", None)
    keys = _Keys(rope | dict(rope_theta=theta), f"{place}: rope_parameters")
    unknown = sorted(rope.keys() - set(ROPE_KEYS))
    if unknown:
        raise UserError(f"{place}: RoPE parameter '{unknown[0]}' is not supported: use {', '.join(ROPE_KEYS)}")
    needed, allowed = ROPE_SCALING.get(rope["rope_type"], (ROPE_KEYS, ()))
    # transformers ignores parameters that a rope_type does not use
    used = {key: value for key, value in rope.items() if key in ("rope_type", *needed, *allowed)}
    scaling = RopeScaling(**{key: value if key == "rope_type" else keys.number(key) for key, value in used.items()})
    return scaling, float(keys.number("rope_theta", 10000.0))


def _compare_rope(resolved: PretrainedConfig, scaling: RopeScaling, theta: float, place: str) -> None:
    """Raise UserError if transformers reads other RoPE parameters from the same file."""
    theirs = {key: value for key, value in (resolved.rope_parameters or {}).items() if value is not None}
    ours = {key: value for key, value in vars(scaling).items() if value is not None} | dict(rope_theta=theta)
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise UserError(
                f"{place} has contradicting RoPE parameters ({key} is {value} or {theirs.get(key)}): keep only one of "
                f"rope_parameters and rope_scaling"
            )


def read_ttt(config: dict, place: str) -> TTT:
    """Return the TTT section of a config.json; ``enabled`` is False if the model has no fast weights.

    Raises UserError for a missing key or an invalid value.
    """
    if not config.get("ttt_mode"):
        return TTT(enabled=False)
    keys, known = _Keys(config, place), TTT()
    layers = config.get("ttt_layers")
    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise UserError(f"{place} has ttt_layers={layers!r}: it must be a list of layer numbers, from 0")
    _check_calibration(config, len(layers), place)
    if keys.number("ttt_bound", None) is not None:
        keys.whole("ttt_trained_length")
    if isinstance(config.get("ttt_clip"), list):  # calibrated for inference; training uses one number
        keys = _Keys({**config, "ttt_clip": None}, place)
    read = dict(
        chunk_size=keys.whole,
        eta=keys.factor,
        clip=keys.number,
        project=keys.flag,
        target=partial(keys.one_of, TARGETS),
        conv_kernel=keys.whole,
    )
    values = {ours: read[ours](theirs, getattr(known, ours)) for theirs, ours in TTT_KEYS.items()}
    # the authors' list for 36 layers also names layer 36
    return TTT(layers=[layer for layer in layers if layer < config["num_hidden_layers"]], **values)


def _check_calibration(config: dict, layers: int, place: str) -> None:
    """Raise UserError if ttt_clip or ttt_update_norms is not one number per TTT layer."""
    norms = config.get("ttt_update_norms")
    if isinstance(norms, dict):
        named = {f"ttt_update_norms.{name}": numbers for name, numbers in norms.items()}
    else:
        named = {} if norms is None else {"ttt_update_norms": {}}
    if isinstance(config.get("ttt_clip"), list):
        named["ttt_clip"] = config["ttt_clip"]
    for key, numbers in named.items():
        least = 0.0 if key == "ttt_clip" else -1.0  # a norm may be 0
        fits = isinstance(numbers, list) and len(numbers) == layers
        if not fits or not all(_is_number(one) and one > least for one in numbers):
            raise UserError(f"{place} has {key}={_shown(numbers)}: it must be a list with a number for each TTT layer")


# fields of Model without a key in config.json: the architecture implies them, or only training uses them
NOT_WRITTEN = {"embedding_init_method_std", "transformer_impl", "family"}
# fields of TTT without a key in config.json: only training uses them, or check_exportable checks them
TRAINING_ONLY = {
    "clip_separately",
    "comm_dtype",
    "convolution",  # exported as the identity
    "histogram_interval",
    "keep_chunk_weights",
    "lr_multiplier",
    "max_update_ratio",
    "prefix",
    "proj_init_std",
}
CHECKED = {"decay"}


def check_exportable(config: Config, place: str) -> None:
    """Raise UserError if exported models, and the fast weights that they read from files, lack a setting.

    ``place`` names the checkpoint in the message.
    """
    model, ttt = config.model, config.ttt
    if model.attention != "softmax":
        raise UserError(
            f"{place} was trained with model.attention={model.attention}: exported models have softmax attention; "
            f"evaluate the checkpoint itself"
        )
    if ttt.enabled and ttt.decay != 1:
        raise UserError(
            f"{place} was trained with ttt.decay={ttt.decay}: exported models and books have only the paper's update "
            f"rule, ttt.decay=1; evaluate the checkpoint itself"
        )


def write_config(
    config: Config, dtype: str, base: dict | None, tokens: dict | None = None, reading: dict | None = None
) -> dict:
    """Return the config.json of a model.

    Args:
        dtype: dtype of the weights, such as bfloat16.
        base: config.json of the imported model, whose other keys are kept.
        tokens: eos_token_id and bos_token_id.
        reading: ttt_clip for inference, and the keys of ``EXPORT_ONLY_KEYS``.

    Raises UserError if a setting has no key in config.json.
    """
    model, ttt = config.model, config.ttt
    family = family_of(model)
    rope = {key: value for key, value in vars(model.rope_scaling).items() if value is not None}
    written = dict(base or {})
    for old in ("rope_scaling", "rope_theta", "torch_dtype", "auto_map", *EXPORT_ONLY_KEYS, *WINDOW_KEYS):
        written.pop(old, None)
    fields = dict(
        num_layers=dict(num_hidden_layers=model.num_layers),
        hidden_size=dict(hidden_size=model.hidden_size),
        ffn_hidden_size=dict(intermediate_size=model.ffn_hidden_size),
        num_attention_heads=dict(num_attention_heads=model.num_attention_heads),
        num_query_groups=dict(num_key_value_heads=model.num_query_groups),
        kv_channels=dict(head_dim=model.kv_channels),
        vocab_size=dict(vocab_size=model.vocab_size),
        layernorm_epsilon=dict(rms_norm_eps=model.layernorm_epsilon),
        # rope_theta and rope_scaling are for transformers 4 and modeling code written for it
        rotary_base=dict(rope_parameters={"rope_theta": model.rotary_base, **rope}, rope_theta=model.rotary_base),
        rope_scaling=dict(rope_scaling=rope if model.rope_scaling.rope_type != "default" else None),
        max_position_embeddings=dict(max_position_embeddings=_longest(config, base)),
        tie_word_embeddings=dict(tie_word_embeddings=model.tie_word_embeddings),
        sliding_window=_write_window(model, family),
        window_attn_skip_freq={},  # part of layer_types, see sliding_window
        init_method_std=dict(initializer_range=model.init_method_std),
        attention={},  # softmax; check_exportable rejects others
        linear_num_heads={},
        linear_key_head_dim={},
        linear_value_head_dim={},
    )
    forgotten = set(vars(model)) - set(fields) - NOT_WRITTEN
    if forgotten:
        raise RuntimeError(f"write_config does not handle the fields {sorted(forgotten)} of Model")
    forgotten = set(vars(ttt)) - {"enabled", "layers", *TTT_KEYS.values()} - TRAINING_ONLY - CHECKED
    if forgotten:
        raise RuntimeError(f"write_config does not handle the fields {sorted(forgotten)} of TTT")
    for keys in fields.values():
        written |= keys
    written |= dict(architectures=[family.architecture], model_type=family.name, dtype=dtype)
    written |= dict(hidden_act="silu", **family.fixed)
    _check_fixed(written, family, "the config.json of the imported model (--base names another)")
    written |= tokens or {}
    if ttt.enabled:
        name = f"InPlaceTTT{family.architecture}"
        configuration = name.replace("ForCausalLM", "Config")
        # model_type stays that of the family: AutoTokenizer reads it, and would ask for trust_remote_code otherwise
        written |= dict(architectures=[name])
        written["auto_map"] = dict(AutoConfig=f"{CODE}.{configuration}", AutoModelForCausalLM=f"{CODE}.{name}")
        written |= dict(ttt_mode=True, ttt_layers=ttt_layers(ttt, model.num_layers))
        written |= {theirs: getattr(ttt, ours) for theirs, ours in TTT_KEYS.items()} | (reading or {})
    return written


def _write_window(model: Model, family: Family) -> dict:
    if not family.has_windows:
        if model.sliding_window is not None:
            others = ", ".join(one.name for one in FAMILIES.values() if one.has_windows)
            raise UserError(
                f"model.sliding_window={model.sliding_window} cannot be exported: {family.architecture} has no sliding "
                f"window and would attend to all tokens: use model.family {others}"
            )
        defaults = getattr(transformers, family.config_class)().to_dict()
        return {key: None for key in WINDOW_KEYS if defaults.get(key)}  # without it the class would set a window
    if model.sliding_window is None:
        kinds = ["full_attention"] * model.num_layers
    else:
        kinds = _layer_types(model.num_layers, model.window_attn_skip_freq)
    return dict(
        use_sliding_window=model.sliding_window is not None,
        sliding_window=model.sliding_window,
        max_window_layers=model.num_layers if model.sliding_window is None else 0,
        layer_types=kinds,
    )


def _longest(config: Config, base: dict | None) -> int:
    """Return max_position_embeddings: the largest of the training length, the recipe's value and the base model's."""
    before, model = (base or {}).get("max_position_embeddings"), config.model
    if model.rope_scaling.rope_type == "yarn" and model.max_position_embeddings is not None:
        return model.max_position_embeddings  # older transformers compute YaRN's factor from it
    said = (config.data.seq_length, model.max_position_embeddings, before)
    return max(number for number in said if type(number) is int)
