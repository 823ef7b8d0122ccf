"""In which order ranks work: everything once, and what is needed before what needs it."""

import itertools

import pytest

from inplace_ttt.ttt.order import Task, backward_order, forward_order
from inplace_ttt.ttt.plan import make_plan

LETTERS = {
    Task.TARGETS: "t",
    Task.SCAN: "S",
    Task.OUTPUTS: "o",
    Task.GRADIENTS: "g",
    Task.TARGET_GRADIENTS: "v",
    Task.INPUT_GRADIENTS: "z",
}


def plan_of(cp_size, rank, documents=None):
    return make_plan(2 * cp_size * 8, 4, documents, cp_size, rank)


def letters(order):
    return " ".join(f"{LETTERS[task]}{stage}" for task, stage in order)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("holds_windows", [True, False])
def test_everything_is_done_once_and_in_time(cp_size, holds_windows):
    for rank, split in itertools.product(range(cp_size), (False, True)):
        plan = plan_of(cp_size, rank, (0, 4, 8 * cp_size, 16 * cp_size) if split else None)
        forward, backward = letters(forward_order(plan)), letters(backward_order(plan, holds_windows))
        for stage in range(len(plan.prefix)):
            assert [word for word in forward.split() if word[1] == str(stage)] == [
                f"t{stage}",
                f"S{stage}",
                f"o{stage}",
            ]
            of_stage = "".join(word[0] for word in backward.split() if word[1] == str(stage))
            assert of_stage in ("oSg", "oSvz")  # scans use the memory of chunk weights
        for order in (forward, backward):
            scans = [word for word in order.split() if word[0] == "S"]
            assert scans == sorted(scans)  # as other ranks' carries come
        assert "S0 o0" in forward
        if not holds_windows:
            assert "S0 g0" in backward


def test_the_orders_of_four_ranks():
    plans = [plan_of(4, rank) for rank in range(4)]
    assert [letters(forward_order(plan)) for plan in plans] == [
        "t0 S0 o0 t1 S1 o1",
        "t0 S0 o0 t1 S1 o1",
        "t0 t1 S0 o0 S1 o1",
        "t0 S0 o0",
    ]
    assert [letters(backward_order(plan, True)) for plan in plans] == [
        "o0 S0 g0 o1 S1 g1",
        "o0 o1 S0 g0 S1 g1",
        "o0 o1 S0 v0 S1 z0 g1",
        "o0 S0 g0",
    ]
