"""A worker's life as a transition table. Pure."""

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    """Where a worker is in its life."""

    STARTING = "starting"
    ACTIVE = "active"
    DRAINING = "draining"  # keeps the sessions it has and gets no new ones
    STOPPING = "stopping"
    ENDED = "ended"


TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.STARTING: frozenset({State.ACTIVE, State.STOPPING, State.ENDED}),
    State.ACTIVE: frozenset({State.DRAINING, State.STOPPING, State.ENDED}),
    State.DRAINING: frozenset({State.STOPPING, State.ENDED}),
    State.STOPPING: frozenset({State.ENDED}),
    State.ENDED: frozenset(),
}


class IllegalTransition(Exception):
    """A worker was to go where it cannot: a fault of this program."""


def transition(present: State, wanted: State) -> State:
    """Return `wanted` if a worker may go there. Raises IllegalTransition with both states in its text."""
    if wanted not in TRANSITIONS[present]:
        raise IllegalTransition(f"a worker that is {present} cannot become {wanted}")
    return wanted
