"""The exported model, in transformers alone, computes what the trained model computes, however it is read."""

import copy
import json
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, StaticCache
from transformers.generation.configuration_utils import CompileConfig

from exported_models import CHUNK, SMALL, VARIANTS, build, close, texts
from hf_models import our_logits, weights
from inplace_ttt.hf import modeling_inplace_ttt as exported
from inplace_ttt.hf.convert import export_checkpoint, import_checkpoint
from ranks import run_ranks

BY_ITSELF = ", by itself"
OPERATION = exported.fast_weight_linear


@pytest.fixture(scope="module", params=[*VARIANTS, "qwen3" + BY_ITSELF, "bounded" + BY_ITSELF])
def model(request):
    """A model that calls the package's operation, or one whose file computes everything."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param.endswith(BY_ITSELF):
            patch.setattr(exported, "fast_weight_linear", None)
        yield build(request.param.removesuffix(BY_ITSELF))


def test_equals_the_trained_model(model, tmp_path):
    """Export, import, and Megatron's model: an implementation that shares no line with the exported code."""
    model.save_pretrained(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "imported")
    config, text = model.config, texts(1, 100)
    if config.ttt_bound is not None:
        text = text[:, : 2 * CHUNK]  # training knows no bound
    ttt = dict(
        enabled=True,
        layers=[0, 2],
        chunk_size=CHUNK,
        eta=config.ttt_lr,
        target=config.ttt_target,
        project=config.ttt_proj,
        conv_kernel=config.ttt_conv_kernel,
        clip=config.ttt_clip,
    )
    logits = run_ranks(1, our_logits, str(tmp_path / "imported"), text[0].tolist(), {}, ttt)[0]
    with torch.no_grad():
        assert close(torch.from_numpy(logits), model(text).logits[0])
    export_checkpoint(tmp_path / "imported", tmp_path / "back")
    before, after = weights(tmp_path / "theirs"), weights(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True).eval()
    with torch.no_grad():
        assert close(again(text).logits, model(text).logits)


