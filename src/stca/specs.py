"""What a bundle's inputs, states, tables and graphs look like: the parts that a manifest is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from stca import spec_check, typed_json

ScopeName = Literal["user", "request", "target"]
SCOPES: tuple[ScopeName, ...] = ("user", "request", "target")
HALVES = ("user_encoder", "target_scorer")
GRAPHS = ("request", *HALVES)
# The graph as it was exported, where the request graph was lifted from one with a batch axis for users and targets.
POINTWISE = "pointwise"

# Symbolic sizes with a fixed meaning: packed history tokens, packed targets, requests, and offsets. Rows that these
# count can be joined with other requests' rows in a ragged batch.
TOKENS, TARGETS, USERS, OFFSETS = "N_h", "N_t", "B", "B_plus_1"

# How a state tensor without a row per token is appended to: it is a sum over all of them. The graph that does it: new
# events and the kept sums, as inputs without a scope in the order of the state → a state.
SUM: Final = "sum"
GROWER: Final = "user_grower"
# An 8-bit float that states alone may have: numpy has no such type, so runtimes hand its bytes on as they are.
FLOAT8 = "float8_e4m3fn"
# Bytes of one element, by the dtype names that manifests use (numpy's, and ml_dtypes' for the rest).
ITEM_BYTES: Mapping[str, int] = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "int32": 4, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, FLOAT8: 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: its name in the graph.
        dtype: numpy's name of the element type.
        shape: sizes; a string is symbolic. `TOKENS`, `TARGETS`, `USERS` and `OFFSETS` have a fixed meaning.
        scope: where an input's values come from; None for an output.
        limit: ids must be in `[low, limit)`; None when any value will do.
        low: the least valid value, a whole number, of integers and floats; None is 0 where there is a limit.
        length_of: the dimension whose rows the value counts, so that it must not be larger; None when it counts none.
        blank: the value that stands for no event, where the model has no finite score for an input of it alone; None
            where there is none, or an input of it alone is scored.

    Raises:
        UsageError: naming the first field of an input that is not as it must be, and what to write.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    scope: ScopeName | None = None
    limit: int | None = None
    low: typed_json.Signed | None = None
    length_of: str | None = None
    blank: typed_json.Signed | None = None

    def __post_init__(self) -> None:
        if self.scope is not None:  # an input, as people write them; an engine's own may be of any kind
            spec_check.check(self)

    @property
    def is_offsets(self) -> bool:
        """Whether it says where each user's or request's rows begin."""
        return self.shape == (OFFSETS,)


@dataclass(frozen=True)
class EventInput:
    """An input with an entry for each event of a history.

    Attributes:
        name: of the input.
        axis: along which its entries lie.
        value: what the places without an event hold.
        event: of a mask: what the places with an event hold when a request leaves it out; None for what must be sent.
    """

    name: str
    axis: int
    value: typed_json.Signed = 0
    event: typed_json.Signed | None = None


@dataclass(frozen=True)
class Padding:
    """A history that is not packed into rows of `TOKENS`, and how a shorter one is brought to the model's length.

    Attributes:
        inputs: with an entry for each event. Along their axes they all have one size, of the model or of the request.
        side: where padding goes; None where nothing shows that the model takes any, so that a fixed length is exact.
        lengths: an input with the number of events, made when a request leaves it out; None for none.
    """

    inputs: tuple[EventInput, ...]
    side: Literal["left", "right"] | None = None
    lengths: str | None = None


def packable(inputs: Sequence[TensorSpec]) -> bool:
    """Whether several requests with these inputs can be joined into one ragged batch: every row says whose it is."""
    counted = {TOKENS if s.scope == "user" else TARGETS for s in inputs if s.is_offsets}
    return bool(counted) and all(s.shape[:1] and s.shape[0] in {*counted, USERS, OFFSETS} for s in inputs)


@dataclass(frozen=True)
class StateSpec:
    """One tensor of a user state: under this name it leaves the user encoder and enters the target scorer.

    Attributes:
        name, dtype, shape: as in the two graphs.
        bytes_per_token: what one history token adds; 0 when no axis is the history's.
        input: the user input it is a copy of, or None when it was computed.
        append: `sum` where it is a sum over all history tokens, to which `GROWER` adds that of new ones; the target
            scorer need not take it. None of any other.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    bytes_per_token: int
    input: str | None = None
    append: Literal["sum"] | None = None


# What an embedding table's numbers may be: of 8 bits, each row has a scale of its own.
TABLE_DTYPES = ("float32", "float16", "bfloat16", "int8", FLOAT8)


def table_row_bytes(width: int, dtype: str) -> int:
    """Bytes of a table's row of so many numbers, with its scale where it has one."""
    return width * ITEM_BYTES[dtype] + (ITEM_BYTES["float32"] if ITEM_BYTES[dtype] == 1 else 0)


@dataclass(frozen=True)
class TableSpec:
    """An embedding table that left the graphs: rows that the runtime looks up.

    Attributes:
        name: of the weight that it was.
        file: its rows, one after the other, little-endian, and nothing else.
        digests: a file of the SHA-256 of each block of rows, 32 bytes each; the last block may be shorter.
        dtype: of the file's elements: `float32`, `float16`, `bfloat16`; `int8` or `float8_e4m3fn`, whose rows end in
            the float32 that their numbers are multiplied with. Rows are looked up as float32.
        rows, width: its shape.
        block_rows: rows of a block, a power of two.
    """

    name: str
    file: str
    digests: str
    dtype: str
    rows: int
    width: int
    block_rows: int

    @property
    def has_scales(self) -> bool:
        """Whether each row ends in a scale."""
        return ITEM_BYTES[self.dtype] == 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the file."""
        return table_row_bytes(self.width, self.dtype)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.rows * self.row_bytes

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return -(-self.rows // self.block_rows)


@dataclass(frozen=True)
class Lookup:
    """Rows that a graph's file takes as an input, in place of the ids that its inputs have.

    Attributes:
        rows: the input of the file, float32, of the ids' shape and one axis more.
        table: name of the table.
        ids: an input of the graph or, where they are computed, an output of its `ids` graph.
    """

    rows: str
    table: str
    ids: str


@dataclass(frozen=True)
class GraphSpec:
    """An ONNX file of the bundle and what goes in and out of it.

    Attributes:
        file: its name.
        inputs, outputs: where there are look-ups, the file takes their rows besides, and lacks inputs that were ids
            alone.
        lookups: None where no table left the graph.
        ids: an ONNX file that computes ids from the inputs; None where all ids are inputs.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    lookups: tuple[Lookup, ...] | None = None
    ids: str | None = None


@dataclass(frozen=True)
class Reason:
    """Nodes of a half, in the order they run, that are there for one reason.

    Attributes:
        half: of `HALVES`.
        scope: of what they compute.
        inputs: of the model, that reach them.
        why: when they run, and what put them there.
        nodes: by name.
    """

    half: str
    scope: str
    inputs: tuple[str, ...]
    why: str
    nodes: tuple[str, ...]
