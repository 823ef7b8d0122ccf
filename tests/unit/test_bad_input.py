"""What a user gets wrong is answered in one sentence that names the key, the value and what would work."""

import numpy as np
import pytest

from inplace_ttt.config import UserError
from inplace_ttt.data.build import build_splits
from inplace_ttt.training.compose import compose_config, to_config
from inplace_ttt.validation import check_hardware, validate
from launching import ROOT, SMALL, run_main
from ranks import run_ranks

RECIPES = ROOT / "recipes"


def refusal(*overrides, world_size=2) -> str:
    with pytest.raises(UserError) as caught:
        validate(to_config(compose_config(list(overrides), RECIPES)), world_size)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", "did you mean train.steps"),
        ("tt.eta=3", "did you mean ttt.eta"),
        ("eta=3", "did you mean ttt.eta"),
        ("+train.stepz=3", "write settings as key=value"),
        ("~train.steps", "write settings as key=value"),
        ("train.steps", "write settings as key=value, such as train.steps="),
        ("train.steps=abc", "train.steps=abc"),
        ("train.steps=1.5", "train.steps=1.5"),
        ("train.steps=0", "use 1 or more"),
        ("ttt.enabled=maybe", "ttt.enabled=maybe"),
        ("ttt=3", "ttt=3"),
        ("optim.lr=null", "optim.lr"),
        ("optim.lr=-1", "use 0 or more"),
        ("optim.lr=nan", "optim.lr=nan"),
        ("optim.warmup_fraction=2", "from 0 to 1"),
        ("model.qk_layernorm=true", "key 'model.qk_layernorm' was removed: use model.family"),
        ("model.family=gpt2", "model.family=gpt2 is not known: use one of qwen3, qwen2, llama"),
        ("model.window_attn_skip_freq=2", "needs model.sliding_window, which is null"),
        ("optim.warmup_steps=1000", "more than train.steps=64"),
        ("data.sources=3", "data.sources=3"),
        ("data.sources=[{path: a, wieght: 3}]", "wieght"),
        ("data.sources=[{path: a, weight: 0}]", "above 0"),
        ("model=huge", "model=huge does not exist"),
        ("recipe=tinyttt", "recipe=tinyttt does not exist"),
        ("ttt.layers=every", "every 6th"),
        ("ttt.layers=[9]", "layer 9"),
        ("ttt.layers=[]", "ttt.layers is empty"),
        ("ttt.layers=[a]", "layer a"),
        ("ttt.chunk_size=0", "ttt.chunk_size=0"),
        ("ttt.chunk_size=200", "data.seq_length=4096 cannot be cut"),
        ("ttt.conv_kernel=4", "ttt.conv_kernel=4 is even"),
        ("ttt.target=tokens", "hidden_states, input_embed"),
        ("ttt.comm_dtype=fp8", "fp32, bf16"),
        ("ttt.max_update_ratio=0", "above 0, or null"),
        ("parallel.tensor_model_parallel_size=3", "needs a multiple of 6 processes"),
        ("parallel.context_parallel_size=4", "needs a multiple of 4 processes"),
        ("parallel.sequence_parallel=true", "needs parallel.tensor_model_parallel_size above 1"),
        ("parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"),
        ("model.num_query_groups=3", "does not divide model.num_attention_heads=4"),
        ("model.kv_channels=33", "is odd"),
        ("model.rope_scaling.rope_type=yarn", "needs model.rope_scaling.factor"),
        ("model.rope_scaling.rope_type=ntk", "yarn"),
        ("data.seq_length=4100", "use a multiple of 1024, such as 5120"),
        ("data.kind=files", "indexed, recall"),
        ("data.validation_fraction=1", "below 1"),
        ("train.global_batch_size=3", None),
        ("train.micro_batch_size=4", "train.global_batch_size=2 is not a multiple"),
        ("ttt.prefix=tree", "ring, ring_messages"),
        ("train.recompute=some", "auto, none, selective, full"),
        ("train.recompute_core_attn=false", "train.recompute=none: set it to full"),
        ("train.precision=fp8", "auto, bf16, fp32"),
        ("train.fp8=e5m2", "hybrid, e4m3"),
        ("optim.moments_dtype=fp8", "fp32, bf16"),
        ("optim.main_grads_dtype=fp16", "fp32, bf16"),
        ("train.offload_layers=4", "train.offload_layers=4 must be less than model.num_layers=4"),
        ("checkpoint.load=/nowhere", "is not a folder"),
        ("checkpoint.keep=0", "use 1 or more"),
        ("log.wandb=on", "online, offline"),
        ("ttt.clip=x", "use a number"),
        ("train.steps=1.5", "use a whole number"),
        ("ttt.project=perhaps", "use true or false"),
        ("data.sources={path: x}", "use data.sources=[{path: data/mine}]"),
        ("ttt.layers=['${nope}']", "ttt.layers"),
        ("run.name=${ceil_div:1}", "run.name"),
        ("ttt.clip=1e-320", "use 1e-30 or more"),
        ("ttt.eta=1e39", "1,000,000.0 or less"),
        ("optim.lr=1e39", "1,000,000.0 or less"),
        ("optim.adam_eps=1e-320", "1e-30 or more"),
        ("model.init_method_std=1e300", "above 0 and 1,000"),
        ("model.rope_scaling.attention_factor=1e300", "or less"),
        ("parallel.timeout_minutes=1e-9", "0.1 or more"),
        ("train.eval_positions=[5]", "two or more ascending positions"),
        ("train.eval_positions=[0,8,8]", "two or more ascending positions"),
        ("train.eval_positions=[-1,8]", "0 or more"),
        ("parallel=null", "parallel=null does not exist"),
        ("ttt=null", "the key must have a value"),
        ("train.seed=-1", "use 0 or more"),
        ("train.steps=1e30", "train.steps=1e30"),
        ("train.steps=100000000000000000000", "1,000,000,000 or less"),
        ("optim.adam_beta1=1", "from 0 to below 1"),
        ("optim.adam_beta2=1", "from 0 to below 1"),
        ("optim.adam_eps=-1", "above 0"),
        ("optim.lr=1e400", "not a finite number"),
        ("parallel.timeout_minutes=inf", "not a finite number"),
        ("ttt.layers=1.5", "every 6th"),
        ("ttt.layers=true", "every 6th"),
        ("ttt.eta=nan", "not a finite number"),
        ("ttt.chunk_size=8192", "larger than data.seq_length=4096"),
        ("model.init_method_std=-1", "above 0"),
        ("model.layernorm_epsilon=nan", "not a finite number"),
        ("model.rotary_base=0", "above 1"),
        ("model.max_position_embeddings=0", "1 or more, or null"),
        ("model.rope_scaling.factor=-1", "1 or more, or null"),
        ("model.rope_scaling.factor=2", "not used by model.rope_scaling.rope_type=default"),
        ("data.sources=[{path: a, weight: inf}]", "not a finite number"),
        ("data.num_workers=100000", "1,024 or less"),
        ("run.name=", "run.name='' is empty"),
        ("run.name=a/b", "no '/'"),
        ("run.dir=", "run.dir='' is empty"),
        ("train.recompute_modules=[attention]", "layernorm, mlp_act, rope, mlp, qkv, core_attn"),
    ],
)
def test_refused_by_name(override, expected):
    recipe = [] if override.startswith("recipe=") else ["recipe=tiny_ttt"]
    if expected is None:
        validate(to_config(compose_config([*recipe, override], RECIPES)), 2)
    else:
        assert expected in refusal(*recipe, override)