@torch.no_grad()
def test_prefill_and_decode_equal_one_forward(model):
    text = texts(1, 80)
    whole = model(text).logits
    for split in range(1, 80):
        cache = exported.FastWeightCache(config=model.config)
        parts = [model(text[:, :split], past_key_values=cache, use_cache=True).logits]
        for place in range(split, min(split + 3, 80)):
            parts.append(model(text[:, place : place + 1], past_key_values=cache, use_cache=True).logits)
        if split + 3 < 80:
            parts.append(model(text[:, split + 3 :], past_key_values=cache, use_cache=True).logits)
        assert close(torch.cat(parts, dim=1), whole), split


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_equals_the_operation(variant, monkeypatch):
    """In outputs, fast weights and gradients, read in parts of any length, in float64."""
    model, calls = build(variant).double(), []
    monkeypatch.setattr(exported, "fast_weight_linear", lambda *a, **k: calls.append(1) or OPERATION(*a, **k))

    def read():
        model.zero_grad()
        rng, text, place, parts = random.Random(0), texts(2, 150), 0, []
        cache = exported.FastWeightCache(config=model.config)
        with torch.no_grad():
            while place < 150:
                size = rng.choice([1, 2, 5, 16, 17, 40])
                parts.append(model(text[:, place : place + size], past_key_values=cache, use_cache=True).logits)
                place += size
        whole = model(text, labels=text)
        whole.loss.backward()
        layers = cache.fast_weights.layers.values()
        updates = [state.sum_of(row, torch.device("cpu")) for state in layers for row in range(2)]
        return [*parts, *updates, whole.logits.detach(), *(parameter.grad for parameter in model.parameters())]

    by_operation = read()
    assert len(calls) > 4
    monkeypatch.setattr(exported, "fast_weight_linear", None)
    for value, reference in zip(by_operation, read(), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("count", [5, 20])
@pytest.mark.parametrize(("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_saved_fast_weights_take_the_dtype_of_the_model(count, saved, loaded, model, tmp_path):
    """Also those of less than a chunk."""
    book, question = texts(1, count, 1), texts(1, 30, 2)
    model.to(saved).read(book).save(tmp_path / "book.safetensors")
    model.to(loaded)
    cache = exported.FastWeightCache(
        config=model.config, fast_weights=model.load_fast_weights(tmp_path / "book.safetensors")
    )
    try:
        assert model(question, past_key_values=cache, use_cache=True).logits.isfinite().all()
    finally:
        model.to(torch.float32)


@torch.no_grad()
def test_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(texts(1, 60)).logits
    exact = model(texts(1, 60)).logits
    assert (logits - exact).norm() < 0.05 * exact.norm()


def test_clipping_tells_in_the_logits():
    model, text = build("clipped"), texts(1, 100)
    with torch.no_grad():
        clipped = model(text).logits
        for mlp in model.fast_mlps:
            mlp.clip = None
        assert not close(model(text).logits, clipped)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    lengths, width = [70, 33, 16, 1], 70
    batch, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    alone = []
    for number, length in enumerate(lengths):
        text = texts(1, length, number)
        here = slice(width - length, width) if side == "left" else slice(0, length)
        batch[number, here], mask[number, here] = text[0], 1
        alone.append(model(text).logits[0])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=positions).logits
    for number, reference in enumerate(alone):
        assert close(logits[number, mask[number].bool()], reference)


@torch.no_grad()
def test_generating_in_a_batch_equals_each_alone(model):
    lengths = [40, 25, 9]
    alone = [model.generate(texts(1, n, n), max_new_tokens=30, do_sample=False)[0, n:] for n in lengths]
    batch, mask = torch.zeros(3, 40, dtype=torch.long), torch.zeros(3, 40, dtype=torch.long)
    for number, length in enumerate(lengths):
        batch[number, 40 - length :], mask[number, 40 - length :] = texts(1, length, length)[0], 1
    together = model.generate(batch, attention_mask=mask, max_new_tokens=30, do_sample=False)[:, 40:]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    without_cache = model.generate(texts(1, 9, 9), max_new_tokens=30, do_sample=False, use_cache=False)[0, 9:]
    assert torch.equal(without_cache, alone[2])


@torch.no_grad()
def test_beams_carry_their_own_fast_weights(model):
    text = texts(2, 20)
    best = model.generate(text, max_new_tokens=40, num_beams=3, do_sample=False, return_dict_in_generate=True,
                          output_scores=True)  # fmt: skip
    for sequence, score in zip(best.sequences, best.sequences_scores, strict=True):
        logits = model(sequence[None]).logits[0, 19:-1].log_softmax(-1)
        own = logits.gather(1, sequence[20:, None]).sum() / len(sequence[20:])
        torch.testing.assert_close(own, score, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_read_once_ask_many_times(model, tmp_path):
    book, question = texts(1, 75, 1), texts(2, 12, 2)
    read = model.read(book)
    read.save(tmp_path / "book.safetensors")
    loaded = exported.FastWeights.load(tmp_path / "book.safetensors")
    first = model.generate(question, fast_weights=read, max_new_tokens=20, do_sample=False)
    assert torch.equal(first, model.generate(question, fast_weights=read, max_new_tokens=20, do_sample=False))
    assert torch.equal(first, model.generate(question, fast_weights=loaded, max_new_tokens=20, do_sample=False))
    cold = model(question, past_key_values=exported.FastWeightCache(config=model.config), use_cache=True).logits
    cache = exported.FastWeightCache(config=model.config, fast_weights=loaded.select([0, 0]))
    assert (model(question, past_key_values=cache, use_cache=True).logits - cold).abs().max() > 1e-2


@torch.no_grad()
def test_without_fast_weights_it_is_the_base_model():
    for variant, base in (("qwen3", Qwen3ForCausalLM), ("qwen2", Qwen2ForCausalLM), ("llama", LlamaForCausalLM)):
        kind, changes = VARIANTS[variant]
        off = kind(kind.config_class(**SMALL, **changes, ttt_mode=False)).eval()
        plain = base(base.config_class(**{k: v for k, v in (SMALL | changes).items() if "ttt" not in k})).eval()
        plain.load_state_dict(off.state_dict())
        text = texts(2, 50)
        assert torch.equal(off(text).logits, plain(text).logits)
        assert torch.equal(off.generate(text, max_new_tokens=9, do_sample=False),
                           plain.generate(text, max_new_tokens=9, do_sample=False))  # fmt: skip


def test_gradients_flow_through_the_updates(model):
    loss = model(texts(1, 60), labels=texts(1, 60)).loss
    loss.backward()
    assert all(mlp.ttt_conv.weight.grad.abs().max() > 0 for mlp in model.fast_mlps)
    model.zero_grad()


def test_what_cannot_work_is_refused(model):
    from transformers import DynamicCache, QuantizedCache

    filled = DynamicCache(config=model.config)
    base = type(model).__mro__[2](model.config)  # transformers' own class
    base(texts(1, 5), past_key_values=filled)
    with pytest.raises(ValueError, match="filled without fast weights: pass an empty DynamicCache"):
        model(texts(1, 5), past_key_values=filled)
    with pytest.raises(ValueError, match=r"cache_implementation=quantized cannot hold fast weights: use static"):
        model.generate(texts(1, 5), cache_implementation="quantized")
    assert QuantizedCache
    with pytest.raises(NotImplementedError, match="cannot be rolled back"):
        exported.FastWeightCache(config=model.config).crop(3)
    with pytest.raises(NotImplementedError, match=r"assisted generation .* not supported"):
        model.generate(texts(1, 30), prompt_lookup_num_tokens=3)
    for call in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(NotImplementedError, match="use generate with a batch of prompts"):
            call([[1, 2, 3]])
    with pytest.raises(ValueError, match="a row with several documents cannot be cached"):
        model(texts(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=True)
    with pytest.raises(ValueError, match="pass one of them"):
        model.generate(texts(1, 5), fast_weights=model.read(texts(1, 40)), past_key_values=DynamicCache())


@torch.no_grad()
def test_caches_that_others_make(model):
    """The default cache of a forward, and an empty cache of transformers, dynamic or static."""
    from transformers import DynamicCache, StaticCache

    text = texts(2, 70)
    whole = model(text, use_cache=False).logits
    for cache in (None, DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=80)):
        given = {} if cache is None else dict(past_key_values=cache)
        first = model(text[:, :37], **given)
        parts, cache = [first.logits], first.past_key_values
        for place in range(37, 70):
            parts.append(model(text[:, place : place + 1], past_key_values=cache).logits)
        assert close(torch.cat(parts, dim=1), whole), type(cache)
        cache.reset()
        assert close(model(text, past_key_values=cache).logits, whole)


@torch.no_grad()
def test_packed_rows_are_read_as_their_documents(model):
    """By positions that start anew, for one row or several, and by cu_seq_lens_q."""
    lengths = [[30, 1, 39], [5, 65]]
    for rows in (lengths[:1], lengths[1:], lengths):
        text = texts(len(rows), 70)
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
        packed = model(text, position_ids=positions).logits
        for number, row in enumerate(rows):
            alone = [model(part[None]).logits[0] for part in text[number].split(row)]
            assert close(packed[number], torch.cat(alone))


def test_gradient_checkpointing(model):
    """Of both kinds: gradients equal those without, also where two forwards come before their backwards."""
    texts_ = texts(2, 60, 1), texts(2, 50, 2)
    expected = None
    model.train()
    for options in (None, dict(use_reentrant=False), dict(use_reentrant=True)):
        model.zero_grad()
        if options:
            model.gradient_checkpointing_enable(options)
            model.enable_input_require_grads()
        if options and options["use_reentrant"] and model.config.ttt_target == "input_embed":
            with pytest.raises(ValueError, match="use_reentrant=False"):
                model(texts_[0])
            continue
        losses = [model(text, labels=text).loss for text in texts_]
        (losses[0] + 2 * losses[1]).backward()
        found = [parameter.grad.clone() for parameter in model.parameters()]
        expected = expected or found
        assert all(close(a, b) for a, b in zip(found, expected, strict=True))
    model.gradient_checkpointing_disable()
    model.eval()
    model.zero_grad()


@torch.no_grad()
def test_books_in_every_way_of_generating(model):
    """Beams, several returned sequences, embeddings instead of tokens, static caches: each as the text before it."""
    book, question = texts(1, 64, 1), texts(2, 12, 2)
    read = model.read(book)
    options = dict(max_new_tokens=20, do_sample=False)
    plain = model.generate(question, fast_weights=read, **options)
    assert torch.equal(plain, model.generate(question, fast_weights=read, cache_implementation="static", **options))
    beams = model.generate(question, fast_weights=read, num_beams=3, num_return_sequences=2, **options)
    alone = [
        model.generate(row[None], fast_weights=read, num_beams=3, num_return_sequences=2, **options) for row in question
    ]
    assert torch.equal(beams, torch.cat(alone)) and len(beams) == 4
    sampled = model.generate(
        question, fast_weights=read, num_return_sequences=2, do_sample=True, top_k=1, max_new_tokens=20
    )
    assert torch.equal(sampled[::2], plain) and torch.equal(sampled[1::2], plain)
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(question), fast_weights=read, **options)
    assert torch.equal(embedded, plain[:, 12:])


@torch.no_grad()
@pytest.mark.parametrize("part", [1, 7, 16, 50])
def test_reading_in_parts(model, part):
    book, mask = texts(2, 100, 1), torch.ones(2, 100, dtype=torch.long)
    mask[1, :30] = 0
    whole, parts = model.read(book, attention_mask=mask), model.read(book, attention_mask=mask, part=part)
    assert whole.counts == parts.counts == [100 % CHUNK, 70 % CHUNK]
    for layer, state in whole.layers.items():
        for row in range(2):
            assert close(parts.layers[layer].sum_of(row, torch.device("cpu")), state.sum_of(row, torch.device("cpu")))
            assert close(parts.layers[layer].tail_of(row, whole.counts[row]), state.tail_of(row, whole.counts[row]))


QUICK = ("qwen3", "input_embed, no projection")  # of what takes seconds for each variant


@torch.no_grad()
@pytest.mark.parametrize(
    "variant", [*QUICK, *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS if v not in QUICK)]
)
def test_static_caches_in_one_graph(variant):
    """A batch whose chunks end at different steps: the answers of the dynamic cache, by one graph that nothing records
    anew, also in a second generation, and where the prompt is read in parts."""
    model, lengths = build(variant), [40, 25, 9]
    batch, mask = torch.zeros(3, 40, dtype=torch.long), torch.zeros(3, 40, dtype=torch.long)
    for number, length in enumerate(lengths):
        batch[number, 40 - length :], mask[number, 40 - length :] = texts(1, length, length)[0], 1
    options = dict(attention_mask=mask, max_new_tokens=2 * CHUNK + 5, do_sample=False)
    expected = model.generate(batch, **options)
    torch._dynamo.reset()
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    graphs = []
    for part in (None, None, 7, 13):  # 13 leaves one token for the last part, with strides of its own
        static = dict(cache_implementation="static", prefill_chunk_size=part, compile_config=compile_config)
        found = model.generate(batch, **static, **options)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert torch.equal(found, expected)
    assert len(set(graphs[:3])) == 1 and graphs[3] <= graphs[0] + 1 and not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_a_compiled_loop_of_ones_own():
    """Which folds full chunks itself, and is told where it forgets it."""
    model, text = build("qwen3"), texts(2, 60)
    whole = model(text, use_cache=False).logits
    torch._dynamo.reset()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    for folds in (True, False):
        cache = StaticCache(model.config, max_cache_len=80)
        parts = [model(text[:, :20], past_key_values=cache).logits]
        for place in range(20, 60):
            if folds:
                cache.fold()
            positions = torch.full((2, 1), place)
            if not folds and place == 2 * CHUNK:
                with pytest.raises(RuntimeError, match=r"call past_key_values\.fold\(\) before each compiled step"):
                    step(text[:, place : place + 1], past_key_values=cache, position_ids=positions)
                break
            parts.append(step(text[:, place : place + 1], past_key_values=cache, position_ids=positions).logits)
        if folds:
            assert close(torch.cat(parts, dim=1), whole)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", ["qwen3", "input_embed, no projection", "bounded"])
def test_batches_whose_exact_sums_are_large(variant, padded, monkeypatch):
    """They are read some texts at a time."""
    model, text = build(variant), texts(5, 3 * CHUNK + 7)
    mask = torch.ones_like(text)
    if padded:
        mask[1, :9] = mask[3, : CHUNK + 2] = 0
    options = dict(attention_mask=mask, max_new_tokens=CHUNK + 5, do_sample=False, output_logits=True)
    options |= dict(return_dict_in_generate=True)
    expected = model.generate(text, **options)
    d, f = model.fast_mlps[0].shape
    for numbers in (1, 2 * d * f):
        monkeypatch.setattr(exported, "MAX_EXACT_NUMEL", numbers)
        for part in (None, CHUNK - 3):
            for kind in (None, "static"):
                static = dict(prefill_chunk_size=part, cache_implementation=kind)
                found = model.generate(text, **static, **options)
                assert torch.equal(found.sequences, expected.sequences)
                assert all(close(*pair) for pair in zip(found.logits, expected.logits, strict=True))


@torch.no_grad()
def test_graphs_for_long_caches_of_any_length():
    """The second length makes a graph for all that follow, in which attention over a long cache is one operation: torch
    would take minutes to prove of each layer that spans divide the length."""
    model, text = build("qwen3"), texts(2, 40)
    whole = model(text, use_cache=False).logits
    model.set_attn_implementation(exported.GROUPED)
    torch._dynamo.reset()
    made = []
    step = torch.compile(model, backend=lambda graph, _: made.append(graph) or graph.forward, fullgraph=True)
    for length in (2304, 4352, 2560, 8192):
        cache = StaticCache(model.config, max_cache_len=length)
        parts = [model(text[:, :30], past_key_values=cache).logits]
        for place in range(30, 40):
            cache.fold()
            positions = torch.full((2, 1), place)
            parts.append(step(text[:, place : place + 1], past_key_values=cache, position_ids=positions).logits)
        assert close(torch.cat(parts, dim=1), whole)
    assert len(made) == 2
    for graph in made:
        attentions = [node for node in graph.graph.nodes if "attend_grouped" in str(node.target)]
        assert len(attentions) == model.config.num_hidden_layers


@torch.no_grad()
def test_copies_of_caches(model, tmp_path):
    """A prompt that is read once and asked often, as transformers' guides do it; what is written holds no model."""
    text, options = texts(2, 40), dict(max_new_tokens=25, do_sample=False)
    expected = model.generate(text, **options)
    for kind in (lambda: exported.FastWeightCache(config=model.config), lambda: StaticCache(model.config, 80)):
        cache = kind()
        model(text[:, :30], past_key_values=cache)
        for _ in range(2):
            copied = copy.deepcopy(cache)
            assert copied.fast_weights.mlps[0] is model.fast_mlps[0]
            assert torch.equal(model.generate(text, past_key_values=copied, **options), expected)
        torch.save(cache, tmp_path / "cache")
        assert (tmp_path / "cache").stat().st_size < sum(p.nbytes for p in model.parameters())
        loaded = torch.load(tmp_path / "cache", weights_only=False)
        assert torch.equal(model.generate(text, past_key_values=loaded, **options), expected)


COMPILED = """
import torch
from transformers import DynamicCache
from inplace_ttt.hf import modeling_inplace_ttt as exported

torch.set_grad_enabled(False)
torch.manual_seed(0)
config = exported.InPlaceTTTQwen3Config(
    vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, ttt_layers=[1], ttt_chunk=16, ttt_lr=0.05, ttt_target="TARGET",
)
model = exported.InPlaceTTTQwen3ForCausalLM(config).eval()
model.fast_mlps[0].ttt_conv.weight.normal_(0, 0.3)
model.generation_config.eos_token_id = None
text, options = torch.randint(1, 99, (2, 40)), dict(max_new_tokens=40, do_sample=False)
expected, whole = model.generate(text, **options), model(text, use_cache=False).logits
compiled = torch.compile(model, backend="aot_eager")
assert torch.equal(compiled.generate(text, **options), expected)
cache = DynamicCache(config=config)
parts = [compiled(text[:, :10], past_key_values=cache).logits]
for place in range(10, 40):
    cache.fold()
    parts.append(compiled(text[:, place : place + 1], past_key_values=cache).logits)
assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-5
model.forward = torch.compile(model.forward, backend="aot_eager")
for more in ({}, dict(cache_implementation="static"), dict(num_beams=3)):
    forward, model.forward = model.forward, type(model).forward.__get__(model)
    expected = model.generate(text, **options, **more)
    model.forward = forward
    assert torch.equal(model.generate(text, **options, **more), expected), more
cache = DynamicCache(config=config)
first = model.generate(text[:, :20], past_key_values=cache, max_new_tokens=12, do_sample=False)
again = torch.cat([first, text[:, :9]], dim=1)
found = model.generate(again, past_key_values=cache, **options)
model.forward = type(model).forward.__get__(model)
assert torch.equal(found, model.generate(again, **options))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["hidden_states", "input_embed"])
def test_compiled_by_users(target):
    """torch.compile of the model or of its forward, with any cache; in a process without Megatron's stand-ins."""
    command = [sys.executable, "-c", COMPILED.replace("TARGET", target)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)


@torch.no_grad()
@pytest.mark.parametrize("part", [1, 7, 16, 40, 100])
def test_generating_from_prompts_that_are_read_in_parts(model, part):
    text, options = texts(2, 90), dict(max_new_tokens=2 * CHUNK, do_sample=False)
    whole = model.generate(text, **options)
    assert torch.equal(model.generate(text, prefill_chunk_size=part, **options), whole)


@pytest.mark.parametrize("variant", ["qwen3", "clipped", "input_embed, no projection"])
def test_adapters(variant):
    """LoRA on all linear layers, down-projections with fast weights among them: as if it were merged; what makes the
    targets is left out, and refused where it is named."""
    from peft import LoraConfig, get_peft_model

    text, options = texts(2, 70), dict(max_new_tokens=30, do_sample=False)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(build(variant).double(), config).double().eval()
    adapters = {name: one for name, one in adapted.named_parameters() if "lora" in name}
    assert any("down_proj" in name for name in adapters) and not any("ttt" in name for name in adapters)
    for one in adapters.values():
        one.data.normal_(0, 0.2)
    adapted(text, labels=text).loss.backward()
    assert all(one.grad.abs().max() > 0 for one in adapters.values())
    with torch.no_grad():
        logits, generated = adapted(text).logits, adapted.generate(input_ids=text[:, :30], **options)
        merged = adapted.merge_and_unload()
        assert close(merged(text).logits, logits) and torch.equal(merged.generate(text[:, :30], **options), generated)
    for name in ("ttt_conv", "ttt_proj")[: 1 + build(variant).config.ttt_proj]:
        with pytest.raises(ValueError, match="is not supported"):
            get_peft_model(build(variant), LoraConfig(r=4, target_modules=[name]))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["qwen3", "clipped"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_layers(variant, place, tmp_path):
    from accelerate import cpu_offload, disk_offload

    text, options, model = texts(2, 70), dict(max_new_tokens=30, do_sample=False), build(variant)
    logits, generated = model(text).logits, model.generate(text[:, :30], **options)
    if place == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert close(model(text).logits, logits) and torch.equal(model.generate(text[:, :30], **options), generated)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["qwen3", "clipped"])
def test_quantised_layers(variant):
    """Int8 weights by torchao: what the same model computes with the numbers that they stand for."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    text, quantised, plain = texts(2, 70), build(variant), build(variant)
    before = plain(text).logits
    quantize_(quantised, Int8WeightOnlyConfig())
    weights = {name: module.weight for name, module in quantised.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in plain.named_modules():
        if name in weights and type(weights[name]) is not torch.nn.Parameter:
            module.weight.data = weights[name].dequantize()
    assert close(quantised(text).logits, plain(text).logits) and not close(plain(text).logits, before)
    options = dict(max_new_tokens=30, do_sample=False)
    assert torch.equal(quantised.generate(text[:, :30], **options), plain.generate(text[:, :30], **options))


@pytest.mark.parametrize(("rows", "length"), [(1, 300), (1, 1024), (1, 8192), (3, 1000), (300, 1024)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_of_grouped_heads(rows, length, dtype):
    """Equals torch's own, in spans of keys and whole."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    random_state = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(rows, heads, tokens, 8, generator=random_state, dtype=torch.float64).to(dtype)
        for heads, tokens in ((8, 1), (2, length), (2, length))
    )
    mask = torch.rand(rows, 1, 1, length, generator=random_state) > 0.3
    mask[:, :, :, 0] = True
    found, _ = exported.grouped_attention(module, query, key, value, mask, scaling=0.7)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(one.double() for one in (query, key, value)), attn_mask=mask, scale=0.7, enable_gqa=True
    ).transpose(1, 2)
    assert found.shape == exact.shape and found.dtype == dtype
    assert (found.double() - exact).abs().max() < {torch.float64: 1e-12, torch.bfloat16: 0.03}[dtype]


