"""The configuration file that scripts/up installs: what it shows is what is in force without it."""

import re
from dataclasses import replace
from pathlib import Path

from blockyard_api import settings

SHIPPED = Path(__file__).parents[2] / "scripts" / "blockyard.toml"
DEFAULTS = settings.load("/nonexistent", {})


def shown() -> str:
    """Give the file with every default switched on."""
    return re.sub(r"^#(?=[a-z_]+ = )", "", SHIPPED.read_text(), flags=re.MULTILINE)


def test_the_shipped_file_changes_nothing():
    assert settings.load(str(SHIPPED), {}) == replace(DEFAULTS, file=str(SHIPPED))


def test_every_default_it_shows_is_the_default(tmp_path):
    file = tmp_path / "blockyard.toml"
    without = re.sub(
        r"^(path = .*blockyard\.db|url = .*(redis|postgresql)|address = ).*", "", shown(), flags=re.MULTILINE
    )
    file.write_text(without)  # what has no default is shown by example
    assert settings.load(str(file), {}) == replace(DEFAULTS, file=str(file))


def test_it_shows_every_key():
    keys = set()
    section = ""
    for line in shown().splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
        elif match := re.match(r"([a-z_]+) = ", line):
            keys.add(f"{section}.{match[1]}")
    assert keys == set(settings.KEYS)
