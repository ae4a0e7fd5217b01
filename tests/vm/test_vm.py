"""The real units in booted Debian machines: each test inside, `tests/vm/guest`, is one test here.

A machine is booted once, its image made by `scripts/vm-image`, and beside other tests: `tests/conftest.py`. What was to
run inside and did not, for whatever reason, is a failure here.
"""

import ast
import sys
from pathlib import Path

import pytest
from machines import BUILD_WITHIN, CHECKOUT, RUN_WITHIN

GUEST = Path(__file__).parent / "guest"
HOSTILE = CHECKOUT / "tests" / "hostile"  # run on this host, too
sys.path.insert(0, str(GUEST))

from placement import runs_on  # noqa: E402 - its place is known only now

DEBIANS = ("debian12", "debian13")

pytestmark = pytest.mark.timeout(BUILD_WITHIN + RUN_WITHIN + 60)


def guest_tests():
    """Name every machine and test function inside, from its source, so that one that never ran is missed."""
    for path in sorted([*GUEST.glob("test_*.py"), *HOSTILE.glob("test_*.py")]):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                test = f"{path.name}::{node.name}"
                yield from ((debian, test) for debian in DEBIANS if runs_on(debian, test))


@pytest.mark.parametrize(("debian", "test"), sorted(guest_tests()))
def test_inside(machines, debian, test):
    machine = machines(debian)
    reports = machine.reports.get(test)
    assert reports, f"{test} did not run; {machine.last_words()}"
    failed = [report["detail"] for report in reports if report["outcome"] != "passed"]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("debian", DEBIANS)
def test_what_the_machine_has_to_show_is_printed(machines, debian, capsys):
    shown = machines(debian).shown
    with capsys.disabled():
        print(f"\n{debian}:", *shown, sep="\n  ")
    assert any("blockyard-api.service" in line for line in shown), machines(debian).last_words()
