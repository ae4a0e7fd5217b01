"""What the documentation has people write, taken from its pages: a test runs it as it stands there."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"


def block(page, start):
    """Return the one indented block of a page that begins like this; an empty line within is part of it."""
    found = re.findall(r"(?:^(?:    .*)?\n)+", (DOCS / page).read_text(), re.MULTILINE)
    (block_,) = [each for each in found if each.strip().startswith(start)]
    return block_.strip("\n")