@pytest.mark.parametrize(
    "value",
    [
        "2026_01_01",
        "1e3",
        "/data/lr=1e-3",
        "~/x",
        "true",
        "null1",
        "it's",
        'say "so"',
        "a b",
        "[1,2]",
        "a\\",
        "a,b",
        "ü",
    ],
)
def test_text_arrives_as_typed(value):
    config = to_config(compose_config(["recipe=tiny_ttt", f"run.dir={value}", f"checkpoint.load={value}"], RECIPES))
    assert (config.run.dir, config.checkpoint.load) == (value, value)
    if "," not in value and "'" not in value and '"' not in value:
        sources = f"data.sources=[{{path: {value}}}, {{weight: 2, path: {value}}}]"
        config = to_config(compose_config(["recipe=tiny_ttt", sources], RECIPES))
        assert [source.path for source in config.data.sources] == [value, value]


def test_quoted_text_and_interpolations():
    overrides = ["run.name='quoted'", "run.dir=runs/${run.name}/x", "checkpoint.load=null"]
    config = to_config(compose_config(["recipe=tiny_ttt", *overrides], RECIPES))
    assert (config.run.dir, config.checkpoint.load) == ("runs/quoted/x", None)


def test_every_key_says_what_it_means_on_resume():
    from inplace_ttt.config import OnResume, schema_keys
    from inplace_ttt.ttt.transport import PREFIXES

    keys = schema_keys()
    assert keys["ttt.eta"].on_resume is keys["model.rope_scaling.factor"].on_resume is OnResume.REFUSED
    assert keys["optim.lr"].on_resume is OnResume.TAKES_EFFECT
    assert keys["parallel.context_parallel_size"].on_resume is OnResume.LAYOUT
    for prefix in PREFIXES:
        assert to_config(compose_config(["recipe=tiny_ttt", f"ttt.prefix={prefix}"], RECIPES)).ttt.prefix == prefix


