"""Preflight says what is there, and does not mistake one thing for another."""

import subprocess
import sys

from inplace_ttt.preflight import node as preflight
from inplace_ttt.preflight.node import State
from launching import ROOT


def test_without_a_gpu_everything_essential_is_there(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    findings = {finding.part: finding for finding in preflight.examine()}
    assert not any(finding.state is State.BROKEN for finding in findings.values())
    assert findings["megatron-core"].found.startswith("0.19")
    assert findings["GPU"].state is State.LACKING and "CPU" in findings["GPU"].meaning


def test_the_web_toolkit_named_apex_is_not_nvidias(monkeypatch):
    monkeypatch.setattr(preflight, "_version", lambda package: "0.9.10")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    finding = preflight.apex()
    assert finding.state is State.LACKING and "not NVIDIA's" in finding.found


def test_what_is_broken_ends_the_examination(monkeypatch):
    monkeypatch.setattr(preflight, "_version", lambda package: None)
    findings = preflight.examine()
    assert findings[-1].part == "datasets" and findings[-1].state is State.BROKEN


def test_command_prints_a_table_and_exits_0():
    done = subprocess.run([sys.executable, ROOT / "launch/preflight.py"], capture_output=True, text=True)
    assert done.returncode == 0 and "training can run here" in done.stdout and "megatron-core" in done.stdout
