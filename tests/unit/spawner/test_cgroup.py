"""Where the workers' cgroups are: asked of systemd, whose silence is no answer."""

import pytest

from blockyard_spawner import cgroup
from blockyard_spawner.protocol import Limits, Refused


def test_a_systemd_that_does_not_answer_is_not_taken_for_one_without_the_unit(monkeypatch):
    monkeypatch.setattr(cgroup, "_ASK", ("timeout", "0.1", "sleep", "5"))
    monkeypatch.setattr(cgroup.os.path, "isdir", lambda path: path == "/run/systemd/system")
    with pytest.raises(TimeoutError):
        cgroup.Cgroups("").prepare()


def test_without_systemd_there_is_none(monkeypatch):
    monkeypatch.setattr(cgroup, "_ASK", ("false",))
    monkeypatch.setattr(cgroup.os.path, "isdir", lambda path: False)
    with pytest.raises(FileNotFoundError):
        cgroup.Cgroups("").prepare()


def test_a_unit_that_was_started_after_the_spawner_is_found_by_the_first_worker_that_needs_it(monkeypatch, tmp_path):
    found = cgroup.Cgroups("")
    found.mount = ""
    monkeypatch.setattr(cgroup, "_ASK", ("true",))
    with pytest.raises(Refused, match="no_cgroup"):
        found.create("worker0001", Limits(), unlimited=False)
    for knob in ("cgroup.procs", "cgroup.controllers"):
        (tmp_path / knob).touch()
    monkeypatch.setattr(cgroup, "_ASK", ("echo", str(tmp_path)))
    assert found.create("worker0001", Limits(), unlimited=False) == f"{tmp_path}/workers/worker0001"
