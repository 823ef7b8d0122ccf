"""Order the tasks of a rank for its two scan stages.

Work that other ranks wait for comes first. A rank that waits for a carry computes something else meanwhile.

The unit of waiting is a hop: the time to scan the first block of a carry and to send it to the next rank. With
Qwen3-4B's shapes and eight blocks of the state, a hop takes 0.25 ms, the targets of a slice 0.35 ms, and a product over
the tokens of a slice 1.05 ms. All three are proportional to the slice length.

Before its scan the last rank waits one hop for each rank before it. It then scans two slices as one stage, so carries
return at half the rate. Each rank can therefore run one product over a slice between its two scans, plus additional
products in proportion to its distance from the last rank.
"""

from enum import Enum

from inplace_ttt.ttt.plan import CALLER, Plan

MIN_HOPS_FOR_EARLY_TARGETS = 2  # a rank that waits this many hops can compute targets of a slice meanwhile


class Task(Enum):
    """Name a step that the forward or the backward runs for each scan stage."""

    TARGETS = "targets of a stage"
    SCAN = "scan of a stage"
    OUTPUTS = "products with chunk weights: out in the forward, dz in the backward"
    TARGET_GRADIENTS = "products with suffix sums: dv"
    INPUT_GRADIENTS = "products with suffix sums: dz"
    GRADIENTS = "products with suffix sums: dv and dz"


Order = list[tuple[Task, int]]  # (task, index of the stage in the order of the scan)


def forward_order(plan: Plan) -> Order:
    """Return the tasks of the forward, in order."""
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
    """Return the tasks of the backward, in order.

    A scan may reuse the memory of chunk weights after their ``OUTPUTS`` task.

    Args:
        holds_windows: True if the suffix sums of both stages fit in memory. If False, all tasks that use a scan follow
            it directly.
    """
    if len(plan.suffix) == 1:
        return [(Task.OUTPUTS, 0), (Task.SCAN, 0), (Task.GRADIENTS, 0)]
    first = [(Task.SCAN, 0), (Task.GRADIENTS, 0)]
    second = [(Task.SCAN, 1), (Task.GRADIENTS, 1)]
    if plan.suffix[0].source in (None, CALLER):  # other ranks wait for this rank's first carry: defer the second stage
        return [(Task.OUTPUTS, 0), *first, (Task.OUTPUTS, 1), *second]
    if holds_windows and plan.cp_rank == plan.cp_size - 2:  # the rank before the last one has time for one product
        first = [(Task.SCAN, 0), (Task.TARGET_GRADIENTS, 0)]
        second = [(Task.SCAN, 1), (Task.INPUT_GRADIENTS, 0), (Task.GRADIENTS, 1)]
    return [(Task.OUTPUTS, 0), (Task.OUTPUTS, 1), *first, *second]
