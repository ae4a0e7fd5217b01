"""The words of the start-up checks about the Docker backend."""

from blockyard_api.checks import docker as checks

SOCKET = "/run/docker.sock"


def test_an_api_that_may_use_the_engines_socket_is_an_error_that_says_what_it_means():
    found = checks.judged_socket(SOCKET, api_may_use_it=True, refusal=None)
    assert found.severity == "error"
    assert "access to this socket is root on this host" in found.fact
    assert found.remedy


def test_the_price_is_told_even_where_all_is_well():
    found = checks.judged_socket(SOCKET, api_may_use_it=False, refusal=None)
    assert (found.severity, found.remedy) == ("info", "")
    assert "access to this socket is root on this host" in found.fact


def test_a_helper_that_does_not_answer_is_an_error_in_its_own_words():
    refusal = ("docker_unreachable", "Start the container engine.")
    found = checks.judged_socket(SOCKET, api_may_use_it=False, refusal=refusal)
    assert found.severity == "error"
    assert "Start the container engine." in found.fact


def test_an_unknown_runtime_is_an_error_and_a_known_one_is_named():
    refusal = ("docker_runtime", "'docker.runtime' is kata, which the engine does not have; it has runc.")
    assert checks.judged_runtime(refusal, "kata", {}).severity == "error"
    found = checks.judged_runtime(None, "", {"public": "kata"})
    assert (found.severity, found.remedy) == ("ok", "")
    assert "public apps in kata, others in the engine's default" in found.fact
