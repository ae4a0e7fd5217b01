"""`by admin firewall` as an administrator runs it: no server is asked, nothing is changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockyard_api.hardening.firewall import Format

BY = Path(sys.executable).with_name("by")


def by(*arguments, status=0, **environ):
    kept = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    done = subprocess.run([BY, *arguments], env=kept | environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "my server.toml"
    file.write_text('[redis]\nurl = "redis://:secret@127.0.0.1:6399/0"\n[vault]\naddress = "https://vault.invalid"\n')
    return str(file)


def test_it_prints_rules_for_nftables_unless_told_otherwise(config):
    printed = by("admin", "firewall", "--config", config)
    assert 'ip daddr 127.0.0.1 tcp dport 6399 counter goto refuse comment "redis.url: 127.0.0.1"' in printed.stdout
    assert printed.stdout.startswith("#")
    assert printed.stdout.endswith("}\n")


def test_it_says_what_it_could_not_look_up_beside_the_rules(config):
    assert "vault.address: vault.invalid has no address now" in by("admin", "firewall", "--config", config).stderr


@pytest.mark.parametrize("form", Format)
def test_a_secret_is_not_printed(config, form):
    printed = by("admin", "firewall", "--config", config, "--format", form)
    assert "secret" not in printed.stdout + printed.stderr


def test_the_commands_that_load_name_the_configuration_ready_for_a_shell(config):
    printed = by("admin", "firewall", "--config", config, "--apply-with")
    assert printed.stdout == f"by admin firewall --format nft --config '{config}' | nft --file -\n"


def test_json_has_the_rules_and_the_commands(config):
    found = json.loads(by("admin", "firewall", "--config", config, "--format", "systemd", "--json").stdout)
    assert found["format"] == "systemd"
    assert "IPAddressDeny=169.254.0.0/16" in found["rules"]
    assert "&& systemctl daemon-reload &&" in found["apply_with"][0]


def test_long_rules_are_not_broken_on_a_narrow_terminal(config):
    wide = by("admin", "firewall", "--config", config).stdout
    assert by("admin", "firewall", "--config", config, COLUMNS="40").stdout == wide


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[redis]\nurl = "redis://:secret@1.2.3.4; flush ruleset"\n', "'redis.url' must be such as"),
        ("[proxy]\nmax_worker = 5\n", "did you mean 'proxy.max_workers'"),
        ("[proxy\n", "correct the file"),
    ],
)
def test_a_configuration_that_is_wrong_is_one_sentence(tmp_path, text, words):
    file = tmp_path / "blockyard.toml"
    file.write_text(text)
    failed = by("admin", "firewall", "--config", str(file), status=1)
    assert words in failed.stderr
    assert "secret" not in failed.stderr
    assert failed.stdout == ""


def test_a_configuration_that_is_named_and_not_there_is_wrong_use(tmp_path):
    for option in ((), ("--apply-with",)):
        failed = by("admin", "firewall", "--config", str(tmp_path / "absent.toml"), *option, status=2)
        assert "absent.toml" in failed.stderr
        assert failed.stdout == ""


def test_what_has_no_address_is_a_warning_in_json_and_nothing_beside_it(config):
    printed = by("admin", "firewall", "--config", config, "--json")
    assert "vault.invalid has no address now" in json.loads(printed.stdout)["warnings"][0]
    assert printed.stderr == ""


def test_a_tool_that_it_does_not_know_is_wrong_use():
    assert "nft-cgroup" in by("admin", "firewall", "--format", "pf", status=2).stderr
