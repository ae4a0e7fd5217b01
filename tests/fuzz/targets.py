"""Every target of the fuzzers: a function of seconds and a seed that returns what it did, or fails.

`scripts/fuzz` runs them for long, `test_fuzz.py` for seconds. The seed is all that is random, but for what the clock
and the kernel decide: a failure names it, and an input that coverage guidance found is kept beside it.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import contract
import exchanges
import relayed

Target = Callable[[float, int], str]


class Found(AssertionError):
    """A fault, and what brings it about again."""


def _guided(name: str, seconds: float, seed: int) -> str:
    """Run an oracle under coverage guidance for whole seconds."""
    program = Path(__file__).with_name("guided.py")
    with tempfile.TemporaryDirectory(prefix="by-fuzz-") as directory:
        ran = subprocess.run(
            [sys.executable, program, name, str(max(1, round(seconds))), str(seed), directory],
            capture_output=True, text=True, errors="replace", timeout=seconds + 60, check=False,
        )  # fmt: skip
        told = ran.stdout + ran.stderr
        for found in Path(directory).glob("[cto]*-*"):
            raise Found(f"{name}: put {found.read_bytes()!r} into tests/fuzz/corpus/{name}\n{told[-6000:]}")
        if ran.returncode:
            raise Found(f"{name} ended with status {ran.returncode}\n{told[-6000:]}")
        runs = re.search(r"Done ([0-9]+) runs", told)
        if runs is None:
            raise Found(f"{name} did not run\n{told[-6000:]}")
        return f"{runs[1]} inputs"


TARGETS: Mapping[str, Mapping[str, Target]] = {
    "spawner": {"packets": partial(_guided, "packets"), "exchanges": exchanges.exchanges},
    "relay": {"heads": partial(_guided, "heads"), "visitors": relayed.visitors, "workers": relayed.workers},
    "openapi": {"openapi": contract.openapi},
}


def run(group: str, name: str, seconds: float, seed: int) -> str:
    """Run one target; a failure names the seed."""
    try:
        return TARGETS[group][name](seconds, seed)
    except Exception as error:
        raise Found(f"again: sudo scripts/fuzz --seconds {seconds:.0f} --seed {seed} {name}\n{error}") from error
