"""A worker's life: every pair of states is either in the table or an error that names both."""

import itertools

import pytest

from blockyard_api.workers.life import TRANSITIONS, IllegalTransition, State, transition

PAIRS = list(itertools.product(State, State))


@pytest.mark.parametrize(("present", "wanted"), PAIRS)
def test_a_transition_is_in_the_table_or_an_error_with_both_states(present, wanted):
    if wanted in TRANSITIONS[present]:
        assert transition(present, wanted) is wanted
    else:
        with pytest.raises(IllegalTransition, match=f"{present}.*{wanted}"):
            transition(present, wanted)


def test_an_ended_worker_goes_nowhere():
    assert not TRANSITIONS[State.ENDED]


def test_every_state_but_the_end_can_end():
    assert all(State.ENDED in TRANSITIONS[state] for state in State if state is not State.ENDED)
