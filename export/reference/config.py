"""Sizes and features of a reference STCA model, frozen: the same config always builds the same module."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from stca.errors import CheckpointError


class Field(NamedTuple):
    """A categorical feature: ids in `[0, size)`. Fields of one name share one embedding table, wherever they occur."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True)
class StcaConfig:
    """Everything that fixes the shape of the model (symbols of arXiv 2511.06077 in brackets).

    Attributes:
        items: ids of the item table, used by history and targets alike.
        tasks: names of the outputs, one sigmoid each.
        item_width: width of an item's embedding.
        field_width: width of every other embedding.
        history_fields: side information of a past interaction, such as its action and category.
        user_fields: what is known of the user; one RankMixer token each.
        request_fields: what is known of the request (device, page); one RankMixer token each.
        target_fields: side information of a candidate; one RankMixer token each, besides the item's own.
        time: `"log"` gives a history token the hour of its event and the gap to the one before (scope user);
            `"delta"` adds the paper's time from event to request, which makes the token depend on the request.
        width: model width [d]. heads: [h], must divide width. layers: [M].
        ffn_expansion: hidden width of SwiGLUFFN as a multiple of its input [r].
        mixer_layers: RankMixer blocks. mixer_head_width: width of one token head; a token has as many heads as
            there are tokens, so tokens are `tokens * mixer_head_width` wide. mixer_expansion: of the per-token FFN.
        max_history: longest history served; longer ones are refused or cut to the most recent suffix.
    """

    items: int
    tasks: tuple[str, ...] = ("finish",)
    item_width: int = 64
    field_width: int = 16
    history_fields: tuple[Field, ...] = ()
    user_fields: tuple[Field, ...] = ()
    request_fields: tuple[Field, ...] = ()
    target_fields: tuple[Field, ...] = ()
    time: Literal["log", "delta"] = "log"
    width: int = 256
    heads: int = 8
    layers: int = 4
    ffn_expansion: int = 4
    mixer_layers: int = 2
    mixer_head_width: int = 16
    mixer_expansion: int = 2
    max_history: int = 10_240

    def __post_init__(self) -> None:
        for name in ("history_fields", "user_fields", "request_fields", "target_fields"):
            fields = tuple(Field(str(n), int(s)) for n, s in getattr(self, name))
            object.__setattr__(self, name, fields)
            counted = collections.Counter(f.name for f in fields)
            if twice := [n for n, times in counted.items() if times > 1]:
                raise CheckpointError(f"config: {name} has the field {twice[0]!r} twice; name each once")
        if isinstance(typing.cast(object, self.tasks), str) or len(set(self.tasks)) < len(self.tasks):
            raise CheckpointError(f"config: tasks is {self.tasks!r}; it must be a list of different names")
        object.__setattr__(self, "tasks", tuple(self.tasks))
        sizes = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if isinstance(value, int) and not isinstance(value, bool)
        }
        for name, size in [*sizes.items(), *((f"field {f.name!r}", f.size) for f in self.fields())]:
            if size < 1:
                raise CheckpointError(f"config: {name} is {size}; it must be at least 1")
        if self.width % self.heads:
            raise CheckpointError(f"config: width {self.width} is not a multiple of heads {self.heads}")
        if self.time not in ("log", "delta"):
            raise CheckpointError(f"config: time is {self.time!r}; it must be 'log' or 'delta'")
        if not self.tasks:
            raise CheckpointError("config: tasks is empty; name at least one output")
        by_name: dict[str, int] = {}
        for field in self.fields():
            if by_name.setdefault(field.name, field.size) != field.size:
                raise CheckpointError(
                    f"config: field {field.name!r} has two sizes, {by_name[field.name]} and {field.size}"
                )
            if not re.fullmatch(r"\w+", field.name):
                raise CheckpointError(
                    f"config: field name {field.name!r} may hold only letters, digits and underscores"
                )
            if field.name in ("item", "time", "gap", "offsets"):
                raise CheckpointError(f"config: field name {field.name!r} is taken by the model; choose another")

    def fields(self) -> tuple[Field, ...]:
        """Every field, in the order history, user, request, target; a shared one appears more than once."""
        return (*self.history_fields, *self.user_fields, *self.request_fields, *self.target_fields)

    @property
    def head_width(self) -> int:
        """Width of one attention head [d_h]."""
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """RankMixer tokens: the summary z, the user's, the request's, the item and the candidate's fields."""
        return 2 + len(self.user_fields) + len(self.request_fields) + len(self.target_fields)

    @property
    def mixer_width(self) -> int:
        """Width of a RankMixer token, `tokens` heads of `mixer_head_width`."""
        return self.tokens * self.mixer_head_width

    def to_json(self) -> str:
        """The config as JSON with sorted keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> StcaConfig:
        """Parse `to_json`'s output.

        Raises:
            CheckpointError: when it is not JSON, misses a key, has an unknown one or one of the wrong type.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as e:  # a number of 5,000 digits is a plain ValueError
            raise CheckpointError(f"config is not JSON ({e}); write it with StcaConfig.to_json()") from e
        if not isinstance(values, Mapping):
            raise CheckpointError("config must be a JSON object; write it with StcaConfig.to_json()")
        types = typing.get_type_hints(cls)
        for name, value in values.items():
            if name not in types:
                raise CheckpointError(f"config has an unknown key {name!r}; known: {', '.join(sorted(types))}")
            _check_type(name, value, types[name])
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            raise CheckpointError(f"config misses the key {missing[0]!r}")
        return cls(**values)


def _check_type(name: str, value: Any, expected: Any) -> None:
    ok: bool
    if expected is int:
        ok, words = isinstance(value, int) and not isinstance(value, bool), "an integer"
    elif name == "time":
        ok, words = isinstance(value, str), "a string"
    elif name == "tasks":
        ok, words = isinstance(value, list) and all(isinstance(x, str) for x in value), "a list of strings"
    else:
        pair = lambda x: isinstance(x, list) and len(x) == 2 and isinstance(x[0], str) and type(x[1]) is int  # noqa: E731
        ok, words = isinstance(value, list) and all(map(pair, value)), "a list of [name, size] pairs"
    if not ok:
        raise CheckpointError(f"config: {name} is {value!r}; expected {words}")
