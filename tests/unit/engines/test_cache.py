"""The engine cache: the same engine or none, and a reason that names what changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import stca.engines.cache
from stca.engines.cache import EngineCache, key_of, trusted, why_missed
from stca.manifest import EngineEntry

PARTS = {
    "graph": "target_scorer",
    "graph_sha256": "a" * 64,
    "weights": "b" * 64,
    "flavour": "tensorrt-rtx",
    "precision": "bf16",
    "sm": 89,
    "profiles": [{"N_h": [1, 512, 512]}],
}


def made(parts):
    return EngineEntry.of(
        {**{n: parts[n] for n in ("graph", "flavour", "precision")}, "file": "x.plan", "bytes": 40, "key": parts}
    )


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
    cache.put(key, made(PARTS), plan)
    entry, file = cache.get(key)
    assert entry == made(PARTS)
    assert file.read_bytes() == plan.read_bytes()
    assert cache.known() == [PARTS]
    assert (cache.root / "engines").stat().st_mode & 0o077 == 0  # plans are code: nobody else writes here


def test_what_cannot_be_deleted_stays(cache, plan, monkeypatch):
    def refuse(path, missing_ok=False):
        raise PermissionError(path)

    monkeypatch.setattr("stca.engines.cache._RECORDS", 0)
    monkeypatch.setattr(Path, "unlink", refuse)
    for sm in (80, 86, 89):
        parts = {**PARTS, "sm": sm}
        cache.put(key_of(parts), made(parts), plan)
        assert cache.get(key_of(parts)) is not None
    (cache.root / "engines" / f"{key_of({**PARTS, 'sm': 80})}.plan").rename(plan.with_name("gone"))
    cache.put(key_of(PARTS), made(PARTS), plan)


def test_a_damaged_plan_is_not_found(cache, plan):
    cache.put(key_of(PARTS), made(PARTS), plan)
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
        cache.put(keys[-1], made(parts), plan)
        os.utime(cache.root / "engines" / f"{keys[-1]}.plan", (sm, sm))
        if sm == 86:
            cache.get(keys[0])  # used again, so it outlives the second
    assert [cache.get(key) is not None for key in keys] == [True, False, True]
    assert len(cache.known()) == 3


def test_records_of_plans_that_made_room_go_too_when_they_are_many(cache, plan, monkeypatch):
    monkeypatch.setattr(stca.engines.cache, "_RECORDS", 2)
    for sm in range(5):
        parts = {**PARTS, "sm": sm}
        cache.put(key_of(parts), made(parts), plan)
        os.utime(cache.root / "engines" / f"{key_of(parts)}.plan", (sm, sm))
        os.utime(cache.root / "engines" / f"{key_of(parts)}.json", (sm, sm))
    left = {parts["sm"] for parts in cache.known()}
    assert {3, 4} <= left
    assert not {0, 1} & left
    assert cache.get(key_of({**PARTS, "sm": 4})) is not None


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
    far = {**PARTS, "graph_sha256": "x", "sm": 75}
    others = [far, PARTS, {**PARTS, **change, "graph": "user_encoder"}, {**PARTS, **change, "flavour": "tensorrt"}]
    assert why_missed({**PARTS, **change}, others) == said


def test_two_changes_are_both_named():
    assert why_missed({**PARTS, "sm": 80, "precision": "fp16"}, [PARTS]) == (
        "precision changed from bf16 to fp16; SM changed from 89 to 80"
    )


def test_nothing_alike_was_built():
    assert why_missed(PARTS, [{**PARTS, "graph": "user_encoder"}]) == (
        "no tensorrt-rtx engine of target_scorer was built before"
    )


def test_a_cache_that_others_can_write_to_gives_nothing_and_takes_nothing(cache, plan):
    """A plan is code to the library that loads it: whoever can put one there would run as the user."""
    cache.put(key_of(PARTS), made(PARTS), plan)
    for folder in (cache.root, cache.root / "engines"):
        folder.chmod(0o777)
        told: list[str] = []
        assert trusted(cache, told.append) is None
        assert "others can write" in told[0]
        assert str(folder) in told[0]
        assert cache.get(key_of(PARTS)) is None
        with pytest.raises(OSError, match="others can write"):
            cache.put(key_of(PARTS), made(PARTS), plan)
        folder.chmod(0o700)
    assert trusted(cache, pytest.fail) is cache
    assert cache.get(key_of(PARTS)) is not None


def test_another_users_cache_is_not_used(cache, plan, monkeypatch):
    cache.put(key_of(PARTS), made(PARTS), plan)
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    assert "another user's" in cache.distrusted()
    assert cache.get(key_of(PARTS)) is None


def test_a_link_in_the_place_of_a_plan_is_neither_read_nor_written_through(cache, plan, tmp_path):
    cache.put(key_of(PARTS), made(PARTS), plan)
    _, kept = cache.get(key_of(PARTS))
    precious = tmp_path / "precious"
    precious.write_bytes(plan.read_bytes())
    kept.unlink()
    kept.symlink_to(precious)
    assert cache.get(key_of(PARTS)) is None
    plan.write_bytes(b"new")
    cache.put(key_of(PARTS), made(PARTS), plan)
    assert precious.read_bytes() == b"p" * 40
    assert cache.get(key_of(PARTS))[1].read_bytes() == b"new"


@pytest.mark.parametrize(
    "text", ["[]", "null", "7", '{"entry": [], "sha256": 1}', '{"entry": {"key": 3}, "sha256": "x"}', "[" * 9999]
)
def test_a_record_of_another_kind_is_no_record(cache, plan, text):
    cache.put(key_of(PARTS), made(PARTS), plan)
    (cache.root / "engines" / f"{key_of(PARTS)}.json").write_text(text)
    assert cache.get(key_of(PARTS)) is None
    assert cache.known() == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, root in (("/elsewhere", "/elsewhere/stca"), ("relative", f"{tmp_path}/.cache/stca")):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert str(EngineCache.default().root) == root
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["no such user"])
    assert EngineCache.default() is None
