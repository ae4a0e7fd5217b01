"""`scripts/up`, function by function: its places are below a temporary directory, and what it starts has stand-ins."""

import re
import stat
import subprocess
from pathlib import Path

import pytest

UP = Path(__file__).parents[2] / "scripts" / "up"
PLACES = re.compile(r"(?<![\w})*])/(?=(?:etc|opt|run|usr/local|var)/)")


class Functions:
    """What `scripts/up` defines, in a machine that is a directory, for a checkout that is another."""

    def __init__(self, directory):
        self.root, self.checkout = directory / "machine", directory / "checkout"
        (self.checkout / "scripts").mkdir(parents=True)
        (self.root / "usr/local/bin").mkdir(parents=True)
        self.venv = self.root / "opt/blockyard/venv"
        self.config = self.root / "etc/blockyard/blockyard.toml"
        self.state = self.root / "var/lib/blockyard"
        definitions, _, _ = UP.read_text().partition("\n(($# <= 1))")
        self.definitions = PLACES.sub(f"{self.root}/", definitions)

    def run(self, commands):
        """Run commands after the definitions; return what they printed and their status."""
        argv = ["bash", "-c", self.definitions + commands, self.checkout / "scripts/up"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr, done.returncode

    def write(self, path, text, mode=0o644):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)


@pytest.fixture
def up(tmp_path):
    return Functions(tmp_path)


# --- the administrator's token


@pytest.fixture
def token(up):
    """A token's file, as root finds it, and a `by` that tells which token it was given."""
    path = up.state / "admin-token"
    up.write(path, "what-root-can-read\n")
    up.write(up.venv / "bin/by", '#!/bin/sh\necho "asks with $BLOCKYARD_TOKEN" >&2\necho \'"name": "hello"\'\n', 0o755)
    return path


def test_the_token_that_is_sent_is_what_the_apis_user_can_read_and_not_what_root_can(up, token):
    as_the_user = 'setsid() { echo "what-the-user-can-read: $*"; }\n'
    reads = f"timeout 10 head --bytes 4096 -- {token}"  # a link of that user's may lead to what never ends
    told, status = up.run(as_the_user + f"token={token} url=http://here\ndeploy_hello")
    assert told == f"asks with what-the-user-can-read: --wait runuser --user blockyard -- {reads}\n"
    assert status == 0


def test_a_token_that_the_apis_user_cannot_read_is_not_sent(up, token):
    told, status = up.run(f"setsid() {{ return 1; }}\ntoken={token} url=http://here\ndeploy_hello")
    assert told == f"    blockyard cannot read {token}, or it was taken away; deploy with a token of your own\n"
    assert status == 0


@pytest.mark.parametrize(("status", "as_user"), [(0, "sudo -u blockyard"), (1, "runuser -u blockyard --")])
def test_the_command_that_is_printed_reads_the_token_as_the_apis_user(up, token, status, as_user):
    there_or_not = f"curl() {{ :; }}\ncommand() {{ return {status}; }}\n"
    told, _ = up.run(f"{there_or_not}token={token} url=http://here\nannounce")
    assert f'by login --server http://here --token "$({as_user} cat {token})"; by logs hello' in told


# --- the program


def test_what_changes_in_the_checkout_while_it_is_installed_is_installed_by_the_next_run(up):
    code = up.checkout / "blockyard_api/code"
    for part in ("blockyard_api/code", "blockyard_spawner/code", "pyproject.toml", "README.md"):
        up.write(up.checkout / part, "first\n")
    pip = f'#!/bin/bash\ncp "${{@: -1}}/blockyard_api/code" {up.venv}\necho second >{code}\n'
    up.write(up.venv / "bin/pip", pip, 0o755)
    for installed in ("first\n", "second\n"):
        assert up.run("install_code") == (f"    {up.venv}\n", 0)
        assert (up.venv / "code").read_text() == installed
    assert up.run("install_code") == ("", 0)


# --- the configuration


def test_a_run_that_is_ended_before_metadata_is_seen_to_leaves_that_to_the_next_one(up):
    up.write(up.checkout / "scripts/blockyard.toml", '#network = "host"\n#skip_metadata_check = false\n')
    for file in ("sysusers", "tmpfiles"):
        up.write(up.checkout / f"systemd/blockyard.{file}", "")
    stand_ins = "systemd-sysusers() { :; }; systemd-tmpfiles() { :; }; find_token() { :; }; timeout() { :; }\n"
    _, status = up.run(stand_ins + "sed() { exit 130; }\nmake_users_and_directories")
    assert status == 130
    assert not up.config.exists()
    told, status = up.run(stand_ins + "make_users_and_directories")
    assert "a cloud's metadata service answers here" in told
    assert status == 0
    assert up.config.read_text() == 'network = "none"\nskip_metadata_check = true\n'
    assert list(up.config.parent.iterdir()) == [up.config]


@pytest.fixture
def configured(up):
    """An operator's own configuration; what is returned is where --remove keeps it."""
    up.write(up.config, "mine\n")
    up.write(up.checkout / "scripts/blockyard.toml", "shipped\n")
    return up.state / "blockyard.toml"


def test_the_configuration_is_kept_for_root_where_the_state_directory_is_gone(up, configured):
    assert up.run("keep_configuration") == (f"    your configuration is kept: {configured}\n", 0)
    assert configured.read_text() == "mine\n"
    assert stat.S_IMODE(configured.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_link_where_the_configuration_is_kept_is_replaced_and_leads_nowhere(up, configured, tmp_path, kind):
    target = tmp_path / "target"
    up.state.mkdir(parents=True)
    if kind == "file":
        target.write_text("root's")
    else:
        target.mkdir()
    configured.symlink_to(target)
    assert up.run("keep_configuration")[1] == 0
    assert not configured.is_symlink()
    assert configured.read_text() == "mine\n"
    assert target.read_text() == "root's" if kind == "file" else not list(target.iterdir())


def test_a_directory_where_the_configuration_is_kept_is_named_with_the_next_step(up, configured):
    configured.mkdir(parents=True)
    told, status = up.run("keep_configuration")
    assert told.endswith("take away what is there, then run scripts/up --remove again\n")
    assert status == 1
