"""Where apps live: raw paths are never decoded or cleaned, and a WebSocket's origin is the app's own."""

import pytest

from blockyard_api.sessions.address import Addresses, Place

PATHS = Addresses.parse("http://127.0.0.1:8081/app/{app}/")
HOSTS = Addresses.parse("https://{app}.apps.example.com/")


@pytest.mark.parametrize(
    ("target", "place"),
    [
        (b"/app/hello/", Place("hello", b"/")),
        (b"/app/hello", Place("hello", None)),
        (b"/app/hello?x=1", Place("hello", None)),
        (b"/app/hello/?x=/y/", Place("hello", b"/?x=/y/")),
        (b"/app/hello/a//b/%2F/../c", Place("hello", b"/a//b/%2F/../c")),
        (b"/app/%68ello/", Place("%68ello", b"/")),
        (b"/app/hello%2f../x/", Place("hello%2f..", b"/x/")),
        (b"/app//hello/", Place("", b"/hello/")),
        (b"/app/../hello/", Place("..", b"/hello/")),
        (b"/apphello/", None),
        (b"//app/hello/", None),
        (b"/", None),
    ],
)
def test_a_path_is_taken_apart_as_it_is(target, place):
    assert PATHS.find(b"127.0.0.1:8081", target) == place


@pytest.mark.parametrize(
    ("host", "place"),
    [
        (b"hello.apps.example.com", Place("hello", b"/a?b")),
        (b"HELLO.apps.example.com:443", Place("hello", b"/a?b")),
        (b"apps.example.com", None),
        (b"hello.apps.example.org", None),
        (b"a.b.apps.example.com", Place("a.b", b"/a?b")),  # no valid name, so refused by the gate
        (b"", None),
    ],
)
def test_a_host_names_the_app_where_each_has_its_own(host, place):
    assert HOSTS.find(host, b"/a?b") == place


def test_addresses_are_built_as_they_are_parsed():
    assert PATHS.url("hello") == "http://127.0.0.1:8081/app/hello/"
    assert PATHS.prefix("hello") == "/app/hello"
    assert HOSTS.url("hello") == "https://hello.apps.example.com/"
    assert HOSTS.prefix("hello") == ""


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (b"http://127.0.0.1:8081", True),
        (b"http://server.lan:8081", True),  # the Host the browser connected to
        (b"http://127.0.0.1:8080", False),
        (b"http://evil.example", False),
        (b"https://127.0.0.1:8081", False),
        (b"null", False),
        (b"", False),
        (b"http://127.0.0.1:8081.evil.example", False),
        (b"http://server.lan:8081/x", False),
    ],
)
def test_only_the_apps_own_origin_may_open_a_websocket(origin, allowed):
    assert PATHS.same_origin("hello", origin, b"server.lan:8081", secure=False) is allowed
