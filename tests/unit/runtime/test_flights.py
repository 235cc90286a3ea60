"""Encodings that several calls share, and what becomes of them when a call ends where nobody expects it."""

from __future__ import annotations

import linecache
import sys

import pytest

import stca.runtime.flights
from stca.runtime.flights import Flights
from stca.runtime.state import StateKey, UserState

KEYS = [StateKey(user, 1, "w", "f") for user in "ab"]


def interrupted_at(line: int, call) -> bool:
    """Run `call` with a KeyboardInterrupt at the n-th line that it runs of the module; whether there is such a line."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename != stca.runtime.flights.__file__:
            return None
        if linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith("with "):
            return trace  # Python itself lets no interrupt between a body and the unlocking after it
        lines += event == "line"
        if lines == line and event == "line":
            lines += 1
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_whoever_is_interrupted_leaves_nobody_waiting():
    for line in range(1, 1000):
        flights, kept = Flights(), {}

        def encode(flights=flights, kept=kept):
            keep = lambda key, state, _: kept.__setitem__(key, state)  # noqa: E731
            return flights.encode(dict.fromkeys(KEYS), lambda xs: [UserState({}, 0) for _ in xs], keep)

        if not interrupted_at(line, encode):
            break
        assert not any(map(flights.under_way, KEYS)), f"line {line}"
        assert set(encode()[0]) == set(KEYS)
    assert 10 < line < 200


def test_states_that_were_made_before_a_failure_are_kept_and_joined():
    flights, kept = Flights(), {}

    def first_alone(xs):
        yield UserState({}, 7)
        raise ValueError(f"of {len(xs)}")

    with pytest.raises(ValueError, match="of 2"):
        flights.encode(dict.fromkeys(KEYS), first_alone, lambda key, state, _: kept.__setitem__(key, state))
    assert [(key, state.tokens) for key, state in kept.items()] == [(KEYS[0], 7)]
    assert not any(map(flights.under_way, KEYS))


def test_a_state_that_was_kept_meanwhile_is_not_made_again():
    state = UserState({}, 0)
    made, own = Flights().encode({KEYS[0]: None}, lambda _: pytest.fail("encoded"), lambda *_: None, lambda _: state)
    assert made[KEYS[0]] is state
    assert not own
