"""Latency: stages in turn, and a word where a part took longer than what holds it."""

from __future__ import annotations

from stca.checks.timing import measure_in_turn


def test_stages_are_run_in_turn() -> None:
    calls: list[str] = []
    times = measure_in_turn({n: lambda n=n: calls.append(n) for n in "abc"}, 0.0, least=4)
    assert "".join(calls) == "abc" * 5  # once to warm up
    assert {n: len(t) for n, t in times.items()} == {"a": 4, "b": 4, "c": 4}
