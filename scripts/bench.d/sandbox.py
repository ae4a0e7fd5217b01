"""Part: what the sandbox costs: at a worker's start beside a bare fork and exec, and while R works in it.

Bare is the same program with the same environment and the same files, outside; no filter is the same sandbox with
`process.seccomp_profile = ""`.
"""

import os
import random
import re
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path

from _measure import Options, Row
from whole_pair import Pair, spawner

from blockyard_api.backends.spawner import encode
from blockyard_spawner import protocol

TITLE = "The sandbox: what it costs"

_LAUNCH = Path(protocol.__file__).with_name("sandboxed") / "launch.R"
_R = ("/usr/bin/R", "--no-echo", "--no-restore", "--no-save", "--no-init-file", f"--file={_LAUNCH}")
_ECHO = "/usr/bin/echo"  # in R's place: it says something, and is gone
_STARTS = 40  # a round
_NO_FILTER = 'process.seccomp_profile = ""'

_TIMED = """
work <- function() { %s }
work()
used <- system.time(work())
cat("USED", used[["user.self"]] + used[["sys.self"]], "\\n")
quit()
"""
_CPU_BOUND = """
  set.seed(1)
  for (i in 1:12) {
    x <- sort(vapply(1:60000, function(j) sin(j) * i, 0))
    words <- gsub("[aeiou]", "", paste0("word", round(x, 3)))
    table(substr(words, 5, 6))
    solve(crossprod(matrix(rnorm(40000), 200)))
  }
"""
_FILE_READING = """
  for (i in 1:8) for (file in list.files("data", full.names = TRUE)) {
    stopifnot(file.info(file)$size > 1000, nrow(read.csv(file)) == 200, nchar(readLines(file, 1)) > 0)
  }
"""
_chance = random.Random(1)  # what compresses too well is no bundle
_DATA = {
    f"data/{number:03}.csv": "a,b,c\n"
    + "".join(f"{row},{_chance.random()},text{_chance.getrandbits(64)}\n" for row in range(200))
    for number in range(100)
}


class Starter:
    """A connection to a pair's spawner, on which workers of one bundle are started."""

    def __init__(self, pair: Pair, connection: socket.socket, files: dict[str, str]) -> None:
        pair.deploy("bench", files)
        self.bundle = str(pair.http.get("/api/v1/apps/bench").json()["active_bundle"])
        self.directory = pair.state / "bundles" / self.bundle
        pair.api.terminate()  # it would stop the workers, which are not its own
        pair.api.wait()
        self._connection = connection
        self._numbers = count(1)

    @contextmanager
    def worker(self) -> Iterator[int]:
        """Start one, and yield its log; it is gone afterwards."""
        number = next(self._numbers)
        name = f"bench{number:08d}"
        reading, writing = os.pipe()
        request = protocol.Spawn(number, name, "app", "bench", bundle=self.bundle)
        socket.send_fds(self._connection, [encode(request)], [writing])
        os.close(writing)
        packet, descriptors, _, _ = socket.recv_fds(self._connection, protocol.MAX_PACKET, 1)
        if "error" in (reply := protocol.unpack(packet)):
            raise RuntimeError(f"the spawner refused: {reply}")
        try:
            yield reading
        finally:
            self._connection.send(encode(protocol.Stop(0, name, 0)))
            self._connection.recv(protocol.MAX_PACKET)
            for descriptor in (reading, *descriptors):
                os.close(descriptor)


def run(options: Options) -> list[Row]:
    """Measure all of it."""
    return [*starts(options.rounds), *work(options.rounds)]


@contextmanager
def _starters(files: dict[str, str], settings: str = "") -> Iterator[tuple[Starter, Starter]]:
    """Yield one with the filter and one without."""
    with ExitStack() as stack:
        made = []
        for more in ("", _NO_FILTER):
            # Uids apart: what one pair sees of the other's is nothing.
            first = 210_000 + len(made) * 100
            pair = stack.enter_context(Pair("bench", f"{settings}\n{more}", first_uid=first, last_uid=first + 99))
            made.append(Starter(pair, stack.enter_context(spawner(pair)), files))
        yield made[0], made[1]


def starts(rounds: int) -> list[Row]:
    """Time from the wish to the program's first byte, in turn."""
    times: dict[str, list[float]] = {"bare": [], "filtered": [], "unfiltered": []}
    with _starters({"app.R": ""}, f'process.r_path = "{_ECHO}"') as (filtered, unfiltered):
        for _ in range(rounds * _STARTS):
            times["bare"].append(_bare_start())
            times["filtered"].append(_sandboxed_start(filtered))
            times["unfiltered"].append(_sandboxed_start(unfiltered))
    bare, whole, without = (statistics.median(taken) * 1000 for taken in times.values())
    return [
        Row(
            "start: wish → the program's first byte, over a bare fork and exec, p50", f"{whole - bare:.1f} ms", "≤ 6 ms"
        ),
        Row("of which the system call filter", f"{whole - without:.2f} ms", ""),
        Row("bare fork and exec, p50", f"{bare:.1f} ms", ""),
    ]


def _bare_start() -> float:
    reading, writing = os.pipe()
    began = time.perf_counter()
    pid = os.posix_spawn(_ECHO, [_ECHO, "hello"], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writing, 1)])
    os.close(writing)
    os.read(reading, 1)
    took = time.perf_counter() - began
    os.waitpid(pid, 0)
    os.close(reading)
    return took


def _sandboxed_start(starter: Starter) -> float:
    began = time.perf_counter()
    with starter.worker() as log:
        os.read(log, 1)
        return time.perf_counter() - began


def work(rounds: int) -> list[Row]:
    """CPU time of the same R script, in turn: bare ÷ sandbox is the sandbox's throughput."""
    rows = []
    for what, script, files in (("CPU-bound", _CPU_BOUND, {}), ("file-reading", _FILE_READING, _DATA)):
        shared, unfiltered_shared = [], []
        with _starters({"app.R": _TIMED % script, **files}) as (filtered, unfiltered):
            for _ in range(rounds):
                bare, inside, without = _bare_work(filtered.directory), _work(filtered), _work(unfiltered)
                shared.append(bare / inside)
                unfiltered_shared.append(bare / without)
        with_filter, without_filter = statistics.median(shared), statistics.median(unfiltered_shared)
        rows.append(Row(f"throughput of a {what} R script, sandbox ÷ bare", f"{with_filter:.3f}", "≥ 0.97"))
        rows.append(Row("the same without the system call filter", f"{without_filter:.3f}", ""))
    return rows


def _bare_work(directory: Path) -> float:
    environ = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "R_NSIZE": "1000000", "R_VSIZE": "32M", "HOME": "/tmp"}
    done = subprocess.run(_R, cwd=directory, env=environ, capture_output=True, text=True, check=True)
    return _used(done.stdout)


def _work(starter: Starter) -> float:
    with starter.worker() as log, closing(os.fdopen(os.dup(log))) as text:
        return _used(text.read())


def _used(output: str) -> float:
    if (found := re.search(r"^USED (\S+)", output, re.MULTILINE)) is None:
        raise RuntimeError(f"the script did not end: {output}")
    return float(found[1])
