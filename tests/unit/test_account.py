"""What a bundle tells of its making: an entry of another kind is named, whatever reads it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import pytest
from support.errors import one_line

from stca.account import check_account
from stca.bundle import Bundle
from stca.commands import inspect_bundle
from stca.errors import BundleError

STAGE = {"name": "torch", "against": "float64", "max_abs": 0.0, "max_rel": 0.0, "cosine": 1.0, "topk_overlap": 1.0}
PARITY = {"passed": True, "reference": "float64", "stages": [{**STAGE, "limit": None, "passed": True}]}
CALIBRATED = {
    "state": {"kind": "int8", "tensors": ["token"], "granularity": "token"},
    "budget": {"auc": None, "top": {"10": 0.99}},
    "requests": 3,
    "float32_bytes": 100,
    "parts": [{"name": "token", "node": "MatMul", "rms": 0.1, "saved": 7}],
    "tried": [
        {
            "quantized": ["token"],
            "high": [],
            "ratio": 0.3,
            "weights_ratio": 1.0,
            "rms": 0.1,
            "bytes": 30,
            "verdict": "holds",
            "measures": [{"name": "AUC", "estimate": {"value": 0.0}}],
        }
    ],
}
WRONG = (5, "x", [], {}, None, [None], [5], {"x": 5}, True, 10**400)


@pytest.fixture
def whole(bundle_dir):
    return dataclasses.replace(Bundle.load(bundle_dir).manifest, parity=PARITY, quantization=CALIBRATED)


def places(tree):
    members = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, member in members:
        yield tree, key
        yield from places(member)


def test_a_sound_account(whole):
    check_account(whole)
    check_account(dataclasses.replace(whole, split={}, parity={}, quantization=None), cut=False)


@pytest.mark.parametrize("name", ["lifted", "tables", "rules", "reasons", "encoder_nodes", "hit_work_without_rules"])
def test_what_may_be_left_out_may_be_null(whole, name):
    manifest = dataclasses.replace(whole, split={**whole.split, name: None})
    check_account(manifest)
    assert inspect_bundle._why(manifest)


@pytest.mark.parametrize("part", ["parity", "quantization"])
def test_an_entry_of_another_kind_is_named(whole, part):
    """Each place of the part holds each wrong value once; what stands there is taken only where its kind fits."""
    told = copy.deepcopy(getattr(whole, part))
    refused = 0
    for holder, key in list(places(told)):
        was = holder[key]
        for value in WRONG:
            holder[key] = value
            with contextlib.suppress(BundleError):
                check_account(dataclasses.replace(whole, **{part: told}))
                continue
            refused += 1
        holder[key] = was
    assert refused > 100


@pytest.mark.parametrize(
    ("part", "told", "words"),
    [
        ("split", {"user_work": "x"}, "split: state_bytes"),
        ("parity", {"stages": 5}, "parity: passed"),
        ("parity", {**PARITY, "stages": [5]}, "parity: stages[0]"),
        ("parity", {**PARITY, "stages": [{**PARITY["stages"][0], "max_abs": None}]}, "parity: stages[0]: max_abs"),
        ("quantization", {"state": 5}, "quantization: state"),
        ("quantization", {"weights": {"kind": "fp8"}}, "quantization: weights: tensors"),
        ("quantization", {"state": {"kind": ["x"], "tensors": []}}, "quantization: state: kind"),
        ("quantization", {"tables": None}, "quantization: tables"),
    ],
)
def test_what_was_seen(whole, part, told, words):
    with one_line(BundleError, words, "export the bundle again"):
        check_account(dataclasses.replace(whole, **{part: told}))
