"""Which machine runs which test: both, but for what is dear under emulation and the same on both."""

import re

# The beginnings of tests that one machine alone runs, each named as file::function.
ALONE = {
    "debian12": (
        "test_1_units.py::test_a_stranger_",
        "test_1_units.py::test_run_again_",
        "test_2_survival.py::test_a_killed_spawner_",
        "test_2_survival.py::test_after_a_restart_of_the_api_",
        "test_3_limits.py",
        "test_35_told.py::test_a_full_",
        "test_35_told.py::test_no_secret_",
        "test_35_told.py::test_the_workers_",
        "test_4_operating.py::test_a_backup_",
        "test_4_operating.py::test_a_forgotten_",
        "test_4_operating.py::test_a_visitor_",
        "test_4_operating.py::test_logs_",
        "test_4_operating.py::test_no_connection_",
        "test_4_operating.py::test_the_emergency_",
        "test_5_boundary.py::test_a_worker_",
        "test_5_boundary.py::test_an_administrator_",
        "test_6_checks.py",
        "test_6_filter.py",
        "test_7_firewall.py::test_in_the_forms_of_iptables_",
        "test_7_firewall.py::test_systemds_filter_",
        "test_8_lockdown.py::test_an_app_uses_no_",
        "test_8_lockdown.py::test_the_holders_walls_",
        "test_9_end.py::test_removing_it_",
    ),
    "debian13": (
        "test_1_units.py::test_the_address_",
        "test_1_units.py::test_the_sockets_",
        "test_2_survival.py::test_a_restart_of_the_spawner_",
        "test_2_survival.py::test_after_the_apis_kill_",
        "test_35_told.py::test_the_whole_tree_",
        "test_4_operating.py::test_a_worker_outlives_",
        "test_7_firewall.py::test_in_the_forms_of_nft_",
        "test_7_firewall.py::test_nft_rules_",
        "test_7_firewall.py::test_rules_that_cannot_be_made_",
        "test_7_firewall.py::test_the_firewalls_unit_",
        "test_8_apparmor.py::test_what_a_profile_",
        "test_8_docker_units.py",
        "test_8_harden.py",
        # On the host, too, which may be a Debian 12; but files without end want a memory controller.
        "test_hostile_ends.py::test_a_",
        "test_hostile_ends.py::test_of_",
        "test_hostile_ends.py::test_the_",
    ),
}
# Hostile programs that only the host runs: those that meet the relay and the unpacker, or stand where the API connects
# to, which are the same everywhere; a race that needs two processors; and those that succeed where a layer is switched
# off, which tells of that layer.
ON_HOST = re.compile(
    r"test_hostile_((answers|deployer)\.py::|ends\.py::test_what_stands_in_place_|api\.py::test_a_bundle_that_is_swapped_"
    r"|\w+\.py::(test_without_|.*_would_|.*_succeed_without_))"
)


def runs_on(debian: str, test: str) -> bool:
    """Tell whether a machine runs a test, which is named as file::function."""
    owners = [owner for owner, tests in ALONE.items() if test.startswith(tests)]
    return not ON_HOST.match(test) and (not owners or debian in owners)
