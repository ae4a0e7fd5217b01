"""The security model's tables name tests that exist, and leave out no way of attack that the design knows."""

import ast
import re
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "security-model.md"
HOSTILE = TESTS / "hostile"
WAYS = set(range(1, 41))  # the design's ways of attack


def rows(heading):
    """The cells of each row of the table below a heading."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named():
    """Name each test that the page mentions."""
    return sorted(set(re.findall(r"`([\w/]+\.py::test_\w+)`", PAGE.read_text())))


@pytest.mark.parametrize("test", named())
def test_a_test_that_the_page_names_exists(test):
    path, _, name = test.partition("::")
    tree = ast.parse((TESTS / path).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert name in functions


def test_every_way_of_attack_has_a_row_with_a_test():
    table = rows("What each attack meets")
    assert {int(cells[0]) for cells in table} == WAYS
    assert [cells[0] for cells in table if "::test_" not in cells[-1]] == []


def test_every_property_beside_others_has_a_test_or_a_measurement():
    table = rows("Beside other ways to run apps")
    assert len(table) >= 8
    assert [cells[0] for cells in table if "::test_" not in cells[-1] and "[Speed](speed.md)" not in cells[-1]] == []


def test_every_attack_of_the_suite_belongs_to_a_row():
    sys.path.insert(0, str(HOSTILE))
    try:
        from attacks import ATTACKS, CALLS, PRIVILEGED_CALLS  # noqa: PLC0415 - its place is known only now
    finally:
        sys.path.remove(str(HOSTILE))
    assert {attack.row for attack in (*ATTACKS, *CALLS, *PRIVILEGED_CALLS)} <= WAYS
    names = [attack.name for attack in (*ATTACKS, *CALLS, *PRIVILEGED_CALLS)]
    assert len(set(names)) == len(names)
    assert [name for name in names if "/" in name] == []  # the booted machines report by what follows the last slash