@torch.no_grad()
def test_generation_leaves_the_model_as_it_was():
    """generate() attends by grouped_attention; nothing else does."""
    model = build("qwen3")
    model.config._attn_implementation, used = "sdpa", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(exported.AttentionInterface._global_mapping, exported.GROUPED,
                      lambda *a, **k: used.append(1) or exported.grouped_attention(*a, **k))  # fmt: skip
        cache = StaticCache(model.config, max_cache_len=2300)
        model.generate(texts(1, 5), max_new_tokens=3, past_key_values=cache)
        assert used and model.config._attn_implementation == "sdpa" and cache.layers[0].keys.shape[2] == 2304
        used.clear()
        model(texts(1, 5))
        assert not used


def test_sums_in_two_halves_are_the_sums():
    total = torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,))
    total[:4] = torch.tensor([0.0, -0.0, 1.00390625, -1.00390625])  # the last two lie between two of bf16
    rounded, rest = exported.split_sum(total, torch.bfloat16)
    assert torch.equal(exported.join_sum(rounded, rest), total) and rest.dtype == torch.int16
    assert ((rounded.float() - total).abs() <= total.abs() / 256).all()


def sums(book):
    device = torch.device("cpu")
    return [state.sum_of(row, device) for state in book.layers.values() for row in range(book.rows)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_books_in_files(dtype, tmp_path):
    """Exactly, or in half the space; also of texts whose sums lie in buffers."""
    model, text = build("qwen3").to(dtype), texts(2, 50)
    for book in (model.read(text), model.read(text[:1])):
        book.save(tmp_path / "exact")
        book.save(tmp_path / "half", dtype=torch.bfloat16)
        exact, half = (model.load_fast_weights(tmp_path / name) for name in ("exact", "half"))
        for one, there, rounded in zip(sums(book), sums(exact), sums(half), strict=True):
            assert torch.equal(one, there) and ((rounded - one).abs() <= one.abs() / 256).all()
        assert exact.counts == book.counts == [50 % CHUNK] * book.rows
        again, cache = model.generate, dict(max_new_tokens=20, do_sample=False)
        question = texts(book.rows, 7, 3)
        assert torch.equal(again(question, fast_weights=exact, **cache), again(question, fast_weights=book, **cache))
        number = sum(one.numel() for one in sums(book))
        each = {torch.bfloat16: 4, torch.float16: 4, torch.float32: 4, torch.float64: 8}[dtype]
        inputs = book.rows * 2 * (50 % CHUNK) * 64 * dtype.itemsize
        for name, size in (("exact", each), ("half", 2)):
            assert number * size + inputs <= (tmp_path / name).stat().st_size < number * size + inputs + 4000
    with pytest.raises(ValueError, match="bfloat16"):
        book.save(tmp_path / "x", dtype=torch.float16)


@torch.no_grad()
def test_reading_on_from_a_book(tmp_path):
    model, text = build("qwen3"), texts(1, 90)
    first = model.read(text[:, :40], name="one")
    before = sums(first)
    both = model.read(text[:, 40:], fast_weights=first, name="two")
    assert all(torch.equal(a, b) for a, b in zip(before, sums(first), strict=True)) and first.counts == [40 % CHUNK]
    assert [[one["name"] for one in row] for row in both.texts] == [["one", "two"]] and len(first.texts[0]) == 1
    assert both.counts == [90 % CHUNK] and both.texts[0][1]["tokens"] == 50
    # attention begins anew, fast weights go on
    cache = exported.FastWeightCache(config=model.config, fast_weights=first.select([0]))
    logits = model(text[:, 40:], past_key_values=cache, use_cache=True).logits
    assert all(torch.equal(a, b) for a, b in zip(sums(cache.fast_weights), sums(both), strict=True))
    assert not close(logits, model(text[:, 40:]).logits)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), text[:, :40]], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    assert model.read(padded, mask, name=["one"]).texts == first.texts  # padding is nothing that was read
    with pytest.raises(ValueError, match="hold 2 texts"):
        model.read(texts(3, 20), fast_weights=model.read(texts(2, 20)))


