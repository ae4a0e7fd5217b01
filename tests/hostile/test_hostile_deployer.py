"""A hostile deployer: bundles and settings that are made to do more than run an app."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from target import packed, processes_of

pytest_plugins = ["hostile_apps"]

HOOKS = {
    ".Rprofile": "file.create('/run/hostile-hook', '/tmp/hostile-hook'); cat('hooked\\n')",
    ".Renviron": "R_PROFILE_USER=/app/.Rprofile\nLD_PRELOAD=/app/x.so\nPATH=/app",
    "renv/activate.R": "file.create('/run/hostile-hook')",
    "configure": "#!/bin/sh\ntouch /run/hostile-hook /tmp/hostile-hook\n",
    "Makefile": "all:\n\ttouch /run/hostile-hook /tmp/hostile-hook\n",
    "setup.py": "open('/run/hostile-hook', 'w')",
    "data.rds": b"X\n\0\0\0\3not what it seems",
}
APP = "library(shiny)\nshinyApp(fluidPage('plain page'), function(input, output, session) {})\n"


@pytest.fixture
def victim():
    """A directory of the host that any uid may write to."""
    place = Path("/run/hostile-victim")
    place.mkdir(exist_ok=True)
    place.chmod(0o777)
    yield place
    subprocess.run(["rm", "-rf", place], check=True)


def archive_with_links(links):
    buffer = io.BytesIO(packed({"app.R": APP}))
    members = []
    with tarfile.open(fileobj=buffer) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
        for name, to in links.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, to
            tar.addfile(link)
    return made.getvalue()


def test_what_a_bundle_would_run_by_itself_runs_in_its_own_box_alone(target, neighbour_lives_on):
    hooks = [Path("/run/hostile-hook"), Path("/tmp/hostile-hook")]
    target.server.deploy("hooked", packed({"app.R": APP, **HOOKS}))
    assert not any(hook.exists() for hook in hooks)
    assert target.server.workers("hooked") == []  # a deployment runs nothing
    visitor = target.server.visitor()
    visitor.http.timeout = 300
    assert "plain page" in visitor.get("/app/hooked/").text
    worker = target.worker("hooked")
    log = target.server.http.get("/api/v1/apps/hooked/logs", params={"stream": "false"}).text
    assert "hooked" in log  # it did run, inside
    assert not any(hook.exists() for hook in hooks)
    target.end("hooked")
    assert processes_of(worker.uid) == []


def test_a_bundle_with_links_that_lead_out_is_refused_at_the_door(target, victim):
    target.server.http.post("/api/v1/apps", json={"name": "linked"})
    links = {"run": f"/oldroot{victim}", "data": "/etc", "up": "../../../../etc"}
    for name, to in links.items():
        answer = target.server.http.post("/api/v1/apps/linked/bundles", content=archive_with_links({name: to}))
        task = f"/api/v1/tasks/{answer.json()['task_id']}"
        target.server.http.get(f"{task}/logs")
        assert target.server.http.get(task).json()["status"] == "failed"
    assert os.listdir(victim) == []


def linked_bundle(target, victim):
    """A bundle as it would be if the door had let it in: each name that bwrap might look up leads to the victim."""
    bundle = target.state / "bundles" / "with-links-inside"
    subprocess.run(["rm", "-rf", bundle], check=True)
    bundle.mkdir(mode=0o755)
    bundle.chmod(0o755)
    (bundle / "attack").write_text("")
    for name in ("run", "data", "library", "tmp", "dev", "proc", "etc", "nested"):
        (bundle / name).symlink_to(f"/oldroot{victim}")
    return bundle


def test_inside_no_name_of_a_bundle_is_a_place_to_mount_at(target, shell, victim):
    bundle = linked_bundle(target, victim)
    try:
        said = shell.weakened("readlink /app/run", bundle=bundle.name)
        assert f"/oldroot{victim}" in said  # it is that bundle
        assert os.listdir(victim) == []
        # Were there a place to mount at below it, bwrap would make it on the host, or be new enough to refuse.
        shell.weakened("true", bundle=bundle.name, words=["--tmpfs /app/nested/made"], flags=["--may-fail"])
        version = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
        if tuple(map(int, version.split("."))) < (0, 11):
            assert os.listdir(victim) == ["made"]
        else:
            assert os.listdir(victim) in ([], ["made"])
    finally:
        subprocess.run(["rm", "-rf", bundle], check=True)


HOSTILE = {
    "title": ["a\r\nb", "a\0b", "\x1b[2J", "x" * 300],
    "name": ["--bind", "..", "a/b", "-", "a b", "A", "{app}", "$(id)", "a;b", "x" * 64],
    "memory_limit": ["-512m", "1e400", "max", "1m\n2m", "9" * 16, "0x10", "512m; id"],
    "cpu_limit": [-1, 0, 1e308, "1; id"],
    "network": ["bridge", "host none", "--share-net", ""],
    "access_type": ["root", "public\n", ""],
    "max_workers_per_app": [-1, 0, 2**40, True, "1"],
    "scratch_copy": ["yes", 1],
    "owner": ["admin"],
    "uid": [0],
    "data": [["/etc"]],
    "env": [{"LD_PRELOAD": "x"}],
}


@pytest.mark.parametrize("key", HOSTILE)
def test_a_hostile_setting_is_refused_and_changes_nothing(target, neighbour, key):
    before = target.server.http.get("/api/v1/apps/neighbour").json()
    for value in HOSTILE[key]:
        answer = target.server.http.patch("/api/v1/apps/neighbour", json={key: value})
        assert answer.status_code == 400, (key, value, answer.text)
        assert "Traceback" not in answer.text
    after = target.server.http.get("/api/v1/apps/neighbour").json()
    assert {**after, "status": ""} == {**before, "status": ""}


def test_text_that_looks_like_options_reaches_no_command_line(target, neighbour):
    hostile = "--bind / /hostile-place $(touch /run/hostile-hook) `id`; '\""
    target.server.deploy("options", packed({"app.R": APP}), title=hostile, description=hostile)
    visitor = target.server.visitor()
    visitor.http.timeout = 300
    assert visitor.get("/app/options/").status_code == 200
    worker = target.worker("options")
    words = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_of(worker.uid))
    assert b"options" in words
    assert b"hostile-place" not in words
    assert b"hostile-hook" not in words
    assert not Path("/run/hostile-hook").exists()
    target.end("options")
