"""The engine cache: the same engine or none, and a reason that names what changed."""

from __future__ import annotations

import os

import pytest

from stca.engine_cache import EngineCache, key_of, why_missed

PARTS = {
    "name": "target_scorer",
    "graph": "a" * 64,
    "weights": "b" * 64,
    "flavour": "tensorrt-rtx",
    "precision": "bf16",
    "sm": 89,
    "profiles": [{"N_h": [1, 512, 512]}],
}


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache", limit_bytes=100)


@pytest.fixture
def plan(tmp_path):
    file = tmp_path / "plan"
    file.write_bytes(b"p" * 40)
    return file


def test_what_was_put_is_found(cache, plan):
    key = key_of(PARTS)
    assert cache.get(key) is None
    assert cache.known() == []
    cache.put(key, {"key": PARTS, "bytes": 40}, plan)
    entry, file = cache.get(key)
    assert entry == {"key": PARTS, "bytes": 40}
    assert file.read_bytes() == plan.read_bytes()
    assert cache.known() == [PARTS]
    assert (cache.root / "engines").stat().st_mode & 0o077 == 0  # plans are code: nobody else writes here


def test_a_damaged_plan_is_not_found(cache, plan):
    cache.put(key_of(PARTS), {"key": PARTS}, plan)
    _, file = cache.get(key_of(PARTS))
    file.write_bytes(b"q" * 40)
    assert cache.get(key_of(PARTS)) is None
    (cache.root / "engines" / f"{key_of(PARTS)}.json").write_text("{")
    assert cache.get(key_of(PARTS)) is None
    assert cache.known() == []


def test_the_least_recently_used_go_first_and_are_still_known(cache, plan):
    keys = []
    for sm in (80, 86, 89):
        parts = {**PARTS, "sm": sm}
        keys.append(key_of(parts))
        cache.put(keys[-1], {"key": parts}, plan)
        os.utime(cache.root / "engines" / f"{keys[-1]}.plan", (sm, sm))
        if sm == 86:
            cache.get(keys[0])  # used again, so it outlives the second
    assert [cache.get(key) is not None for key in keys] == [True, False, True]
    assert len(cache.known()) == 3


def test_every_part_is_in_the_key():
    keys = {key_of(PARTS)} | {key_of({**PARTS, name: None}) for name in PARTS}
    assert len(keys) == 1 + len(PARTS)
    assert key_of(dict(reversed(PARTS.items()))) == key_of(PARTS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": "c" * 64}, "the weights changed from bbbbbbbbbbbb… to cccccccccccc…"),
        ({"precision": "fp16"}, "precision changed from bf16 to fp16"),
        ({"sm": 120}, "SM changed from 89 to 120"),
        ({"profiles": []}, "profiles changed from N_h 1–512 to none"),
    ],
)
def test_a_miss_names_what_changed(change, said):
    far = {**PARTS, "graph": "x", "sm": 75}
    others = [far, PARTS, {**PARTS, **change, "name": "user_encoder"}, {**PARTS, **change, "flavour": "tensorrt"}]
    assert why_missed({**PARTS, **change}, others) == said


def test_two_changes_are_both_named():
    assert why_missed({**PARTS, "sm": 80, "precision": "fp16"}, [PARTS]) == (
        "precision changed from bf16 to fp16; SM changed from 89 to 80"
    )


def test_nothing_alike_was_built():
    assert why_missed(PARTS, [{**PARTS, "name": "user_encoder"}]) == (
        "no tensorrt-rtx engine of target_scorer was built before"
    )