class Words:
    """A tokenizer, as far as books ask."""

    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: number for number, word in enumerate(self.words)}


@torch.no_grad()
def test_books_know_who_has_read_them(tmp_path):
    path, model = tmp_path / "book", build("qwen3")
    model.read(texts(1, 40), tokenizer=Words("a", "b")).save(path)
    other = build("qwen3")
    other.model.layers[1].self_attn.q_proj.weight.data += 0.1  # of no TTT layer
    for taker in (model, build("qwen3").bfloat16()):
        taker.load_fast_weights(path)
        taker.load_fast_weights(path, tokenizer=Words("a", "b"))
    with pytest.raises(ValueError, match="another model"):
        other.load_fast_weights(path)
    with pytest.raises(ValueError, match="another tokenizer"):
        model.load_fast_weights(path, tokenizer=Words("b", "a"))
    other.load_fast_weights(path, tokenizer=Words("b", "a"), check=False)
    again = exported.FastWeights.load(path)
    assert again.texts[0][0]["tokens"] == 40 and len(again.texts[0][0]["sha256"]) == 64
    path.write_bytes(path.read_bytes())  # the file is there while its sums are in use
    again.save(path)
    assert all(torch.equal(a, b) for a, b in zip(sums(again), sums(exported.FastWeights.load(path)), strict=True))


