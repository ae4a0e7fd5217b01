"""The wire format: whatever bytes come, a request with exact types comes out, or a refusal with a code."""

import os
import subprocess
import sys

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockyard_api.backends.spawner import encode
from blockyard_spawner import protocol
from blockyard_spawner.protocol import Hello, Limits, List, Refused, Spawn, Stop

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)
WORKERS = st.from_regex(r"[a-z0-9]{8,32}", fullmatch=True)
SEQS = st.integers(0, 2**53 - 1)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=50)
AMOUNTS = st.none() | st.integers(1, 2**20 - 1)
CORES = st.none() | st.integers(50, 2**20 - 1)
LIMITS = st.builds(Limits, memory=AMOUNTS, cpu=CORES, pids=AMOUNTS, tmp=AMOUNTS)
REQUESTS = st.one_of(
    st.builds(Hello, SEQS, st.integers(0, 100)),
    st.builds(Stop, SEQS, WORKERS, st.integers(0, protocol.MAX_GRACE_MS)),
    st.builds(List, SEQS, st.none() | WORKERS, st.none() | WORKERS),
    st.builds(
        Spawn,
        seq=SEQS,
        id=WORKERS,
        kind=NAMES,
        app=NAMES,
        bundle=st.none() | NAMES,
        library=st.none() | NAMES,
        data=st.lists(NAMES, max_size=32).map(tuple),
        env=st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,63}", fullmatch=True), TEXTS, max_size=5),
        network=st.sampled_from([None, "host", "none"]),
        limits=LIMITS,
        scratch_copy=st.booleans(),
    ),
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda children: st.lists(children) | st.dictionaries(st.text() | st.integers(-5, 5), children),
    max_leaves=10,
)


def decoded(packet):
    """Name what became of a packet; anything but a request or a refusal is raised."""
    try:
        request = protocol.decode(packet)
    except Refused as refused:
        return refused.code
    assert type(request.seq) is int
    return "a request"


MINIMAL = {"op": "spawn", "seq": 1, "id": "worker0001", "kind": "app", "app": "a"}


@given(REQUESTS)
def test_what_is_encoded_is_decoded_the_same(request):
    assert protocol.decode(encode(request)) == request


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_and_nothing_else(packet):
    assert decoded(packet) in ("malformed", "a request")


@given(st.dictionaries(st.sampled_from(["op", "seq", "id", "kind", "app", "env", "limits", "data", "grace"]), JUNK))
def test_arbitrary_values_in_known_fields_are_refused_and_nothing_else(message):
    for operation in ("hello", "spawn", "stop", "list"):
        assert decoded(msgpack.packb(message | {"op": operation})) in ("malformed", "a request")


@given(REQUESTS, st.integers(0, 2000))
def test_a_packet_that_was_cut_is_refused(request, length):
    packet = encode(request)
    with pytest.raises(Refused):
        protocol.decode(packet[: min(length, len(packet) - 1)])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"op": "reboot"}, "malformed"),
        ({"op": ["spawn"]}, "malformed"),
        ({"op": None}, "malformed"),
        ({"uid": 0}, "malformed"),
        ({"id": "Worker0001"}, "malformed"),
        ({"id": "worker0001\n"}, "malformed"),
        ({"id": "short"}, "malformed"),
        ({"app": ""}, "malformed"),
        ({"app": "-x"}, "malformed"),
        ({"app": "a" * 65}, "malformed"),
        ({"bundle": "../x"}, "malformed"),
        ({"scratch_copy": 1}, "malformed"),
        ({"limits": {"pids": True}}, "malformed"),
        ({"limits": {"pids": 0}}, "malformed"),
        ({"limits": {"cpu": 49}}, "malformed"),
        ({"limits": {"pids": 1.0}}, "malformed"),
        ({"limits": {"disk": 1}}, "malformed"),
        ({"limits": []}, "malformed"),
        ({"data": ["x"] * 33}, "malformed"),
        ({"data": "x"}, "malformed"),
        ({"env": {"APP_X": 1}}, "malformed"),
        ({"env": {"APP_X": "a\0b"}}, "malformed"),
        ({"env": {"APP_X": "x" * 4097}}, "malformed"),
        ({"env": {f"APP_{number}": "" for number in range(65)}}, "malformed"),
        ({"env": {"A=B": ""}}, "malformed"),
        ({"network": "bridge"}, "malformed"),
        ({"seq": True}, "malformed"),
        ({"seq": -1}, "malformed"),
        ({"seq": 2**53}, "malformed"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused(change, code):
    with pytest.raises(Refused) as refusal:
        protocol.decode(msgpack.packb(MINIMAL | change))
    assert refusal.value.code == code


@pytest.mark.parametrize("missing", ["id", "kind", "app"])
def test_a_field_that_is_needed_and_missing_is_refused(missing):
    with pytest.raises(Refused, match=missing):
        protocol.decode(msgpack.packb({name: value for name, value in MINIMAL.items() if name != missing}))


def test_a_page_of_workers_fits_into_a_packet():
    record = {
        "id": "w" * 32,
        "app": "a" * 64,
        "uid": 2**31,
        "pid": 2**22,
        "cgroup": "/" + "c" * 120,
        "state": "stopping",
    }
    record["result"] = {"reason": "signalled", "status": 255, "signal": 64, "oom_kills": 2**31}
    packet = protocol.reply(seq=2**53, ok={"workers": [record] * protocol.PAGE, "more": True})
    assert len(packet) <= protocol.MAX_PACKET


def test_the_decoder_that_root_uses_behaves_the_same():
    if os.environ.get("MSGPACK_PUREPYTHON"):  # this very run: root reads no peer's bytes with C code
        assert msgpack.Unpacker.__module__ == "msgpack.fallback"
        return
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    again = subprocess.run(
        argv, env={**os.environ, "MSGPACK_PUREPYTHON": "1"}, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stdout


def test_what_is_wrong_with_a_request_is_said_in_bounded_words():
    packet = msgpack.packb({"op": "list", "seq": 1, "\x01" * 60_000: 1})
    with pytest.raises(Refused) as caught:
        protocol.decode(packet)
    assert len(caught.value.message) < 300
