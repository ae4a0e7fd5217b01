"""An app that writes without end: its log is capped, its neighbours are served, and the daemon keeps its size."""

import os
import re
import time
from pathlib import Path

import pytest
from running_pair import simple_app, wait_for

NOTE = re.compile(r"^\[blockyard [^]]+\] (\d+) bytes were dropped: more than 1 MB a second$", re.MULTILINE)
FLOODS = {
    "lines": "yes",
    "one line without an end": "yes | tr -d '[:cntrl:]'",
    "control bytes": "yes \"$(printf '\\033]0;title\\007\\033[2J\\r\\001')\"",
}


def memory_of(process):
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) << 10


def processor_of(process):
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_a_flood_costs_its_own_log_and_nobody_else_anything(pair, flood):
    name = f"flood{abs(hash(flood)) % 1000}"
    pair.deploy("beside", simple_app())
    visitor = pair.visitor()
    assert visitor.get("/app/beside/").status_code == 200
    before = memory_of(pair.api)
    pair.deploy(name, {**simple_app("system('sh /app/flood.sh', wait = FALSE)"), "flood.sh": flood})
    assert pair.visitor().get(f"/app/{name}/").status_code == 200
    (worker,) = pair.workers(name)
    wait_for(lambda: pair.workers(name)[0]["limits_hit"], what="a word of what was dropped")
    most, spent, began = 0, processor_of(pair.api), time.monotonic()
    while time.monotonic() < began + 5:
        assert visitor.get("/app/beside/").status_code == 200
        most = max(most, memory_of(pair.api))
        time.sleep(0.1)
    share = (processor_of(pair.api) - spent) / (time.monotonic() - began)
    print(f"the API: {before >> 20} MB before, {most >> 20} MB at most, {share:.2f} of a core")
    assert most - before < 32 << 20
    assert re.fullmatch(
        r"wrote more than is kept: \d+ bytes of its log were dropped", pair.workers(name)[0]["limits_hit"][0]
    )
    pair.http.post(f"/api/v1/apps/{name}/disable")
    wait_for(lambda: not pair.workers(name), what="its end")
    kept = b"".join(path.read_bytes() for path in sorted((pair.state / "logs").glob(f"{worker['id']}*")))
    assert len(kept) <= 10 << 20
    text = kept.decode(errors="replace")
    assert NOTE.search(text)
    assert text.endswith("] worker ended: the app was disabled\n")
