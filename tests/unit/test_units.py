"""The units of systemd: each directive has its reason above it."""

from pathlib import Path

import pytest

UNITS = sorted(path for path in (Path(__file__).parents[2] / "systemd").iterdir() if "[Unit]" in path.read_text())


def unexplained(text):
    """Name the directives of groups that no comment begins; a comment, a blank line or a section begins a group."""
    explained = False
    for line in text.splitlines():
        if not line or line.startswith(("#", "[")):
            explained = line.startswith("#")
        elif not explained and not line.startswith("Description="):  # which says by itself what it is for
            yield line


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_every_directive_has_a_reason(path):
    assert list(unexplained(path.read_text())) == []


def test_a_directive_without_a_reason_is_found():
    text = "# why\n[Service]\nA=1\n# why\nB=1\nC=1\n\nD=1\n"
    assert list(unexplained(text)) == ["A=1", "D=1"]
