"""Random requests: valid for any specs, and packed as the graphs want them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from stca import probe
from stca.specs import TensorSpec

SPECS = (
    TensorSpec("history_item", "int64", ("N_h",), "user", 1000),
    TensorSpec("history_time", "int64", ("N_h",), "user"),
    TensorSpec("history_vector", "float32", ("N_h", 3), "user"),
    TensorSpec("history_offsets", "int32", ("B_plus_1",), "user"),
    TensorSpec("user_flag", "bool", ("B",), "user"),
    TensorSpec("request_half", "float16", ("B", 2), "request"),
    TensorSpec("target_item", "int64", ("N_t",), "target", 1000),
    TensorSpec("target_kind", "int32", ("N_t",), "target", 2),
    TensorSpec("target_offsets", "int32", ("B_plus_1",), "target"),
)
sizes = st.integers(0, 30)


@pytest.mark.parametrize(("dtype", "blank"), [("bool", 0), ("bool", 1), ("int64", 0), ("int64", 2), ("float32", 0)])
def test_no_request_is_of_what_stands_for_no_event_alone(dtype, blank):
    limit = 3 if dtype == "int64" else None
    specs = (TensorSpec("mask", dtype, (1, "N_h"), "user", limit, blank=blank), *SPECS[-2:])
    for seed in range(20):
        made = probe.single(specs, 1, 2, np.random.default_rng(seed))
        for request in (made, probe.padded(specs, made, np.random.default_rng(seed))):
            assert (request["mask"] != blank).any()
            assert request["mask"].max() <= 2 or limit is None


@given(sizes, sizes, st.integers(0, 2**32))
def test_a_single_request_is_valid(tokens, targets, seed):
    made = probe.single(SPECS, tokens, targets, np.random.default_rng(seed))
    assert made.keys() == {s.name for s in SPECS if not s.name.endswith("offsets")}
    known = {"N_h": tokens, "N_t": targets, "B": 1}
    for spec in SPECS:
        if spec.name in made:
            x = made[spec.name]
            assert x.dtype == np.dtype(spec.dtype)
            assert x.shape == tuple(known.get(n, n) for n in spec.shape)
            if x.dtype.kind == "f":
                assert np.isfinite(x).all()
            elif spec.limit and x.size:
                assert x.min() >= 0
                assert x.max() < spec.limit
    assert len(set(made["target_item"].tolist())) == targets, "equal targets would tie"


def test_seeds_repeat_and_differ():
    first, again, other = (probe.single(SPECS, 9, 5, np.random.default_rng(s)) for s in (1, 1, 2))
    assert all(np.array_equal(first[n], again[n]) for n in first)
    assert not np.array_equal(first["history_item"], other["history_item"])


def test_integers_without_a_limit_are_modest_and_large_where_that_is_asked_for():
    made = probe.single(SPECS, 10_000, 1, np.random.default_rng(0))
    assert 500 < made["history_time"].max() < probe.MODEST
    large = probe.wide(SPECS, made, np.random.default_rng(0))["history_time"]
    assert large.min() < 2**14, "no duration of the first buckets"
    assert large.max() > 2**22, "no duration of the last bucket"
    bytes_ = (TensorSpec("x", "int8", ("N_h",), "user"),)
    assert probe.single(bytes_, 1000, 1, np.random.default_rng(0))["x"].min() >= 0
    assert not probe.unlimited(bytes_)


def test_floats_from_a_least_value_on():
    spec = TensorSpec("price", "float32", ("N_t",), "target", low=3)
    made = probe.single((spec,), 0, 1000, np.random.default_rng(0))["price"]
    assert made.min() >= 3
    assert made.max() > 5


def test_more_targets_than_ids():
    made = probe.single((TensorSpec("t", "int64", ("N_t",), "target", 3),), 0, 10, np.random.default_rng(0))
    assert set(made["t"].tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64"])
def test_every_dtype_of_a_manifest(dtype):
    spec = TensorSpec("x", dtype, ("N_h", 2), "user")
    x = probe.single((spec,), 50, 0, np.random.default_rng(0))["x"]
    assert (x.dtype, x.shape) == (np.dtype(dtype), (50, 2))
    assert len(np.unique(x)) > 1


def test_other_symbolic_sizes():
    spec = TensorSpec("x", "float32", ("N_h", "K"), "user")
    made = probe.single((spec,), 4, 0, np.random.default_rng(0), N_h=5, K=7)
    assert made["x"].shape == (5, 7)


def test_rows_by_any_name():
    """Exporters name sizes as they like; a user's last symbolic size counts tokens, a target's targets."""
    specs = (
        TensorSpec("u", "float32", ("batch", "seq", 3), "user"),
        TensorSpec("mask", "bool", ("batch", "seq"), "user"),
        TensorSpec("t", "float32", ("batch", "cand"), "target"),
        TensorSpec("page", "int64", ("batch",), "request", 5),
    )
    made = probe.single(specs, 4, 2, np.random.default_rng(0))
    assert {n: x.shape for n, x in made.items()} == {"u": (1, 4, 3), "mask": (1, 4), "t": (1, 2), "page": (1,)}


@given(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=5))
def test_packing_joins_rows_and_counts_them(batch):
    rng = np.random.default_rng(0)
    requests = [probe.single(SPECS, n, m, rng) for n, m in batch]
    feeds = probe.pack(SPECS, requests)
    assert list(feeds) == [s.name for s in SPECS]
    assert feeds["history_offsets"].tolist() == [sum(n for n, _ in batch[:i]) for i in range(len(batch) + 1)]
    assert feeds["target_offsets"].tolist() == [sum(m for _, m in batch[:i]) for i in range(len(batch) + 1)]
    for spec in SPECS:
        assert feeds[spec.name].dtype == np.dtype(spec.dtype)
    for b, request in enumerate(requests):
        tokens = slice(*feeds["history_offsets"][b : b + 2])
        targets = slice(*feeds["target_offsets"][b : b + 2])
        assert np.array_equal(feeds["history_vector"][tokens], request["history_vector"])
        assert np.array_equal(feeds["target_item"][targets], request["target_item"])
        assert np.array_equal(feeds["request_half"][b : b + 1], request["request_half"])


def test_packing_one_request_of_a_model_without_offsets():
    specs = (TensorSpec("u", "float32", ("N_h", 3), "user"), TensorSpec("t", "float32", ("N_t",), "target"))
    one = probe.single(specs, 4, 2, np.random.default_rng(0))
    assert probe.pack(specs, [one]) == one


def test_packing_offsets_of_which_no_input_has_rows():
    """As a session takes them: nobody has a row."""
    offsets = TensorSpec("target_offsets", "int32", ("B_plus_1",), "target")
    specs = (TensorSpec("history_item", "int64", ("N_h",), "user"), offsets)
    requests = [{"history_item": np.arange(n)} for n in (3, 2)]
    packed = probe.pack(specs, requests)
    assert packed["target_offsets"].tolist() == [0, 0, 0]
