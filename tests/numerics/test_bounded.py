"""Past the trained length the sum of updates is kept to a share of its norm there: the definition, the operation, the
exported model, and checkpoints over ranks."""

import itertools
import json

import pytest
import torch
import torch.distributed as dist

from exported_models import CHUNK, build, close, texts
from inplace_ttt.config import UserError
from inplace_ttt.hf import modeling_inplace_ttt as exported
from inplace_ttt.hf.calibration import choose_bound
from inplace_ttt.hf.convert import export_checkpoint, import_checkpoint
from inplace_ttt.ttt import ChunkTargets, LayoutError, bounded_fast_weight_linear, fast_weight_linear
from inplace_ttt.ttt.layout import take_local
from inplace_ttt.ttt.target import chunk_target
from ranks import run_ranks

OPTIONS = dict(eta=0.5, chunk_size=5)
HUGE = {"0": [10**400, 1]}  # a number that JSON may have, and no float


def by_definition(z, v, weight, bound, trained_chunks, clip=None):
    """(s, b, f), (s, b, d), (d, f) -> (s, b, d), token by token."""
    rows = []
    for row in range(z.shape[1]):
        total, limit, out = torch.zeros_like(weight), None, []
        for number, start in enumerate(range(0, len(z), OPTIONS["chunk_size"])):
            here = slice(start, start + OPTIONS["chunk_size"])
            out += [(weight + total) @ one for one in z[here, row]]
            update = OPTIONS["eta"] * sum(torch.outer(a, b) for a, b in zip(v[here, row], z[here, row], strict=True))
            if clip is not None:
                update = update * min(1.0, clip * weight.norm() / update.norm())
            total = total + update
            if number + 1 == trained_chunks:
                limit = bound * total.norm()
            if limit is not None:
                total = total * min(1.0, limit / total.norm())
        rows.append(torch.stack(out))
    return torch.stack(rows, dim=1)


def operands(s, b=2, d=4, f=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((s, b, f), (s, b, d), (d, f))]


@pytest.mark.parametrize(
    ("s", "trained", "bound", "clip"), itertools.product([9, 10, 11, 33, 40], [1, 2, 5], [0.5, 1.0, 3.0], [None, 0.2])
)
def test_the_operation_by_definition(s, trained, bound, clip):
    z, v, weight = operands(s)
    found = bounded_fast_weight_linear(z, v, weight, bound=bound, trained_chunks=trained, clip=clip, **OPTIONS)
    torch.testing.assert_close(found, by_definition(z, v, weight, bound, trained, clip))
    free = fast_weight_linear(z, v, weight, clip=clip, **OPTIONS)
    inside = min(trained * OPTIONS["chunk_size"], s)
    torch.testing.assert_close(found[:inside], free[:inside])
    if bound < 1 and s > inside:
        assert not torch.allclose(found[inside:], free[inside:])


