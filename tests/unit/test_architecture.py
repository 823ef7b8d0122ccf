"""Imports between the folders of the package, as docs/architecture.md draws them."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

import inplace_ttt

ROOT = Path(inplace_ttt.__file__).parent


def _name(path: Path) -> str:
    parts = ["inplace_ttt", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(inside_functions: bool) -> dict[str, set[str]]:
    """Return the modules of the package that each module imports; optionally also those imported inside functions."""
    modules = {_name(path): path for path in ROOT.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        nodes = ast.walk(tree) if inside_functions else tree.body
        targets = set()
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("inplace_ttt"):
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                targets |= inner or {node.module}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names} & modules.keys()
        found[name] = targets - {name}
    return found


def test_modules_do_not_import_each_other_in_a_circle():
    graph, done, path = imports(inside_functions=False), set(), []

    def visit(name: str) -> None:
        if name in path:
            raise AssertionError(f"a circle of imports: {' -> '.join([*path[path.index(name) :], name])}")
        if name in done or name not in graph:
            return
        path.append(name)
        # a package's __init__ imports its modules, which import each other: only arrows between modules count
        for target in graph[name]:
            if not (ROOT / Path(*target.split(".")[1:]) / "__init__.py").is_file():
                visit(target)
        done.add(path.pop())

    for name in graph:
        visit(name)


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("ttt", {"operation"}),
        ("config", set()),
        ("models", {"config"}),
        ("operation", set()),
        ("plots", set()),
        ("megatron", {"config", "data", "environment", "files", "models", "resilience", "te", "ttt"}),
        ("data", {"config", "files", "hf", "hub", "resilience", "te", "ttt"}),
    ],
)
def test_arrows_point_down(folder, allowed):
    found = {
        target.split(".")[1]: name
        for name, targets in imports(inside_functions=True).items()
        for target in targets
        if name.split(".")[1:2] == [folder] and target.count(".")
    }
    found.pop(folder, None)
    assert found.keys() <= allowed, found


@pytest.mark.parametrize("folder", ["evaluation", "training", "inference", "benchmarks"])
def test_rooms_upstairs_are_not_imported_from_below(folder):
    above = {
        "training": {"training", "train", "benchmarks"},
        "evaluation": {"evaluation", "inference"},
        "inference": {"inference"},
        "benchmarks": {"benchmarks"},
    }
    users = {
        name.split(".")[1]
        for name, targets in imports(inside_functions=True).items()
        for target in targets
        if target.split(".")[1:2] == [folder]
    }
    assert users <= above[folder], users


def test_the_exported_file_stands_alone():
    """It may call the operation of an installed package, and nothing else of it."""
    found = imports(inside_functions=True)["inplace_ttt.hf.modeling_inplace_ttt"]
    assert {target.split(".")[1] for target in found} == {"ttt"}


def test_modules_beside_a_script_do_not_hide_the_standard_library():
    """benchmarks/serve_engine.py runs as a file, so Python looks in its folder first."""
    assert not {path.stem for path in (ROOT / "benchmarks").glob("*.py")} & sys.stdlib_module_names
