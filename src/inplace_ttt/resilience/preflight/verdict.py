"""Compare the reports of all ranks, decide if the nodes can train together, and name bad nodes.

Errors: versions or code differ, GPUs are unhealthy or in use, or a node cannot read or write the run folder. Warnings:
GPUs differ, clocks differ, or matrix products or links are slow.
"""

import statistics

from inplace_ttt.resilience.preflight.node import Finding, State
from inplace_ttt.resilience.preflight.ranks import Report

SLOW_GPU, SLOW_LINK = 0.85, 0.5  # thresholds, as fractions of the median
SLOW_CPU = 0.5  # fraction of the median; lower, since other programs may use the CPU
FREE = 0.8  # smallest fraction of free GPU memory
CLOCKS = 2.0  # largest clock difference in seconds


def judge(reports: list[Report]) -> list[Finding]:
    """Return the findings of all comparisons; they name bad nodes."""
    return [
        _nodes(reports),
        _versions(reports),
        _gpus(reports),
        _speed(reports),
        _clocks(reports),
        _folder(reports),
        _reduce(reports),
        _links(reports),
    ]


def _nodes(reports: list[Report]) -> Finding:
    broken = [f"{one.host}: {part}" for one in reports for part in one.broken]
    hosts = {one.host for one in reports}
    if broken:
        return Finding("nodes", State.BROKEN, _few(broken), "run launch/preflight.py on these nodes")
    return Finding("nodes", State.THERE, f"{len(hosts)} with {len(reports)} processes", "each can train on its own")


def _versions(reports: list[Report]) -> Finding:
    odd = []
    for name in reports[0].versions:
        usual = statistics.mode(one.versions.get(name, "none") for one in reports)
        for host in dict.fromkeys(one.host for one in reports if one.versions.get(name, "none") != usual):
            theirs = next(one.versions.get(name, "none") for one in reports if one.host == host)
            odd.append(f"{host} has {name} {theirs}, others have {usual}")
    if odd:
        return Finding("versions", State.BROKEN, _few(odd), "results would depend on the node: install equal versions")
    return Finding("versions", State.THERE, f"equal, code {reports[0].versions['code']}", "")


def _gpus(reports: list[Report]) -> Finding:
    bad = [f"{_gpu_of(one)} has {one.ecc} uncorrected memory errors" for one in reports if one.ecc]
    bad += [f"{_gpu_of(one)}: wrong matrix product" for one in reports if one.wrong]
    bad += [
        f"{_gpu_of(one)}: {1 - one.free:.0%} of its memory is used by other processes"
        for one in reports
        if one.free < FREE
    ]
    if bad:
        return Finding("GPUs", State.BROKEN, _few(bad), "repair or free the node, or exclude it")
    kinds = [one.gpu or "CPU" for one in reports]
    usual = statistics.mode(kinds)
    odd = dict.fromkeys(f"{one.host} has {kind}" for one, kind in zip(reports, kinds, strict=True) if kind != usual)
    if odd:
        return Finding(
            "GPUs", State.LACKING, f"{_few(list(odd))}, others have {usual}", "every step waits for the slower ones"
        )
    if reports[0].gpu is None:
        return Finding("GPUs", State.LACKING, "none", "training runs on the CPU in fp32")
    return Finding("GPUs", State.THERE, f"{len(reports)} x {usual}, healthy and identical", "")


def _speed(reports: list[Report]) -> Finding:
    usual = statistics.median(one.flops for one in reports)
    floor = (SLOW_GPU if reports[0].gpu else SLOW_CPU) * usual
    slow = [f"{_gpu_of(one)}: {one.flops / usual:.0%} of the median" for one in reports if one.flops < floor]
    found = f"{usual / 1e12:,.3g} TFLOP/s each"
    if slow:
        return Finding("arithmetic", State.LACKING, f"{found}; {_few(slow)}", "every step waits for the slowest")
    return Finding("arithmetic", State.THERE, found, "")


def _clocks(reports: list[Report]) -> Finding:
    usual = statistics.median(one.clock for one in reports)
    off = {one.host: one.clock - usual for one in reports if abs(one.clock - usual) > CLOCKS}
    if off:
        found = _few([f"{host} is {abs(by):.1f} s {'ahead' if by > 0 else 'behind'}" for host, by in off.items()])
        return Finding("clocks", State.LACKING, found, "log times are misleading and logins may fail")
    return Finding("clocks", State.THERE, f"within {max(abs(one.clock - usual) for one in reports):.3f} s", "")


def _folder(reports: list[Report]) -> Finding:
    bad = [f"{one.host}: {one.folder}" for one in reports if one.folder]
    if bad:
        return Finding("run.dir", State.BROKEN, _few(bad), "use a folder that all nodes can read and write")
    return Finding("run.dir", State.THERE, "readable and writable on all nodes", "")


def _reduce(reports: list[Report]) -> Finding:
    if len(reports) == 1:
        return Finding("all-reduce", State.THERE, "one process", "")
    return Finding("all-reduce", State.THERE, f"{min(one.reduce_bandwidth for one in reports) / 1e9:,.3g} GB/s", "")


def _links(reports: list[Report]) -> Finding:
    """Compare links within nodes with each other, and links between nodes with each other."""
    found, slow = [], []
    for kind, inside in (("within nodes", True), ("between nodes", False)):
        links = [one for one in reports if one.link and (one.host == one.neighbour) is inside]
        if not links:
            continue
        usual = statistics.median(one.link for one in links)
        found.append(f"{usual / 1e9:,.3g} GB/s {kind}")
        for one in links:
            if one.link < SLOW_LINK * usual:
                before = reports[(one.rank - 1) % len(reports)]
                ends = f"rank {before.rank} ({before.host}) to rank {one.rank} ({one.host})"
                slow.append(f"{ends} only {one.link / 1e9:,.3g} GB/s")
    if slow:
        return Finding("ring", State.LACKING, f"{', '.join(found)}; {_few(slow)}", "carries wait for the slowest link")
    return Finding("ring", State.THERE, ", ".join(found) or "one process", "")


def _gpu_of(report: Report) -> str:
    return f"{report.host} rank {report.rank}"


def _few(texts: list[str]) -> str:
    return "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more" if len(texts) > 4 else "")