FAULTS = {
    "no tensor 'count'": lambda tensors, about: tensors.pop("count"),
    "is not a list of integers": lambda tensors, about: tensors.update(count=torch.ones(1)),
    "'count' does not match 'inputs'": lambda tensors, about: tensors.update(count=torch.tensor([3])),
    "unexpected tensor '0.1.update'": lambda tensors, about: tensors.update(
        {"0.1.update": tensors["0.0.update"].clone()}
    ),
    "unexpected tensor 'x'": lambda tensors, about: tensors.update(x=torch.ones(1)),
    "layers \\[0, 1, 2\\]": lambda tensors, about: tensors.update(
        {"1.0.update": torch.ones(64, 128), "1.0.inputs": torch.ones(8, 64)}
    ),
    "unexpected dtype or shape of 'update'": lambda tensors, about: tensors.update(
        {"0.0.update": torch.ones(64, 128, dtype=torch.int64)}
    ),
    "'rest' does not match 'update'": lambda tensors, about: tensors.update(
        {"0.0.rest": torch.ones(64, 128, dtype=torch.int16)}
    ),
    "shapes differ": lambda tensors, about: tensors.update({"0.0.update": torch.ones(64, 127)}),
    "its ttt_target is input_embed": lambda tensors, about: tensors.update({"embeds.0.inputs": torch.ones(8, 64)}),
    r"does not fit this model \('count' does not match 'inputs'\)": lambda tensors, about: [
        tensors.pop(name) for name in list(tensors) if name.startswith("2.")
    ],
    "not finite": lambda tensors, about: tensors["0.0.update"].fill_(float("nan")),
    "its format is not": lambda tensors, about: about.update(format="book"),
    "damaged metadata": lambda tensors, about: about.update(model=[1]),
    "'texts' does not match 'count'": lambda tensors, about: about.update(texts=[[], []]),
}


