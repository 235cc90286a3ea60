"""The short form of the fuzzer of the server's requests, and that it sees what goes wrong."""

from __future__ import annotations

import bodies
import pytest

from stca.bundle import Bundle


def test_changed_requests_are_answered_and_the_server_goes_on() -> None:
    outcomes = list(bodies.found(str(n) for n in range(270)))
    assert [o for o in outcomes if o.kind not in ("served", "refused")] == []
    assert {o.kind for o in outcomes} == {"served", "refused"}


@pytest.mark.parametrize(
    ("status", "kind"), [(200, "served"), (400, "refused"), (500, "unexpected"), (503, "unexpected")]
)
def test_it_sees_what_is_wrong(status: int, kind: str) -> None:
    assert bodies._judged_http("0", status, b'{"error": "x"}').kind == kind
    assert bodies._judged_http("0", 400, b'{"error": "x\\ny"}').kind == "unexpected"
    assert bodies._judged_grpc("0", "INTERNAL", "").kind == "unexpected"


def test_the_bundle_is_one_that_every_release_reads() -> None:
    assert Bundle.load(bodies.BUNDLE).manifest.weights
