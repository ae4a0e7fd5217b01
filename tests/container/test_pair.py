"""The pair in a container, started as docs/container.md says."""

import re
import subprocess

import pytest
from running_container import documented
from running_engine import CHECKOUT

DEFAULT_CAPABILITIES = {
    *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP"),
    *("NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
}
POOL = range(60000, 61000)


def test_it_has_no_privilege_beyond_an_engines_default_and_no_socket(pair):
    found = pair.engine.show("blockyard")
    host = found["HostConfig"]
    assert host["Privileged"] is False
    assert {name.removeprefix("CAP_") for name in host["CapAdd"]} <= DEFAULT_CAPABILITIES
    assert not host["Devices"]
    assert [mount["Destination"] for mount in found["Mounts"]] == ["/var/lib/blockyard"]
    assert (host["PidMode"], host["UsernsMode"], host["IpcMode"]) == ("", "", "private")


def test_its_page_is_served_at_the_published_port_by_a_worker_with_a_uid_of_its_own(pair):
    assert "shiny" in pair.page()
    (worker,) = [fields for fields in pair.processes().values() if fields["Name"] == "R"]
    uids = {int(uid) for uid in worker["Uid"].split()}
    assert len(uids) == 1
    assert uids < set(POOL)
    assert int(worker["CapEff"], 16) == int(worker["CapBnd"], 16) == 0
    assert (worker["NoNewPrivs"], worker["Seccomp"]) == ("1", "2")
    owners = {fields["Name"]: fields["Uid"].split()[0] for fields in pair.processes().values()}
    assert (owners["container-init"], owners["blockyard-spawn"], owners["blockyard-api"]) == ("0", "65533", "900")


def test_the_spawners_root_is_not_the_hosts_and_writes_to_no_setting_of_the_host(pair):
    opened = "(exec 3>>/proc/sys/kernel/core_pattern) && echo opened || echo refused"  # and nothing is written
    assert "opened" in pair.inside(opened, user="root")  # which the container's own root may
    titles = pair.engine.run("top", "blockyard", "-o", "pid,comm").stdout
    (spawner,) = [line.split()[0] for line in titles.splitlines() if "blockyard-spawn" in line]
    as_spawner = ["nsenter", f"--target={spawner}", "--user", "--mount", "--pid", "sh", "-c"]
    tried = "id -u; grep CapEff /proc/self/status; " + opened
    told = subprocess.run([*as_spawner, tried], check=False, capture_output=True, text=True, timeout=30).stdout.split()
    assert told[0] == "0"  # root, with every capability of its namespace
    assert told[-1] == "refused"


def test_what_cannot_work_is_told_with_its_remedy_and_the_rest_is_well(pair):
    checks = pair.checks()
    assert {name for name, check in checks.items() if check["severity"] == "error"} == set()
    for name in ("cgroup_delegation", "resource_limits"):
        assert checks[name]["severity"] == "warning"
        assert "--memory" in checks[name]["remedy"]
        assert "Docker backend" in checks[name]["remedy"]
    assert "from outside, as docs/container.md shows" in checks["worker_egress"]["remedy"]
    assert checks["bwrap_host_uid_mapping"]["severity"] == checks["user_namespaces"]["severity"] == "ok"


def test_a_firewall_that_is_loaded_from_outside_tells_workers_by_their_owner(pair):
    rules = pair.inside("by admin firewall")
    enter = ["nsenter", f"--net=/proc/{pair.state()['Pid']}/ns/net", "nft"]
    subprocess.run([*enter, "-f", "-"], input=rules, text=True, check=True, timeout=30)
    try:
        assert pair.checks()["worker_egress"]["severity"] == "ok"
        assert "shiny" in pair.page()
    finally:
        subprocess.run([*enter, "delete", "table", "inet", "blockyard"], check=True, timeout=30)


def test_an_orphan_is_reaped(pair):
    def orphans() -> list[str]:
        found = pair.processes()
        return [each["State"] for pid, each in found.items() if each["PPid"] == "1" and each["Name"] == "sleep"]

    pair.inside("sh -c 'sleep 2 >/dev/null 2>&1 & exit'", user="root")
    assert orphans()  # they are the init's now
    pair.wait_for(lambda: not orphans())


@pytest.mark.parametrize("daemon", ["blockyard-spawn", "blockyard-api"])
def test_a_daemon_that_is_killed_is_started_again_in_the_same_container(pair, daemon):
    before, since = pair.pid_of(daemon), pair.state()["StartedAt"]
    pair.inside(f"kill -9 {before}", user="root")
    pair.wait_for(lambda: pair.pid_of(daemon) not in (before, None))
    pair.wait_until_served()
    pair.wait_for(lambda: "shiny" in pair.page())  # of a worker that died with the spawner: of a new one
    assert pair.state()["StartedAt"] == since


def test_it_stops_in_good_order_and_a_new_container_goes_on_with_its_state(pair):
    token = pair.inside("cat /var/lib/blockyard/admin-token")
    pair.page()  # a worker runs
    pair.engine.run("stop", "--time", "30", "blockyard")
    assert pair.state()["ExitCode"] == 0, pair.log()
    assert "of hello ended: {'reason': 'stopped'" in pair.log()
    pair.remove()
    pair.options = [*pair.options, "--env", "BLOCKYARD_PROCESS_NETWORK=none"]  # and no firewall
    pair.run()
    pair.wait_until_served()
    assert pair.inside("cat /var/lib/blockyard/admin-token") == token
    assert "shiny" in pair.page()
    pair.log_in()
    assert pair.checks()["worker_egress"]["severity"] == "ok"


def test_a_daemon_that_dies_for_good_ends_the_container_with_a_status(start, profile):
    seccomp = ("--security-opt", f"seccomp={profile}")
    wrong = start(*seccomp, "--env", "BLOCKYARD_PROCESS_SECCOMP_PROFILE=/nowhere")
    assert wrong.wait_for_end() == 1
    assert "blockyard-spawner does not start; its reason is above." in wrong.log()
    assert "'process.seccomp_profile' cannot be read" in wrong.log()


def test_without_the_profile_or_with_a_hidden_proc_the_checks_name_the_missing_option(start, profile):
    unfiltered = start("--security-opt", "systempaths=unconfined")
    hidden = start("--security-opt", f"seccomp={profile}")
    assert unfiltered.wait_for_end() == hidden.wait_for_end() == 1
    assert "user_namespaces: The container engine's system call filter keeps workers from" in unfiltered.log()
    assert "--security-opt seccomp=FILE, the file that 'by admin install-seccomp --outer' writes" in unfiltered.log()
    assert "user_namespaces: The container engine hides parts of /proc" in hidden.log()
    assert "--security-opt systempaths=unconfined (Podman: --security-opt unmask=ALL)" in hidden.log()


def test_without_root_it_needs_no_capability_and_steers_to_the_docker_backend(start, profile):
    opened = ("--security-opt", f"seccomp={profile}", "--security-opt", "systempaths=unconfined")
    given = ("--user", "900:900", "--cap-drop", "ALL", "--env", "BLOCKYARD_PROCESS_NETWORK=none")
    container = start(*opened, *given, "--security-opt", "no-new-privileges")
    container.wait_until_served()
    container.deploy_hello()
    assert "shiny" in container.page_from_inside()
    assert {fields["Uid"].split()[0] for fields in container.processes().values() if fields["Name"] != "sh"} <= {"900"}
    checks = container.checks()
    assert checks["worker_egress"]["severity"] == "ok"
    mapping = checks["bwrap_host_uid_mapping"]
    assert mapping["severity"] == "info"
    assert "use the Docker backend for apps of different owners" in mapping["remedy"]


def test_compose_has_the_options_of_the_documented_command(profile):
    compose = (CHECKOUT / "examples/compose.yaml").read_text()
    options = [option for option in documented(profile) if not option.startswith("--")]
    words = {"seccomp=/etc/blockyard/seccomp.json" if str(profile) in option else option for option in options}
    assert {word for word in words if not re.search(rf"\b{re.escape(word)}\b|{re.escape(word)}", compose)} == set()
