"""The cutting of sequences: every token in exactly one chunk, every edge crossed by whoever must cross it."""

import itertools
import random

import pytest

from inplace_ttt.ttt.plan import (
    LayoutError,
    evenly_spaced,
    local_slices,
    make_plan,
    merge_adjacent,
    slice_bounds,
    slice_owner,
)


def test_slice_owner_is_the_inverse_of_local_slices():
    for cp_size in (1, 2, 3, 4, 8):
        for rank in range(cp_size):
            assert all(slice_owner(index, cp_size) == rank for index in local_slices(cp_size, rank))


@pytest.mark.parametrize("seed", range(50))
def test_chunks_tile_the_sequence_and_hops_meet(seed):
    rng = random.Random(seed)
    chunk_size, cp_size = rng.randint(1, 5), rng.choice([1, 2, 3, 4])
    length = 2 * cp_size * chunk_size * rng.randint(1, 4)
    places = range(chunk_size, length, chunk_size)
    documents = (0, *sorted(rng.sample(places, min(len(places), rng.randint(0, 5)))), length)
    plans = [make_plan(length, chunk_size, documents, cp_size, rank) for rank in range(cp_size)]

    edges = slice_bounds(length, cp_size)
    chunk_starts = set()
    for rank, plan in enumerate(plans):
        local = [t for index in local_slices(cp_size, rank) for t in range(edges[index], edges[index + 1])]
        offsets = itertools.accumulate(plan.chunk_lengths, initial=0)
        chunk_starts.update(local[offset] for offset in offsets if offset < len(local))
        for stages, inner in ((plan.prefix, plan.inner), (plan.suffix, plan.inner_reversed)):
            crossing = [segment for stage in stages for segment in stage.segments]
            assert all(len(stage.segments) <= 2 for stage in stages) and all(segment.crosses for segment in crossing)
            assert not any(segment.crosses or len(segment.chunks) < 2 for segment in inner)
            chunks = [chunk for segment in (*crossing, *inner) for chunk in segment.chunks] + list(
                plan.single_chunk_documents
            )
            assert sorted(t for a, b in chunks for t in range(a, b)) == list(range(len(local)))
            assert tuple(b - a for a, b in sorted(chunks)) == plan.chunk_lengths
        for start, stop in plan.single_chunk_documents:
            assert stop - start <= chunk_size and {local[start], local[start] + stop - start} <= set(documents)
    expected = {t for a, b in itertools.pairwise(documents) for t in range(a, b, chunk_size)}
    assert chunk_starts == expected

    arrives, leaves = {}, {}  # by edge
    for rank, plan in enumerate(plans):
        held = local_slices(cp_size, rank)
        ends = [(held[0], held[-1])] if rank == cp_size - 1 else [(index, index) for index in held]
        for (first, last), stage in zip(ends, plan.prefix, strict=True):
            arrives[edges[first]], leaves[edges[last + 1]] = stage.source, stage.target
    for index, edge in enumerate(edges[1:-1], start=1):
        crossed = edge not in documents
        if index == cp_size:  # between the slices of the last rank
            assert edge not in arrives and edge not in leaves
        else:
            assert leaves[edge] == (slice_owner(index, cp_size) if crossed else None)
            assert arrives[edge] == (slice_owner(index - 1, cp_size) if crossed else None)


def test_documents_of_one_chunk_are_not_scanned():
    plan = make_plan(48, 4, (0, 4, 7, 8, 20, 36, 40, 48), 2, 0)  # slices of 12: this rank has tokens 0-12 and 36-48
    assert plan.single_chunk_documents == ((0, 4), (4, 7), (7, 8), (12, 16))
    assert [segment.chunks for stage in plan.prefix for segment in stage.segments] == [((8, 12),)]
    assert [segment.chunks for segment in plan.inner] == [((16, 20), (20, 24))]
    assert [segment.chunks for segment in plan.inner_reversed] == [((20, 24), (16, 20))]
    assert list(merge_adjacent(plan.single_chunk_documents)) == [(0, 8), (12, 16)]
    assert plan.scanned_chunks == 3


def test_evenly_spaced():
    neighbours, apart, others = ((0, 4), (4, 8)), ((12, 16), (20, 24), (28, 32)), ((33, 35), (35, 37))
    assert list(evenly_spaced((*neighbours, *apart, *others))) == [neighbours, apart, others]
    assert list(evenly_spaced(((0, 4), (4, 7), (9, 12)))) == [((0, 4),), ((4, 7), (9, 12))]
    assert list(evenly_spaced(())) == []


def test_suffix_mirrors_prefix():
    plan = make_plan(32, 4, (0, 12, 32), 2, 0)
    assert [stage.source for stage in plan.suffix] == [stage.target for stage in reversed(plan.prefix)]
    assert plan.suffix[-1].segments[-1].chunks == plan.prefix[0].segments[0].chunks[::-1]


def test_slices_inside_a_chunk_are_refused_by_name():
    with pytest.raises(LayoutError, match=r"slice 1 of 4 starts at token 6, .* token 0 \(chunk_size=4\)"):
        make_plan(24, 4, None, 2, 0)
    with pytest.raises(LayoutError, match=r"slice 2 of 4 starts at token 8, inside a chunk .* at token 6"):
        make_plan(16, 4, (0, 6, 16), 2, 1)
    make_plan(24, 4, (0, 6, 12, 18, 24), 2, 0)  # each slice starts a document: nothing straddles


def test_unequal_slices_are_refused():
    with pytest.raises(LayoutError, match="multiple of 8"):
        make_plan(36, 1, None, 4, 0)


def test_an_empty_sequence_is_refused():
    with pytest.raises(LayoutError, match="a sequence of 0 tokens"):
        make_plan(0, 4)
