"""The order in which a rank works on its two stages: what other ranks wait for comes first, and a rank that waits
computes something meanwhile.

The unit of waiting is a hop: the time in which the first block of a carry goes one rank further, by its scan and its
transfer. With Qwen3-4B's shapes and eight blocks of the state a hop takes 0.25 ms, the targets of a slice 0.35 ms, and
a product over the tokens of a slice 1.05 ms; all three grow alike with the slice.

On the way up the last rank has waited for as many hops as there are ranks before it. It then scans two slices as one
stage, so carries come back at half the pace. So each rank has time for a product over one slice between its two scans,
and for one product more the more hops away the last rank is.
"""

from enum import Enum

from inplace_ttt.ttt.plan import CALLER, Plan

MIN_HOPS_FOR_EARLY_TARGETS = 2  # that a rank must wait for targets to cost nothing


class Task(Enum):
    """Something that a pass does in each stage; the values say with what."""

    TARGETS = "targets"
    SCAN = "scan"
    OUTPUTS = "chunk weights, for out in the forward and dz in the backward"
    TARGET_GRADIENTS = "suffix sums, for dv"
    INPUT_GRADIENTS = "suffix sums, for dz"
    GRADIENTS = "suffix sums, for both"


Order = list[tuple[Task, int]]  # (task, number of the stage in the order of the pass)


def forward_order(plan: Plan) -> Order:
    """Return the order of the forward's tasks."""
    if len(plan.prefix) == 1:
        return [(Task.TARGETS, 0), (Task.SCAN, 0), (Task.OUTPUTS, 0)]
    early = plan.prefix[0].source not in (None, CALLER) and plan.cp_rank >= MIN_HOPS_FOR_EARLY_TARGETS
    return [
        (Task.TARGETS, 0),
        *[(Task.TARGETS, 1)] * early,
        (Task.SCAN, 0),
        (Task.OUTPUTS, 0),
        *[(Task.TARGETS, 1)] * (not early),
        (Task.SCAN, 1),
        (Task.OUTPUTS, 1),
    ]


def backward_order(plan: Plan, holds_windows: bool) -> Order:
    """Return the order of the backward's tasks. A scan may use the memory of chunk weights whose outputs are done.

    Args:
        holds_windows: the suffix sums of both stages can be held at once. Otherwise every scan is followed by all that
            uses it.
    """
    if len(plan.suffix) == 1:
        return [(Task.OUTPUTS, 0), (Task.SCAN, 0), (Task.GRADIENTS, 0)]
    first = [(Task.SCAN, 0), (Task.GRADIENTS, 0)]
    second = [(Task.SCAN, 1), (Task.GRADIENTS, 1)]
    if plan.suffix[0].source in (None, CALLER):  # others wait for its first carry: nothing of the second stage yet
        return [(Task.OUTPUTS, 0), *first, (Task.OUTPUTS, 1), *second]
    if holds_windows and plan.cp_rank == plan.cp_size - 2:  # next to the last rank: there is time for one product
        first = [(Task.SCAN, 0), (Task.TARGET_GRADIENTS, 0)]
        second = [(Task.SCAN, 1), (Task.INPUT_GRADIENTS, 0), (Task.GRADIENTS, 1)]
    return [(Task.OUTPUTS, 0), (Task.OUTPUTS, 1), *first, *second]
