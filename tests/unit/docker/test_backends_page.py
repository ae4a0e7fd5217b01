"""The page that lets an operator choose names a test for each property; each is there."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[2]
PAGE = TESTS.parent / "docs" / "backends.md"


def test_each_test_that_the_page_names_exists():
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    defined = {
        name
        for file in TESTS.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(named) >= 15
    assert named - defined == set()


def test_each_property_that_can_be_shown_names_one():
    table = PAGE.read_text().partition("| | process | docker | shown by |")[2].partition("\n\n")[0]
    unshown = [line.split("|")[1].strip() for line in table.splitlines()[2:] if "`test_" not in line]
    assert unshown == ["needs on the server"]
