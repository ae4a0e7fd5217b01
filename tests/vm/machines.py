"""Boots Debian machines side by side, runs the tests of `guest` in each, and keeps what they reported."""

import contextlib
import json
import os
import subprocess
import tarfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
BUILD_WITHIN, RUN_WITHIN = 1500, 3350  # seconds, both under emulation and on a busy machine
LEFT_OUT = {".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "build"}


class Machine:
    """One machine, from its boot to its end, and what its tests reported."""

    def __init__(self, debian, directory):
        self.debian, self.directory = debian, directory
        self.results, self.console = directory / "results", directory / "console"
        self.qemu = None
        self.reports, self.shown, self.ended = defaultdict(list), [], "the machine was not booted"

    def run(self):
        """Boot it, and return it when it has ended."""
        image = subprocess.run(
            [CHECKOUT / "scripts" / "vm-image", self.debian], stdout=subprocess.PIPE, text=True, check=True,
            timeout=BUILD_WITHIN,
        ).stdout.splitlines()[-1]  # fmt: skip
        checkout = self.directory / "checkout.tar"
        with tarfile.open(checkout, "w") as tar:
            tar.add(CHECKOUT, ".", filter=lambda member: None if LEFT_OUT & {*member.name.split("/")} else member)
        os.truncate(checkout, -(-checkout.stat().st_size // 512) * 512)  # a disk has whole sectors
        command = [
            "qemu-system-x86_64", "-accel", "tcg", "-m", "3072",
            "-cpu", "Nehalem",  # without AVX, which is dear to emulate: R starts in 8 s instead of 12 to 15 on "max"
            "-smp", "1",  # a second processor costs a third more of this one's: 103 s instead of 78 for the same work
            "-nodefaults", "-nographic", "-no-reboot", "-snapshot", "-nic", "none",
            "-kernel", f"{image}/vmlinuz", "-initrd", f"{image}/initrd.img",
            # Programs at the same addresses again need no new translation: 200 processes start in 1.2 s instead of 6.8,
            # and R with Shiny in 5.6 s instead of 7.4.
            "-append", "root=LABEL=root rw console=ttyS0 quiet systemd.show_status=0 mitigations=off norandmaps",
            "-drive", f"file={image}/disk.img,format=raw,if=none,id=root",
            "-device", "virtio-blk-pci,drive=root",
            "-drive", f"file={checkout},format=raw,if=none,id=checkout",
            "-device", "virtio-blk-pci,drive=checkout,serial=checkout",
            "-device", "virtio-serial-pci", "-chardev", f"file,id=results,path={self.results}",
            "-device", "virtserialport,chardev=results,name=results",
            "-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console",
            "-object", "rng-random,filename=/dev/urandom,id=rng", "-device", "virtio-rng-pci,rng=rng",
        ]  # fmt: skip
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as self.qemu:
            try:
                status = self.qemu.wait(RUN_WITHIN)
                self.ended = f"the machine was shut down, with status {status}"
            except subprocess.TimeoutExpired:
                self.stop()
                self.ended = f"the machine was stopped after {RUN_WITHIN} s"
        whole_lines, _, _ = self.results.read_text(errors="replace").rpartition("\n")
        for line in whole_lines.splitlines():
            report = json.loads(line)
            if "show" in report:
                self.shown.append(report["show"])
            else:
                self.reports[report["test"].partition("[")[0]].append(report)
        return self

    def stop(self):
        if self.qemu is not None:
            self.qemu.kill()

    def last_words(self):
        return self.ended + ":\n" + self.console.read_text(errors="replace")[-6000:]


@contextlib.contextmanager
def running(debians, directory):
    """Run machines while something else goes on; gives a function that returns one when it has ended."""
    machines = [Machine(debian, directory / debian) for debian in debians]
    with ThreadPoolExecutor(max_workers=max(1, len(machines))) as booting:
        booted = {}
        for machine in machines:
            machine.directory.mkdir()
            booted[machine.debian] = booting.submit(machine.run)
        try:
            yield lambda debian: booted[debian].result()
        finally:  # in the middle of it, if the tests were interrupted
            for machine in machines:
                machine.stop()
