"""What may import what, and how large the root helper may get."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPAWNER = sorted((ROOT / "blockyard_spawner").glob("*.py"))  # what is in sandboxed/, root never loads
API = sorted((ROOT / "blockyard_api").rglob("*.py"))
BUDGET = 916  # it only ever gets smaller

# All that root runs beside the standard library.
ALLOWED = {"blockyard_spawner", "cysystemd", "msgpack", "prctl", "sdnotify"}
STANDARD = {
    "argparse",
    "asyncio",
    "collections",
    "contextlib",
    "ctypes",
    "dataclasses",
    "errno",
    "fcntl",
    "functools",
}
STANDARD |= {"itertools", "json", "mmap", "os", "pathlib", "pwd", "re", "resource", "select", "signal", "socket"}
STANDARD |= {"stat", "struct", "subprocess", "sys", "time", "tomllib", "typing"}

# The API's packages and modules, from the lowest to the highest: each imports only what stands before it.
LAYERS = ["errors", "clock", "pages", "settings", "host", "relay", "store", "hardening", "identity", "backends", "apps"]
LAYERS += ["workers", "bundles", "sessions", "checks", "http", "app", "serving", "cli", "main"]


def imported(path):
    """Name the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its direction"
            yield node.module
            if node.module in ("blockyard_api", "blockyard_spawner"):  # a module of it, not a name in it
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def code_lines(path):
    """Count lines that are neither blank nor comments nor docstrings."""
    text = path.read_text()
    documented = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and at not in documented for at, line in lines)


@pytest.mark.parametrize("path", SPAWNER, ids=lambda path: path.name)
def test_the_root_helper_loads_nothing_of_the_docker_helper(path):
    assert not [name for name in imported(path) if name.startswith("blockyard_spawner.docker") or "docker" in name]


@pytest.mark.parametrize("path", SPAWNER, ids=lambda path: path.name)
def test_the_root_helper_loads_nothing_but_what_is_listed(path):
    assert {name.split(".")[0] for name in imported(path)} <= ALLOWED | STANDARD


def test_the_api_takes_the_contract_from_the_root_helper_and_nothing_else():
    taken = {name for path in API for name in imported(path) if name.split(".")[0] == "blockyard_spawner"}
    names = {"blockyard_spawner", "blockyard_spawner.config", "blockyard_spawner.protocol", "blockyard_spawner.docker"}
    assert taken <= names


@pytest.mark.parametrize("layer", LAYERS)
def test_each_part_of_the_api_imports_only_what_lies_below_it(layer):
    inside = [path for path in API if path.relative_to(ROOT / "blockyard_api").with_suffix("").parts[0] == layer]
    names = {name for path in inside for name in imported(path) if name.startswith("blockyard_api.")}
    assert {name.split(".")[1] for name in names} <= {*LAYERS[: LAYERS.index(layer)], layer}


def test_every_part_of_the_api_has_its_place_among_the_layers():
    parts = {path.relative_to(ROOT / "blockyard_api").with_suffix("").parts[0] for path in API}
    assert parts - {"__init__"} == set(LAYERS)


def test_nothing_is_imported_by_a_name_that_is_made_up_at_run_time():
    for path in SPAWNER + API:
        assert "importlib.import_module" not in path.read_text()
        assert "__import__" not in path.read_text()


def test_the_root_helper_can_be_read_in_one_sitting():
    assert sum(map(code_lines, SPAWNER)) < BUDGET
