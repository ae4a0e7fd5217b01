"""What a worker reaches is told, and so is that nobody knows: the kernel's table of listening ports is read, or not."""

from types import SimpleNamespace

import pytest
from test_isolation import report

from blockyard_api.checks import listeners, network
from blockyard_api.checks.context import Seen

CONTEXT = SimpleNamespace(settings=SimpleNamespace(process=SimpleNamespace(network="host")))


async def test_listening_ports_that_cannot_be_listed_are_an_error(tmp_path, monkeypatch):
    table = tmp_path / "tcp"
    table.write_text("sl local_address\nno table\n")
    monkeypatch.setattr(listeners, "_TABLES", (table,))
    with pytest.raises(listeners.ListingFailed) as failure:
        listeners.listeners()
    told = await network.worker_egress(CONTEXT, Seen(report(), report(), unlisted=str(failure.value)))
    assert told.severity == "error"
    assert told.fact.startswith("Not all was tried: listening ports cannot be listed: ")


async def test_listening_ports_that_are_listed_and_not_reached_are_ok():
    assert (await network.worker_egress(CONTEXT, Seen(report(), report()))).severity == "ok"
