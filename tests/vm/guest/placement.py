"""Which machine runs which test: both, but for what is dear under emulation and the same on both."""

import re

# The beginnings of tests that one machine alone runs, each named as file::function.
ALONE = {
    "debian12": (
        "test_35_told.py::test_no_secret_",
        "test_6_checks.py",
        "test_7_firewall.py::test_in_the_forms_of_iptables_",
        "test_7_firewall.py::test_iptables_rules_",
        "test_7_firewall.py::test_systemds_filter_",
    ),
    "debian13": (
        "test_7_firewall.py::test_in_the_forms_of_nft_",
        "test_7_firewall.py::test_nft_rules_",
        "test_7_firewall.py::test_rules_that_cannot_be_made_",
        "test_7_firewall.py::test_an_app_without_a_network_",
        "test_7_firewall.py::test_the_firewalls_unit_",
        "test_8_docker_units.py",
        "test_8_harden.py",
    ),
}
# What succeeds where a layer is switched off says something about the layer alone: the host shows that.
COUNTERPROOF = re.compile(r"test_hostile_\w+\.py::(test_without_|.*_would_|.*_succeed_without_)")


def runs_on(debian: str, test: str) -> bool:
    """Tell whether a machine runs a test, which is named as file::function."""
    owners = [owner for owner, tests in ALONE.items() if test.startswith(tests)]
    return not COUNTERPROOF.match(test) and (not owners or debian in owners)
