"""Preflight says what is there, and does not mistake one thing for another."""

import os
import subprocess
import sys

from inplace_ttt.resilience.preflight import node as preflight
from inplace_ttt.resilience.preflight.node import State
from launching import ROOT


def test_without_a_gpu_everything_essential_is_there(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    findings = {finding.part: finding for finding in preflight.examine()}
    assert not any(finding.state is State.BROKEN for finding in findings.values())
    assert findings["megatron-core"].found.startswith("0.19")
    assert findings["GPU"].state is State.LACKING and "CPU" in findings["GPU"].meaning


def test_the_web_toolkit_named_apex_is_not_nvidias(monkeypatch):
    monkeypatch.setattr(preflight, "version", lambda package: "0.9.10")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    finding = preflight.apex()
    assert finding.state is State.LACKING and "not NVIDIA's" in finding.found


def test_a_transformer_engine_that_does_not_load_is_broken(tmp_path):
    """megatron-core cannot be imported either: every command that needs it reports this."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libcudnn.so.9: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)

    looked = run("launch/preflight.py")
    assert looked.returncode == 1 and "training cannot run here: Transformer Engine" in looked.stdout
    trained = run("launch/train.py", "recipe=tiny_ttt", "parallel.context_parallel_size=1")
    assert trained.returncode == 2 and len(trained.stderr.splitlines()) == 1
    assert "libcudnn.so.9" in trained.stderr and "pip uninstall transformer-engine" in trained.stderr


def test_what_is_broken_ends_the_examination(monkeypatch):
    monkeypatch.setattr(preflight, "version", lambda package: None)
    findings = preflight.examine()
    assert findings[-1].part == "datasets" and findings[-1].state is State.BROKEN


def test_command_prints_a_table_and_exits_0():
    done = subprocess.run([sys.executable, ROOT / "launch/preflight.py"], capture_output=True, text=True)
    assert done.returncode == 0 and "training can run here" in done.stdout and "megatron-core" in done.stdout
