"""The real units in booted Debian machines: each test inside, `tests/vm/guest`, is one test here.

A machine is booted once, its image made by `scripts/vm-image`. What was to run inside and did not, for whatever reason,
is a failure here.
"""

import ast
import json
import os
import subprocess
import sys
import tarfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
GUEST = Path(__file__).parent / "guest"
HOSTILE = CHECKOUT / "tests" / "hostile"  # run on this host, too
sys.path.insert(0, str(GUEST))

from placement import runs_on  # noqa: E402 - its place is known only now

DEBIANS = ("debian12", "debian13")
BUILD_WITHIN, RUN_WITHIN = 1500, 3000  # seconds, both under emulation and on a busy machine
LEFT_OUT = {".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "build"}

pytestmark = pytest.mark.timeout(BUILD_WITHIN + RUN_WITHIN + 60)


def guest_tests():
    """Name every machine and test function inside, from its source, so that one that never ran is missed."""
    for path in sorted([*GUEST.glob("test_*.py"), *HOSTILE.glob("test_*.py")]):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                test = f"{path.name}::{node.name}"
                yield from ((debian, test) for debian in DEBIANS if runs_on(debian, test))


class Machine:
    """One booted machine and what its tests reported."""

    def __init__(self, debian, directory):
        self.directory = directory
        image = subprocess.run(
            [CHECKOUT / "scripts" / "vm-image", debian], stdout=subprocess.PIPE, text=True, check=True,
            timeout=BUILD_WITHIN,
        ).stdout.splitlines()[-1]  # fmt: skip
        checkout = directory / "checkout.tar"
        with tarfile.open(checkout, "w") as tar:
            tar.add(CHECKOUT, ".", filter=lambda member: None if LEFT_OUT & {*member.name.split("/")} else member)
        os.truncate(checkout, -(-checkout.stat().st_size // 512) * 512)  # a disk has whole sectors
        self.results, self.console = directory / "results", directory / "console"
        command = [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "3072",
            "-nodefaults", "-nographic", "-no-reboot", "-snapshot", "-nic", "none",
            "-kernel", f"{image}/vmlinuz", "-initrd", f"{image}/initrd.img",
            "-append", "root=LABEL=root rw console=ttyS0 quiet systemd.show_status=0",
            "-drive", f"file={image}/disk.img,format=raw,if=none,id=root",
            "-device", "virtio-blk-pci,drive=root",
            "-drive", f"file={checkout},format=raw,if=none,id=checkout",
            "-device", "virtio-blk-pci,drive=checkout,serial=checkout",
            "-device", "virtio-serial-pci", "-chardev", f"file,id=results,path={self.results}",
            "-device", "virtserialport,chardev=results,name=results",
            "-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console",
            "-object", "rng-random,filename=/dev/urandom,id=rng", "-device", "virtio-rng-pci,rng=rng",
        ]  # fmt: skip
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, check=True, timeout=RUN_WITHIN)
            self.ended = "the machine was shut down"
        except subprocess.TimeoutExpired:
            self.ended = f"the machine was stopped after {RUN_WITHIN} s"
        self.reports = defaultdict(list)
        self.shown = []
        for line in self.results.read_text(errors="replace").splitlines():
            report = json.loads(line)
            if "show" in report:
                self.shown.append(report["show"])
            else:
                self.reports[report["test"].partition("[")[0]].append(report)

    def last_words(self):
        return self.ended + ":\n" + self.console.read_text(errors="replace")[-6000:]


@pytest.fixture(scope="module")
def machines(request, tmp_path_factory):
    """A function that returns a Debian's machine; those that are asked for in this run are booted side by side."""
    wanted = {item.callspec.params["debian"] for item in request.session.items if item.path == Path(__file__)}
    with ThreadPoolExecutor() as booting:
        booted = {debian: booting.submit(Machine, debian, tmp_path_factory.mktemp(debian)) for debian in wanted}
        yield lambda debian: booted[debian].result()


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