@torch.no_grad()
def test_books_of_targets_of_embeddings(tmp_path):
    path, model = tmp_path / "book", build("input_embed, no projection")
    model.read(texts(1, 40)).save(path)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        whole = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    without = {name: tensor for name, tensor in whole.items() if not name.startswith("embeds")}
    for tensors, message in [
        (without, "'count' does not match 'inputs'"),
        (whole | {"embeds.0.inputs": torch.ones(8, 7)}, "shapes differ"),
        (whole | {"embeds.0.inputs": torch.full_like(whole["embeds.0.inputs"], torch.nan)}, "not finite"),
    ]:
        save_file(tensors, path, metadata=about)
        with pytest.raises(ValueError, match=message):
            model.load_fast_weights(path)
    other = build("input_embed, no projection")
    other.config.ttt_lr = 0.06
    assert other.fingerprint() != model.fingerprint()


def test_rests_that_no_sum_has_are_no_nan():
    rounded, rest = torch.tensor([0.0, -0.0, 1.0]).bfloat16(), torch.tensor([-1, -1, -1], dtype=torch.int16)
    assert exported.join_sum(rounded, rest).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_books_are_refused(fault, tmp_path):
    path, model = tmp_path / "book", build("qwen3")
    model.read(texts(1, 40)).save(path)
    with safe_open(path, framework="pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["about"])  # noqa: SIM118
    FAULTS[fault](tensors, about)
    save_file(tensors, path, metadata=dict(about=json.dumps(about)))
    with pytest.raises(ValueError, match=fault):
        model.load_fast_weights(path)
    for content in (b"", b"x" * 100, path.read_bytes()[:1000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a valid file of fast weights"):
            model.load_fast_weights(path)
    save_file(tensors, path, metadata=dict(about="[" * 100_000))
    with pytest.raises(ValueError, match="is not a valid file of fast weights"):
        model.load_fast_weights(path)


def test_files_have_the_mode_that_the_umask_asks_for(tmp_path):
    """So that colleagues can read what one exports, imports or saves."""
    model = build("qwen3")
    model.save_pretrained(tmp_path / "theirs")
    before = os.umask(0o027)
    try:
        import_checkpoint(tmp_path / "theirs", tmp_path / "imported")
        export_checkpoint(tmp_path / "imported", tmp_path / "out")
        model.read(texts(1, 40)).save(tmp_path / "book.safetensors")
    finally:
        os.umask(before)
    written = [path for folder in ("imported", "out") for path in (tmp_path / folder).rglob("*")]
    for path in [*written, tmp_path / "book.safetensors"]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_the_folder_needs_torch_and_transformers_alone(tmp_path):
    build("qwen3").save_pretrained(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "imported")
    export_checkpoint(tmp_path / "imported", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["ttt_mode"] and config["ttt_layers"] == [0, 2] and config["ttt_chunk"] == CHUNK
    program = (
        "import sys; sys.modules['inplace_ttt'] = sys.modules['megatron'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "import torch\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
        "print(model.generate(torch.arange(40)[None], max_new_tokens=5, do_sample=False).shape[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path("/"))
    assert done.returncode == 0 and done.stdout.strip().endswith("45"), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(ttt_layers=[0, 9]), "ttt_layers=.* must be a list of numbers below num_hidden_layers"),
        (dict(ttt_layers=[0, 0]), "names a layer twice"),
        (dict(ttt_chunk=0), "ttt_chunk=0 must be 1 or more tokens"),
        (dict(ttt_conv_kernel=4), "ttt_conv_kernel=4 must be an odd number"),
        (dict(ttt_target="tokens"), "ttt_target=tokens is not known"),
        (dict(ttt_clip=[0.1, 0.1, 0.1]), "ttt_clip=.* must be one number, or one for each of ttt_layers"),
    ],
)
def test_keys_that_fast_weights_cannot_use(keys, message):
    config = exported.InPlaceTTTQwen3Config(num_hidden_layers=2, hidden_size=32, **dict(ttt_layers=[0]) | keys)
    with pytest.raises(ValueError, match=message):
        exported.InPlaceTTTQwen3ForCausalLM(config)
