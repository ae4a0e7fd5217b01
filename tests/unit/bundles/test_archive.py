"""What the server makes of an unpacking that a hostile archive has taken over."""

import asyncio
import json
import sys

import pytest

from blockyard_api.bundles.archive import BundleRefused, unpack

GOOD = {"top": "", "info": {"entry": "app.R", "files": 1, "size": 10}}


def good(**info):
    return json.dumps(GOOD | {"info": GOOD["info"] | info})


LIES = {
    "nothing": "",
    "no JSON": "x",
    "a list": "[]",
    "an empty map": "{}",
    "no info": json.dumps({"top": "app"}),
    "a number for a name": json.dumps(GOOD | {"top": 1}),
    "words for numbers": good(files="many"),
    "truth for a number": good(files=True),
    "less than nothing": good(size=-5),
    "a part of a file": good(files=1.5),
    "a file that nothing starts from": good(entry="run.R"),
    "a line of its own in the log": good(entry="app.R\n2026-01-01T00:00:00Z The app serves this bundle now."),
    "a refusal of two lines": json.dumps({"refused": {"code": "no", "message": "No.\nThe app serves this bundle."}}),
    "a refusal that clears the screen": json.dumps({"refused": {"code": "no", "message": "\x1b[2J"}}),
    "a refusal that is no map": json.dumps({"refused": "no"}),
    "a refusal without a sentence": json.dumps({"refused": {"code": "no"}}),
    "half a character": json.dumps({"refused": {"code": "no", "message": "\ud800"}}),
    "a directory of somebody else": json.dumps(GOOD | {"top": "../other"}),
    "the directory above": json.dumps(GOOD | {"top": ".."}),
    "no name of a file": json.dumps(GOOD | {"top": "a\0b"}),
    "more than is read": "[" * 100_000,
}


@pytest.fixture
def taken_over(tmp_path, monkeypatch):
    """A function that unpacks with a program that does and says what it is told."""

    def unpacked(said, does=":"):
        (tmp_path / "said").write_text(said)
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\ncd $5 && {does}\ncat {tmp_path}/said\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return asyncio.run(unpack(tmp_path / "archive", tmp_path / "bundle"))

    return unpacked


@pytest.mark.parametrize("said", LIES.values(), ids=LIES)
def test_whatever_it_says_is_a_refusal_at_most(said, taken_over, tmp_path):
    with pytest.raises(BundleRefused) as refused:
        taken_over(said)
    assert refused.value.code == "unpack_failed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program", "said"]


def test_directories_without_end_are_a_refusal_as_any_other_and_nothing_of_them_stays(taken_over, tmp_path):
    deeper = f"{sys.executable} {tmp_path}/deeper"
    (tmp_path / "deeper").write_text("import os\nfor _ in range(1200): os.mkdir('d'); os.chdir('d')")
    with pytest.raises(BundleRefused) as refused:
        taken_over(json.dumps({"refused": {"code": "no", "message": "No."}}), does=deeper)
    assert refused.value.code == "no"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deeper", "program", "said"]


def test_a_link_in_place_of_the_bundle_leads_the_server_to_change_nothing_elsewhere(taken_over, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    with pytest.raises(BundleRefused) as refused:
        taken_over(json.dumps(GOOD | {"top": "link"}), does=f"ln -s {secret} link")
    assert refused.value.code == "storage_failed"
    assert secret.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "bundle").exists()


def test_a_sound_verdict_makes_the_bundle(taken_over, tmp_path):
    info = taken_over(json.dumps(GOOD | {"top": "app"}), does="mkdir -m 0700 app")
    assert (info.entry, info.files, info.size) == ("app.R", 1, 10)
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o755