def test_sizes_that_no_machine_holds():
    from inplace_ttt.environment import World
    from inplace_ttt.sizes import check_memory

    config = to_config(compose_config(["recipe=tiny_ttt", "model.vocab_size=100000000"], RECIPES))
    config.model.hidden_size = 2**18
    with pytest.raises(UserError, match=r"billion parameters per rank .* has"):
        check_memory(config, World(0, 2, 0))
    config = to_config(compose_config(["recipe=tiny_ttt", "data.seq_length=1000000000"], RECIPES))
    config.model.vocab_size = 2048
    with pytest.raises(UserError, match=r"data\.seq_length=1000000000"):
        check_memory(config, World(0, 2, 0))


@pytest.mark.parametrize(
    ("override", "otherwise"),
    [
        ("train.fp8=hybrid", "set train.fp8=null"),
        ("optim.moments_dtype=bf16", "set it to fp32"),
        ("optim.main_grads_dtype=bf16", "set it to fp32"),
        ("train.offload_layers=1", "set it to 0"),
        ("model.transformer_impl=transformer_engine", "use auto or local"),
    ],
)
def test_what_needs_a_gpu(override, otherwise):
    """It can be planned and submitted anywhere, and is refused where it cannot run."""
    config = to_config(compose_config(["recipe=tiny_ttt", override], RECIPES))
    validate(config, 2)
    with pytest.raises(UserError, match=otherwise) as caught:
        check_hardware(config)
    assert override in str(caught.value) and "needs CUDA" in str(caught.value)


def test_layouts_that_do_not_divide_the_model():
    base = ["recipe=tiny_ttt", "parallel.context_parallel_size=1"]
    assert "model.num_query_groups=2" in refusal(*base, "parallel.tensor_model_parallel_size=4", world_size=4)
    assert "model.num_layers=4" in refusal(*base, "parallel.pipeline_model_parallel_size=3", world_size=3)
    selective = ["train.recompute=selective", "train.recompute_modules=[mlp]"]
    assert "more than the 4 layers" in refusal(*base, *selective, "train.recompute_num_layers=5")
    assert "needs train.recompute=selective" in refusal(*base, "train.recompute_num_layers=2")
    assert "set it to null" in refusal(*base, *selective[:1], "train.recompute_num_layers=2")
    fp8 = ["train.fp8=hybrid", "model.transformer_impl=local"]
    assert "is not supported with model.transformer_impl=local" in refusal(*base, *fp8)
    assert "needs train.recompute=none, and it is full" in refusal(
        *base, "train.offload_layers=1", "train.recompute=full"
    )
    linear = ["model.attention=gated_delta_net", *selective[:1], "train.recompute_modules=[rope]"]
    assert "use modules of layernorm, mlp_act and mlp" in refusal(*base, *linear)


