"""The config: what it accepts comes back from JSON as it was, what it refuses it refuses in one line."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, strategies as st
from support import tiny
from support.errors import nothing_or_one_line, one_line

from stca.errors import CheckpointError
from stca.export.reference.config import StcaConfig
from stca.export.reference.module import Stca

names = st.text("abcdefghijk_", min_size=1, max_size=5)
fields = st.dictionaries(names, st.integers(1, 9), max_size=3).map(lambda d: tuple(d.items()))


@given(
    st.integers(1, 10**9), st.lists(names, min_size=1, max_size=3), fields, fields, st.integers(1, 8), st.integers(1, 8)
)
def test_json_round_trip(items, tasks, history, user, heads, head_width):
    if any(dict(user).get(n, s) != s for n, s in history) or {"item", "time", "gap", "offsets"} & dict(history).keys():
        return
    if {"item", "time", "gap", "offsets"} & dict(user).keys() or len(set(tasks)) < len(tasks):
        return
    config = StcaConfig(
        items=items,
        tasks=tuple(tasks),
        history_fields=history,
        user_fields=user,
        heads=heads,
        width=heads * head_width,
    )
    assert StcaConfig.from_json(config.to_json()) == config
    assert hash(StcaConfig.from_json(config.to_json())) == hash(config)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.config().width = 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 25}, ("width 25", "heads 3")),
        ({"items": 0}, ("items", "0", "at least 1")),
        ({"layers": -1}, ("layers", "-1")),
        ({"max_history": 0}, ("max_history",)),
        ({"tasks": ()}, ("tasks",)),
        ({"time": "both"}, ("time", "'both'", "'log'", "'delta'")),
        ({"history_fields": (("category", 8),)}, ("category", "8", "7")),
        ({"user_fields": (("item", 8),)}, ("'item'", "taken")),
        ({"user_fields": (("segment", 0),)}, ("segment", "0")),
        ({"user_fields": (("a", 2), ("a", 2))}, ("'a'",)),
        ({"history_fields": (("category", 7), ("category", 7))}, ("'category'",)),
        ({"user_fields": (("a.b", 2),)}, ("'a.b'",)),
        ({"user_fields": (("", 2),)}, ("''",)),
        ({"user_fields": (("two words", 2),)}, ("'two words'",)),
        ({"tasks": ("finish", "finish")}, ("tasks", "'finish'", "different")),
        ({"tasks": "finish"}, ("tasks",)),
    ],
)
def test_refuses(changes, words):
    with one_line(CheckpointError, "config", *words):
        tiny.config(**changes)


@pytest.mark.parametrize("name", ["type", "keys", "items", "values", "float", "get", "training"])
def test_a_field_name_that_torch_modules_have_as_an_attribute(name):
    with one_line(CheckpointError, "config", f"'{name}'", "taken"):
        Stca(tiny.config(user_fields=((name, 3),)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("JSON",)),
        ("{", ("JSON",)),
        ("[]", ("JSON object",)),
        ("null", ("JSON object",)),
        ("[" * 100_000, ("JSON",)),
        ('{"items": ' + "1" * 5000 + "}", ("JSON",)),
        ("{}", ("'items'",)),
        ('{"items": 9, "witdh": 3}', ("'witdh'", "width")),
        ('{"items": "9"}', ("items", "'9'", "integer")),
        ('{"items": true}', ("items", "integer")),
        ('{"items": NaN}', ("items",)),
        ('{"items": 9.0}', ("items", "integer")),
        ('{"items": 9, "tasks": "finish"}', ("tasks", "list")),
        ('{"items": 9, "tasks": [1]}', ("tasks",)),
        ('{"items": 9, "user_fields": [["a"]]}', ("user_fields", "pairs")),
        ('{"items": 9, "user_fields": {"a": 1}}', ("user_fields", "pairs")),
        ('{"items": 9, "user_fields": [["a", true]]}', ("user_fields", "pairs")),
        ('{"items": 9, "time": 3}', ("time",)),
    ],
)
def test_refuses_json(text, words):
    with one_line(CheckpointError, "config", *words):
        StcaConfig.from_json(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([f.name for f in dataclasses.fields(StcaConfig)]), json_values)
def test_any_json_is_a_config_or_one_line(key, value):
    values = json.loads(tiny.config().to_json())
    values[key] = value
    with nothing_or_one_line(CheckpointError):
        config = StcaConfig.from_json(json.dumps(values))
        assert json.loads(config.to_json())[key] == value
