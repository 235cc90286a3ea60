"""What clients send: keys as plain Python, text of theirs cut and quoted, options that are numbers."""

from __future__ import annotations

import datetime
from functools import reduce

import numpy as np
import pytest
from support.errors import one_line

from stca.bundle import Bundle
from stca.errors import BundleError, RequestError, one_line as on_one_line
from stca.runtime import Session
from stca.runtime.client_values import array_of, key_of, labels_of, mapping_of, odd_one, quoted


class Text(str):
    __slots__ = ()

    def __eq__(self, other):
        raise RuntimeError

    __hash__ = str.__hash__


@pytest.mark.parametrize(
    "value", ["u", b"u", 1, -7, ("u", 1), np.int32(7), None, Text("t")], ids=lambda x: type(x).__name__
)
def test_keys_are_plain(value):
    made = key_of("user", value)
    assert type(made) in (str, bytes, int, tuple, type(None))
    assert hash(made) == hash(value)


@pytest.mark.parametrize(
    "value",
    [
        True,
        10**5000,
        float("nan"),
        0.5,
        ("u", True),
        object(),
        np.array([1]),
        [1],
        reduce(lambda t, _: (t,), range(10**5), 1),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_key(value):
    with one_line(RequestError, "user", "string or an integer"):
        key_of("user", value)


def test_text_of_clients_is_cut_and_quoted():
    assert quoted("a\nb") == repr("a\nb")
    assert len(quoted("x" * 10**6)) < 80
    assert quoted(10**5000) == "(int)"


def test_errors_are_one_line_that_keeps_its_end():
    said = on_one_line("bundle\n\x1b[2J " + "x" * 10**6 + " export it anew")
    assert said.isprintable()
    assert len(said) < 1000
    assert said.endswith("export it anew")


@pytest.mark.parametrize(
    ("sent", "wanted", "said"),
    [
        ([1, None], "i", "holds None at [1]"),
        ([1, 1 << 63], "i", f"holds {1 << 63} at [1]"),
        ([[1], [2.5]], "i", "holds 2.5 at [1, 0]"),
        ([1, 2.5], "i", "holds 2.5 at [1]"),
        ([2.5, 1], "i", None),
        ([np.int32(1), None], "f", "holds None at [1]"),
        ([[1], ["2"]], "i", "holds '2' at [1, 0]"),
        ([1.5, "x"], "f", "holds 'x' at [1]"),
        ([True, None], "b", "holds None at [1]"),
        ([np.int32(1), object], "i", "holds <class 'object'> at [1]"),
        ([10**5000], "i", "holds (int) at [0]"),
        ([1, 2], "i", None),
        (np.array([None]), "i", None),
    ],
)
def test_the_entry_that_spoils_a_list(sent, wanted, said):
    assert odd_one(sent, np.asarray(sent), wanted) == said


def test_values_without_end_are_refused_unseen():
    with one_line(RequestError, "history", "send fewer"):
        array_of("history", np.broadcast_to(0, (10**13,)))


@pytest.mark.parametrize("labels", ["ab", b"ab", None, 3, ["a"], np.zeros((2, 2))])
def test_labels_of_two_requests(labels):
    with one_line(RequestError, "users"):
        labels_of("users", labels, 2)


def test_a_bundle_is_somewhere():
    with one_line(BundleError, "NoneType"):
        Bundle.load(None)
    with one_line(BundleError, "NoneType"):
        Session.load(None)


def test_nothing_of_a_callers_runs_at_the_door():
    class Zone(datetime.tzinfo):
        def utcoffset(self, when):
            raise RuntimeError("boom\nline")

    class Odd(int):
        def bit_length(self):
            raise RuntimeError

    class Inputs(dict):
        def __iter__(self):
            raise RuntimeError

        keys = __iter__

    with one_line(RequestError, "user"):
        key_of("user", datetime.datetime(2026, 1, 1, tzinfo=Zone()))
    assert key_of("user", Odd(3)) == 3
    with one_line(RequestError, "inputs", "send a dict"):
        mapping_of("inputs", Inputs(a=1))
