"""AppArmor: where a profile of the host denies bwrap user namespaces, ours gives workers their sandbox back."""

from pathlib import Path

import pytest
from machine import WORKERS, active, answers, as_user, by, checks, r_process, run, switch_off, systemctl, unit
from running_pair import simple_app, wait_for

TARGET = Path("/etc/apparmor.d/blockyard")
# As an administrator may have it, or a distribution: whoever runs bwrap gets no user namespace by it.
DENYING = """abi <abi/4.0>,
profile denying_bwrap /usr/bin/bwrap flags=(attach_disconnected, mediate_deleted) {
  allow all,
  /{**,} ix,
  audit deny userns,
}
"""
# What apps do: fork, start programs, write, draw, use threads and sockets.
BUSY = """
stopifnot(identical(parallel::mclapply(1:2, function(i) i * 2, mc.cores = 2), list(2, 4)))
stopifnot(system2("/bin/sh", c("-c", shQuote("echo ran")), stdout = TRUE) == "ran")
png(tempfile()); plot(1:10); dev.off()
saveRDS(1:10, file.path("/run/worker", "kept.rds"))
unlink(file.path("/run/worker", "kept.rds"))
stopifnot(file.symlink("/app/app.R", "/tmp/link"), file.exists("/tmp/link"))
"""


def mediated():
    """Whether this kernel asks AppArmor about user namespaces; Debian 13's does."""
    mask = Path("/sys/kernel/security/apparmor/features/namespaces/mask")
    return mask.exists() and "userns_create" in mask.read_text()


def label(pid):
    return Path(f"/proc/{pid}/attr/current").read_text().strip("\0\n")


def denials(profile):
    found = run("journalctl", "--quiet", "--output=cat", f"--grep=apparmor=.DENIED.*profile=.{profile}\\b", check=False)
    return found.stdout


def restart_spawner(server):
    systemctl("restart", "blockyard-spawner.service")
    answers(server)


def visit_anew(server, app):
    """Have the app start a worker, and return what its visitor is answered."""
    switch_off(server, app)
    server.http.post(f"/api/v1/apps/{app}/enable")
    return server.visitor().get(f"/app/{app}/")


@pytest.fixture
def busy(server):
    server.deploy("busy", simple_app(BUSY, ui="fluidPage('all of it worked')"))
    return "busy"


@pytest.fixture
def denying(tmp_path):
    """A profile of the host that denies bwrap user namespaces, for the time of a test."""
    path = tmp_path / "denying_bwrap"
    path.write_text(DENYING)
    loaded = run("apparmor_parser", "-r", "-K", path, check=False)
    yield loaded
    if loaded.returncode == 0:
        run("apparmor_parser", "-R", path)


@pytest.fixture
def installing(server):
    """The command; afterwards the profile is gone, and no process is left in it."""
    yield lambda *options: by(server, "admin", "install-apparmor", *options)
    if mediated():
        run("apparmor_parser", "-R", TARGET, check=False)
    TARGET.unlink(missing_ok=True)
    (TARGET.parent / "disable" / TARGET.name).unlink(missing_ok=True)
    restart_spawner(server)


def finished(command):
    said, _ = command.communicate(timeout=120)
    return command.returncode, said


def test_what_a_profile_of_the_host_denies_to_bwrap_workers_have_by_ours(server, busy, denying, installing, show):
    show(f"AppArmor mediates user namespaces: {mediated()}")
    if not mediated():
        assert Path("/sys/module/apparmor/parameters/enabled").read_text() == "Y\n"
        assert denying.returncode != 0  # nothing here can deny it: neither the parser nor the kernel knows the rule
        assert visit_anew(server, busy).status_code == 200
        return
    assert denying.returncode == 0, denying.stderr
    refused = visit_anew(server, busy)
    assert refused.status_code >= 500
    assert "denying_bwrap" in denials("denying_bwrap")
    log = server.http.get(f"/api/v1/apps/{busy}/logs").text
    show(f"denied: {refused.status_code}, {log.strip().splitlines()[-2:]}")
    assert "Permission denied" in log
    found = checks(server)["user_namespaces"]
    assert found["severity"] == "error"
    assert "by admin install-apparmor" in found["remedy"]

    status, said = finished(installing())
    assert status == 0, said
    assert "loaded" in said
    assert "Warning" not in said
    restart_spawner(server)
    assert label(unit("blockyard-spawner.service", "MainPID")) == "blockyard (enforce)"
    served = visit_anew(server, busy)
    assert served.status_code == 200, served.text
    assert "all of it worked" in served.text
    assert checks(server)["user_namespaces"]["severity"] == "ok"
    (worker,) = active(server, busy)
    assert label(r_process(worker["id"])) == "blockyard (enforce)"

    # It is the spawner's children's alone, and confines them in nothing.
    alone = as_user("nobody", "bwrap", "--unshare-user", "--ro-bind", "/", "/", "true")
    assert "Permission denied" in alone.stderr
    assert label(unit("blockyard-api.service", "MainPID")) == "unconfined"
    server.http.post(f"/api/v1/apps/{busy}/disable")
    wait_for(lambda: not (WORKERS / "workers" / worker["id"]).exists(), 60, "its end")
    assert denials("blockyard") == ""


def test_the_profile_is_written_and_checked_and_the_units_start_as_ever(server, busy, installing, show):
    status, said = finished(installing())
    show(f"install-apparmor: {' '.join(said.split())}")
    assert status == 0
    assert TARGET.stat().st_mode & 0o7777 == 0o644
    assert ("apparmor_parser does not accept it" in said) is not mediated()
    assert ("Nothing is lacking" in said) is not mediated()
    assert ("loaded" in said) is mediated()
    assert "is as it should be" in finished(installing())[1]
    systemctl("reload", "apparmor.service")  # as at the next boot: a file that it cannot read would fail it
    restart_spawner(server)
    expected = "blockyard (enforce)" if mediated() else "unconfined"
    assert label(unit("blockyard-spawner.service", "MainPID")) == expected
    assert visit_anew(server, busy).status_code == 200
    assert denials("blockyard") == ""


def test_by_command_line_alone_it_is_for_root(server, installing):
    refused = as_user("nobody", "by", "admin", "install-apparmor")
    assert refused.returncode == 1
    assert "run this as root" in " ".join(refused.stderr.split())
    assert not TARGET.exists()