def test_without_a_recipe_the_first_missing_key_is_named():
    assert "choose a recipe" in refusal("train.steps=4")


def refused_data(*overrides) -> str:
    with pytest.raises(UserError) as caught:
        build_splits(to_config(compose_config(["recipe=tiny_ttt", *overrides], RECIPES)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def prefix(tmp_path):
    """A small indexed file of two documents."""
    from inplace_ttt.data.indexed import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.uint16)
    for length in (300, 200):
        builder.add_document(np.arange(length), [length])
    builder.finalize(str(tmp_path / "data.idx"))
    return tmp_path / "data"


def test_data_that_is_missing_or_damaged(prefix):
    source = f"data.sources=[{{path: {prefix}}}]"
    assert "does not exist: create it with" in refused_data("data.sources=[{path: /nowhere/x}]")
    assert "data.sources is empty" in refused_data("data.sources=[]")
    assert "model.vocab_size is not known" in refused_data(source)
    assert "none is left for training" in refused_data(source, "model.vocab_size=300", "data.validation_fraction=0.9")
    assert "no tokenizer could be loaded" in refused_data(source, "data.tokenizer=/nowhere/tokenizer")
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(100)
    assert "has 100 bytes but its index needs 1000" in refused_data(source, "model.vocab_size=300")
    with open(f"{prefix}.idx", "r+b") as file:
        file.truncate(40)
    assert "is not a complete Megatron index" in refused_data(source, "model.vocab_size=300")
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"not an index at all, but some text that is long enough")
    assert "is not a complete Megatron index" in refused_data(source, "model.vocab_size=300")


def test_a_vocabulary_too_small_for_the_tokenizer(prefix):
    (prefix.parent / "data.json").write_text(
        '{"documents": 2, "tokens": 500, "vocab_size": 300, "eos_token_id": 0, "tokenizer_fingerprint": "x"}'
    )
    source = f"data.sources=[{{path: {prefix}}}]"
    assert "smaller than the tokenizer's 300 entries" in refused_data(source, "model.vocab_size=200")
    (prefix.parent / "data.json").write_text("{")
    assert "is damaged" in refused_data(source)


def test_a_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert [code for code, _ in run_ranks(2, run_main, *SMALL, f"run.dir={tmp_path / 'file' / 'run'}")] == [2, 2]
    _, text = run_ranks(1, run_main, *SMALL, f"run.dir={tmp_path / 'file' / 'run'}")[0]
    assert text.count("\n") == 1 and "cannot be written" in text


def test_errors_are_one_line_and_exit_2():
    code, text = run_main("recipe=tiny_ttt", "train.stepz=3")
    assert code == 2 and text == "error: train.stepz=3: unknown key 'train.stepz'; did you mean train.steps?\n"


@pytest.mark.parametrize(
    ("change", "unit", "message"),
    [
        ({}, 16, None),
        ({"model": {"ffn_hidden_size": 130}}, 16, "model.ffn_hidden_size / TP is 130"),
        ({"data": {"seq_length": 72}}, 16, "data.seq_length / CP is 72"),
        ({}, 128, "train.fp8=hybrid needs multiples of 128, but model.hidden_size is 64"),
    ],
)
def test_sizes_for_fp8(change, unit, message):
    from inplace_ttt.validation import check_fp8_sizes
    from models import tiny_config

    config = tiny_config({"train": {"fp8": "hybrid"}}, change)
    if message is None:
        check_fp8_sizes(config, unit)
    else:
        with pytest.raises(UserError, match=message):
            check_fp8_sizes(config, unit)