def test_targets_that_the_operation_makes():
    z, u, weight = operands(33)
    kernel, projection = torch.randn(4, 1, 3, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    ids = torch.arange(33) // 5
    options = dict(bound=0.5, trained_chunks=2, **OPTIONS)
    found = bounded_fast_weight_linear(z, ChunkTargets(u, kernel, projection, ids), weight, **options)
    given = bounded_fast_weight_linear(z, chunk_target(u, kernel, projection, ids), weight, **options)
    torch.testing.assert_close(found, given)


def over_columns():
    z, v, weight = operands(33, f=8)
    columns = slice(dist.get_rank() * 4, (dist.get_rank() + 1) * 4)
    options = dict(bound=0.5, trained_chunks=2, clip=0.2)
    group = dist.group.WORLD
    out = bounded_fast_weight_linear(z[..., columns], v, weight[:, columns], tp_group=group, **options, **OPTIONS)
    dist.all_reduce(out)
    return (out - by_definition(z, v, weight, **options)).abs().max().item()


def test_norms_are_summed_over_columns():
    assert max(run_ranks(2, over_columns)) < 1e-12


def over_slices(columns_too: bool):
    """Errors of the output and of the sums after some tokens, over context-parallel ranks; see ``by_definition``."""
    world = torch.distributed.get_world_size()
    size = world // 2 if columns_too else world
    groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world, size)]
    cp, tp = groups[dist.get_rank() // size], None
    length = 2 * size * 3 * OPTIONS["chunk_size"]
    z, v, weight = operands(length, f=8)
    columns = slice(0, 8)
    if columns_too:
        pairs = [dist.new_group([rank, rank + size]) for rank in range(size)]
        tp, part = pairs[dist.get_rank() % size], dist.get_rank() // size
        columns = slice(part * 4, part * 4 + 4)
    errors = []
    for trained, clip, sum_at in itertools.product([1, 4, 7, 100], [None, 0.2], [0, 5, 20, 45, length]):
        options = dict(bound=0.5, trained_chunks=trained, clip=clip)
        mine = [take_local(one, cp.size(), cp.rank(), dim=0) for one in (z[..., columns], v)]
        groups = dict(cp_group=cp, tp_group=tp)
        out, found = bounded_fast_weight_linear(
            *mine, weight[:, columns], sum_at=sum_at, **groups, **options, **OPTIONS
        )
        only = bounded_fast_weight_linear(*mine, weight[:, columns], **groups, **options, **OPTIONS)
        assert torch.allclose(only, out)
        expected = take_local(by_definition(z, v, weight, **options), cp.size(), cp.rank(), dim=0)
        if tp is not None:
            dist.all_reduce(out, group=tp)
        errors.append((out - expected).abs().max().item())
        if sum_at:
            one = dict(sum_at=sum_at, **options, **OPTIONS)
            _, right = bounded_fast_weight_linear(z[:sum_at], v[:sum_at], weight, **one)
            for tensor in found:
                dist.all_reduce(tensor, group=cp)
            errors.append((found.updates - right.updates[..., columns]).abs().max().item())
            assert torch.equal(found.limits.isinf(), right.limits.isinf())
            errors.append((found.limits - right.limits).nan_to_num(0).abs().max().item())
    return max(errors)


@pytest.mark.parametrize(("ranks", "columns_too"), [(2, False), (4, False), (4, True)])
def test_slices_of_context_parallel_ranks(ranks, columns_too):
    assert max(run_ranks(ranks, over_slices, columns_too)) < 1e-12


def a_slice_that_ends_in_a_chunk():
    z, v, weight = operands(12)
    with pytest.raises(LayoutError, match="a slice has 6 tokens, which is not a multiple of chunk_size=5"):
        bounded_fast_weight_linear(z, v, weight, bound=1, trained_chunks=1, cp_group=dist.group.WORLD, **OPTIONS)


def test_slices_end_with_chunks():
    run_ranks(2, a_slice_that_ends_in_a_chunk)


def test_the_sum_after_some_tokens():
    z, v, weight = operands(33)
    for tokens in (5, 10, 15, 30):
        options = dict(bound=0.5, trained_chunks=3, **OPTIONS)
        out, found = bounded_fast_weight_linear(z, v, weight, sum_at=tokens, **options)
        # the output at the next token is that of W plus the sum
        right = torch.einsum("bdf,bf->bd", weight + found.updates, z[tokens])
        torch.testing.assert_close(out[tokens], right)
        assert found.limits.isfinite().all() == (tokens >= 15)


@torch.no_grad()
@pytest.mark.parametrize("by_itself", [False, True])
def test_books_go_on(tmp_path, monkeypatch, by_itself):
    """Save with a book what it has written and how much it may write: before, at and past the trained length."""
    if by_itself:
        monkeypatch.setattr(exported, "fast_weight_linear", None)
    model, text = build("bounded"), texts(2, 120)
    whole = model.read(text)
    for split in (CHUNK + 3, 2 * CHUNK, 2 * CHUNK + 5, 5 * CHUNK):
        model.read(text[:, :split]).save(tmp_path / "book")
        book = model.load_fast_weights(tmp_path / "book")
        assert book.chunks == [split // CHUNK] * 2
        found = model.read(text[:, split:], fast_weights=book)
        assert found.chunks == whole.chunks == [120 // CHUNK] * 2
        # keys and values are not kept: the texts that follow are read as new ones, by the same fast weights
        one = model.read(text[:, split:], fast_weights=model.read(text[:, :split]))
        for layer, state in one.layers.items():
            assert found.layers[layer].limits == state.limits and all(0 < limit < 1e9 for limit in state.limits)
            assert close(found.layers[layer].sum_of(0, torch.device("cpu")), state.sum_of(0, torch.device("cpu")))


@torch.no_grad()
def test_the_bound_holds():
    model, text = build("bounded"), texts(1, 20 * CHUNK)
    free = build("clipped")
    for length in (2, 3, 20):  # chunks; two are the trained length
        here = text[:, : length * CHUNK]
        for layer, state in model.read(here).layers.items():
            norm, limit = state.sum_of(0, torch.device("cpu")).norm(), state.limits[0]
            reached = free.read(text[:, : 2 * CHUNK]).layers[layer].sum_of(0, torch.device("cpu")).norm()
            assert limit == pytest.approx(0.5 * reached.item()) and 0 < norm <= limit * 1.0001


@pytest.mark.parametrize(
    "limits",
    [{"0": [1]}, {"0": ["x", 1]}, {"0": [-1, 1]}, {"0": [1e300, 1]}, HUGE, {"7": [1, 1]}, [1], {"0": 3}],
)
def test_damaged_limits(tmp_path, limits):
    from safetensors.torch import load_file, save_file

    model = build("bounded")
    model.read(texts(2, 50)).save(tmp_path / "book")
    about = dict(format=exported.BOOK, texts=[], chunks=[3, 3])
    for change in (
        dict(limits=limits),
        dict(chunks=[1]),
        dict(chunks=[-1, 2]),
        dict(chunks=[2**60, 2]),
        dict(chunks={}),
    ):
        save_file(load_file(tmp_path / "book"), tmp_path / "bad", metadata={"about": json.dumps(about | change)})
        with pytest.raises(ValueError, match="is not a valid file of fast weights"):
            model.load_fast_weights(tmp_path / "bad")


def test_words_of_bound():
    assert choose_bound("none", None, "x") is None and choose_bound("0.5", 100, "x") == 0.5
    for word, length, message in [("0.5", None, "the training length of x is not known"), ("p50", 9, "is not valid")]:
        with pytest.raises(UserError, match=message):
            choose_bound(word, length, "x")


def test_exports_say_it(tmp_path):
    build("bounded").save_pretrained(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "imported")
    for word, expected in ((None, 0.5), ("0.25", 0.25), ("none", None)):
        export_checkpoint(tmp_path / "imported", tmp_path / f"{word}", bound=word)
        config = json.loads((tmp_path / f"{word}/config.json").read_text())
        assert config["ttt_bound"] == expected and config["ttt_trained_length"] == 2 * CHUNK + 3
    for key, value in [
        ("ttt_bound", -1),
        ("ttt_bound", [1]),
        ("ttt_trained_length", None),
        ("ttt_trained_length", 0.5),
    ]:
        config = json.loads((tmp_path / "theirs/config.json").read_text())
        (tmp_path / "theirs/config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=key):
            import_checkpoint(tmp_path / "theirs", tmp_path / f"bad {key} {value}")
        (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="needs ttt_trained_length"):
        exported.InPlaceTTTQwen3ForCausalLM(exported.InPlaceTTTQwen3Config(**{**config, "ttt_trained_length": None}))
