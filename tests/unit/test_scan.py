"""The scan: how the rows of the state are cut into blocks, and which blocks' chunk weights are used together."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from inplace_ttt.ttt import scan
from inplace_ttt.ttt.scan import Exchange, group_blocks, row_blocks


@pytest.mark.parametrize("d, count", [(2560, 7), (2560, 4), (1024, 3), (192, 8), (5, 2), (1, 4)])
def test_blocks_cover_all_rows_once(d, count):
    blocks = row_blocks(d, count)
    assert [blocks[0].start, blocks[-1].stop] == [0, d]
    assert all(a.stop == b.start for a, b in itertools.pairwise(blocks))
    assert len(blocks) <= count and all(block.start < block.stop for block in blocks)


@pytest.mark.parametrize(
    "most, expected",
    [
        (2560, [range(0, 7)]),  # all rows fit, though seven times the largest block would not
        (2559, [range(0, 4), range(4, 7)]),
        (1200, [range(0, 3), range(3, 5), range(5, 7)]),
        (384, [range(block, block + 1) for block in range(7)]),
        (383, []),
        (0, []),
    ],
)
def test_blocks_are_used_in_as_few_groups_as_fit(most, expected):
    assert group_blocks(row_blocks(2560, 7), most) == expected


@pytest.mark.parametrize(
    "ranks, d, f, expected",
    [
        (2, 2560, 9728, 4),
        (8, 2560, 9728, 8),
        (2, 2048, 6144, 3),
        (2, 1024, 3072, 2),  # smaller ones would leave processors of the GPU idle
        (8, 1024, 3072, 2),
        (2, 64, 64, 2),
    ],
)
def test_blocks_between_gpus_are_as_many_as_fill_them(monkeypatch, ranks, d, f, expected):
    transport = object()
    monkeypatch.setattr(scan, "symmetric_memory_transport", lambda group, numels, dtype, device: transport)
    group = SimpleNamespace(size=lambda: ranks)
    blocks, found = Exchange(group, torch.float32).blocks_and_transport(1, d, f, torch.device("cuda"))
    assert found is transport and len(blocks) == expected
