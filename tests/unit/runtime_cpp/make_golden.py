"""Writes the golden bundles and requests that the Python and the C++ runtime must agree on.

    python tests/unit/runtime_cpp/make_golden.py     # rewrites tests/unit/runtime_cpp/golden/

Small models whose scores are sums of small numbers, exact in float32, so that the two runtimes are held to equality.
The expected scores are computed here, by `Log.scores` or by hand, not by either runtime.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stca.bundle import seal, sha256_of
from stca.manifest import Manifest
from stca.specs import GraphSpec, StateSpec, TensorSpec

GOLDEN = Path(__file__).parent / "golden"
WINDOW = 6  # max_history of the `log` bundles
NEEDY_BIAS = 0.5  # by which toy_engine.hpp knows the model that has no scores where all items are 0
ELEMENT = {"int64": TensorProto.INT64, "int32": TensorProto.INT32, "float32": TensorProto.FLOAT}
ELEMENT["float16"] = TensorProto.FLOAT16

LOG_INPUTS = (
    TensorSpec("history_item", "int64", ("N_h",), "user", 1000),
    TensorSpec("history_action", "int64", ("N_h",), "user", 4),
    TensorSpec("history_offsets", "int32", ("B_plus_1",), "user"),
    TensorSpec("user_segment", "int64", ("B",), "user", 5),
    TensorSpec("user_profile", "float32", ("B", 2), "user"),
    TensorSpec("request_device", "int64", ("B",), "request", 3),
    TensorSpec("target_item", "int64", ("N_t",), "target", 1000),
    TensorSpec("target_price", "float32", ("N_t", 2), "target"),
    TensorSpec("target_offsets", "int32", ("B_plus_1",), "target"),
)
LOG_STATE = (
    StateSpec("token", "float32", ("N_h", 2), 8),
    StateSpec("state_history_offsets", "int32", ("B_plus_1",), 0, "history_offsets"),
    StateSpec("state_user_segment", "int64", ("B",), 0, "user_segment"),
    StateSpec("state_user_profile", "float32", ("B", 2), 0, "user_profile"),
)
PLAIN_INPUTS = (
    TensorSpec("clicks", "float32", ("L", 2), "user"),
    TensorSpec("profile", "float16", (3,), "user"),
    TensorSpec("hour", "int32", (), "request"),
    TensorSpec("candidates", "float32", ("m", 2), "target"),
)
# As models come that others exported: a batch axis of 1 before the history's, which must not be empty, and a value with
# a least one.
ROWS_INPUTS = (
    TensorSpec("clicks", "float32", (1, "N_h", 2), "user"),
    TensorSpec("hour", "int32", (1,), "request", 24, low=1),
    TensorSpec("candidates", "float32", ("N_t", 2), "target"),
)
ROWS_STATE = (StateSpec("state_clicks", "float32", (1, "N_h", 2), 0, "clicks"),)
PLAIN_STATE = (
    StateSpec("state_clicks", "float32", ("L", 2), 0, "clicks"),
    StateSpec("profile_sum", "float32", (1,), 0),
)


def write_bundle(name: str, inputs: Any, state: Any, scores: Any, halves: Any, bias: float, **fields: Any) -> None:
    """One golden bundle; its weights file is a safetensors file of the one number `bias`.

    `halves`: encoder and scorer; where states hold sums, the grower with its inputs, too.
    """
    root = GOLDEN / name
    root.mkdir(parents=True)
    header = json.dumps({"bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header += b" " * (-len(header) % 8)
    weights = len(header).to_bytes(8, "little") + header + np.float32(bias).tobytes()
    (root / "weights.safetensors").write_bytes(weights)
    states = tuple(TensorSpec(s.name, s.dtype, s.shape) for s in state)
    user = tuple(s for s in inputs if s.scope == "user")
    rest = tuple(s for s in inputs if s.scope != "user")
    unread = {s.name for s in state if s.append is not None}
    graphs = {}
    for graph, takes, gives, nodes, constants in (
        ("user_encoder", user, states, *halves[0]),
        ("target_scorer", (*(s for s in states if s.name not in unread), *rest), scores, *halves[1](bias)),
        *(("user_grower", grown[0], states, *grown[1:]) for grown in halves[2:]),
    ):
        proto = helper.make_graph(
            nodes,
            graph,
            [helper.make_tensor_value_info(s.name, ELEMENT[s.dtype], s.shape) for s in takes],
            [helper.make_tensor_value_info(s.name, ELEMENT[s.dtype], s.shape) for s in gives],
            [
                _in_weights(len(weights) - 4) if n == "bias" else numpy_helper.from_array(np.asarray(x), n)
                for n, x in constants.items()
            ],
        )
        model = helper.make_model(
            proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="stca"
        )
        (root / f"{graph}.onnx").write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(root / f"{graph}.onnx", full_check=True)
        graphs[graph] = GraphSpec(f"{graph}.onnx", tuple(takes), tuple(gives))
    (root / "request.onnx").write_bytes(b"no runtime reads this one")
    graphs["request"] = GraphSpec("request.onnx", tuple(inputs), scores)
    seal(
        root,
        Manifest(
            model={"kind": "onnx"},
            weights=sha256_of(root / "weights.safetensors"),
            precision="float32",
            attention=None,
            graphs=graphs,
            state=state,
            split={},
            parity={},
            producer={},
            **fields,
        ),
    )


def _in_weights(offset: int) -> onnx.TensorProto:
    """The one number of the weights file, as an exported graph finds it there."""
    tensor = onnx.TensorProto(name="bias", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.safetensors"), ("offset", offset), ("length", 4)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def log_halves(first: bool = False, needy: bool = False) -> Any:
    """Encoder and scorer of `log`: sums over each request's own segment of the history. `first`: of items alone.
    `needy`: NaN where all items are 0.
    """
    n = helper.make_node
    zero, one, end = np.int64([0]), np.int64([1]), np.int64([2**31])
    encoder = [
        n("Unsqueeze", ["history_item", "one"], ["item"]),
        n("Unsqueeze", ["history_action", "one"], ["action"]),
        n("Concat", ["item", "action"], ["both"], axis=1),
        n("Cast", ["both"], ["token"], to=TensorProto.FLOAT),
        *(n("Identity", [s.input], [s.name]) for s in LOG_STATE if s.input),
    ]

    def scorer(bias: float) -> Any:
        nodes = [
            n("Concat", ["no_token", "token"], ["padded"], axis=0),
            n("CumSum", ["padded", "axis0"], ["sums"]),
            n("Slice", ["state_history_offsets", "zero", "last"], ["begins"]),
            n("Slice", ["state_history_offsets", "one", "end"], ["ends"]),
            n("Gather", ["sums", "begins"], ["before"], axis=0),
            n("Gather", ["sums", "ends"], ["after"], axis=0),
            n("Sub", ["after", "before"], ["segment_sum"]),
            n("Cast", ["state_user_segment"], ["segment"], to=TensorProto.FLOAT),
            n("Cast", ["request_device"], ["device"], to=TensorProto.FLOAT),
            n("Mul", ["segment", "ten"], ["segment10"]),
            n("Mul", ["device", "hundred"], ["device100"]),
            n("Unsqueeze", ["segment10", "one"], ["segment_column"]),
            n("Unsqueeze", ["device100", "one"], ["device_column"]),
            n("Concat", ["segment_column", "device_column"], ["columns"], axis=1),
            n("Sum", ["segment_sum", "columns", "state_user_profile", *(["nothing"] if needy else [])], ["of_request"]),
            # Which request a target belongs to: how many requests end at or before it.
            n("Shape", ["target_item"], ["targets"]),
            n("Squeeze", ["targets", "zero"], ["targets0"]),
            n("Range", ["first", "targets0", "step"], ["place"]),
            n("Unsqueeze", ["place", "one"], ["place_column"]),
            n("Slice", ["target_offsets", "one", "end"], ["target_ends"]),
            n("Cast", ["target_ends"], ["target_ends64"], to=TensorProto.INT64),
            n("GreaterOrEqual", ["place_column", "target_ends64"], ["ended"]),
            n("Cast", ["ended"], ["ended64"], to=TensorProto.INT64),
            n("ReduceSum", ["ended64", "one"], ["owner"], keepdims=0),
            n("Gather", ["of_request", "owner"], ["shared"], axis=0),
            n("Cast", ["target_item"], ["item"], to=TensorProto.FLOAT),
            n("Unsqueeze", ["item", "one"], ["item_column"]),
            n("MatMul", ["target_price", "price_weights"], ["price"]),
            n("Concat", ["item_column", "price"], ["own"], axis=1),
            n("Sum", ["shared", "own", "bias"], ["both_scores" if first else "scores"]),
        ]
        if first:
            nodes.append(n("Gather", ["both_scores", "first"], ["scores"], axis=1))
        if needy:
            nodes[7:7] = [
                n("Slice", ["segment_sum", "zero", "one", "one"], ["items"]),
                n("Div", ["items", "items"], ["ones"]),
                n("Sub", ["ones", "ones"], ["nothing"]),
            ]
        constants = {
            "zero": zero, "one": one, "end": end, "last": np.int64([-1]), "axis0": np.int64(0),
            "first": np.int64(0), "step": np.int64(1), "no_token": np.zeros((1, 2), np.float32),
            "ten": np.float32(10), "hundred": np.float32(100), "bias": np.float32([bias]),
            "price_weights": np.float32([[1], [2]]),
        }  # fmt: skip
        return nodes, constants

    return (encoder, {"one": one}), scorer


def plain_halves() -> Any:
    """Encoder and scorer of `plain`, which has no offsets and two outputs: one request at a time."""
    n = helper.make_node
    encoder = [
        n("Identity", ["clicks"], ["state_clicks"]),
        n("Cast", ["profile"], ["wide"], to=TensorProto.FLOAT),
        n("ReduceSum", ["wide"], ["profile_sum"], keepdims=1),
    ]

    def scorer(bias: float) -> Any:
        nodes = [
            n("ReduceSum", ["state_clicks", "axis0"], ["clicked"], keepdims=0),
            n("Cast", ["hour"], ["time"], to=TensorProto.FLOAT),
            n("Mul", ["candidates", "clicked"], ["products"]),
            n("ReduceSum", ["products", "axis1"], ["dot"], keepdims=1),
            n("Sum", ["dot", "profile_sum", "time", "bias"], ["finish"]),
            n("ReduceSum", ["candidates", "axis1"], ["like"], keepdims=0),
        ]
        return nodes, {"axis0": np.int64([0]), "axis1": np.int64([1]), "bias": np.float32([bias])}

    return (encoder, {}), scorer


def rows_halves() -> Any:
    """Encoder and scorer of `rows`: each candidate times the clicks' sum, and the hour."""
    n = helper.make_node

    def scorer(bias: float) -> Any:
        nodes = [
            n("ReduceSum", ["state_clicks", "axes"], ["clicked"], keepdims=0),
            n("Cast", ["hour"], ["time"], to=TensorProto.FLOAT),
            n("Mul", ["candidates", "clicked"], ["products"]),
            n("ReduceSum", ["products", "axis1"], ["dot"], keepdims=0),
            n("Sum", ["dot", "time", "bias"], ["scores"]),
        ]
        return nodes, {"axes": np.int64([0, 1]), "axis1": np.int64([1]), "bias": np.float32([bias])}

    return ([n("Identity", ["clicks"], ["state_clicks"])], {}), scorer


# ---- requests -------------------------------------------------------------------------------------------------------


def tensor(dtype: str, data: Any, shape: list[int] | None = None) -> dict[str, Any]:
    """An input as the JSON file has it; what is no JSON number of 64 bits is a string there."""
    flat = np.asarray(data, dtype=object).ravel().tolist()
    values = [str(x) if not abs(x) < 2**63 else x for x in flat]
    return {"dtype": dtype, "shape": list(np.shape(data)) if shape is None else shape, "data": values}


class Log:
    """One user's request to a `log` bundle, and what it must score."""

    def __init__(self, items: list[int], actions: list[int], segment: int = 2, profile: tuple[float, float] = (0.5, 1)):
        self.items, self.actions, self.segment, self.profile = items, actions, segment, profile
        self.window = WINDOW
        self.device, self.targets, self.prices = 1, [7, 999, 0], [[1.5, 2.0], [0.25, 0.0], [0.0, -1.0]]

    def user(self) -> dict[str, Any]:
        return {
            "history_item": tensor("int64", self.items),
            "history_action": tensor("int64", self.actions),
            "user_segment": tensor("int64", [self.segment]),
            "user_profile": tensor("float32", [list(self.profile)]),
        }

    def rest(self) -> dict[str, Any]:
        return {
            "request_device": tensor("int64", [self.device]),
            "target_item": tensor("int64", self.targets),
            "target_price": tensor("float32", self.prices, [len(self.targets), 2]),
        }

    def inputs(self, **changes: Any) -> dict[str, Any]:
        """All inputs; a change to None leaves one out."""
        return {k: v for k, v in {**self.user(), **self.rest(), **changes}.items() if v is not None}

    def scores(self, bias: float = 0.0) -> list[list[float]]:
        left = sum(self.items[-self.window :]) + 10 * self.segment + self.profile[0] + bias
        right = sum(self.actions[-self.window :]) + 100 * self.device + self.profile[1] + bias
        return [[left + t, right + p[0] + 2 * p[1]] for t, p in zip(self.targets, self.prices, strict=True)]

    def state_bytes(self) -> int:
        return 8 * min(len(self.items), self.window) + 2 * 4 + 8 + 2 * 4


def packed(requests: list[Log], **changes: Any) -> dict[str, Any]:
    """Requests as one ragged batch."""
    inputs: dict[str, Any] = {}
    for name in requests[0].inputs():
        parts = [r.inputs()[name] for r in requests]
        shape = [sum(p["shape"][0] for p in parts), *parts[0]["shape"][1:]]
        inputs[name] = {"dtype": parts[0]["dtype"], "shape": shape, "data": [x for p in parts for x in p["data"]]}
    for name, counts in (
        ("history_offsets", [len(r.items) for r in requests]),
        ("target_offsets", [len(r.targets) for r in requests]),
    ):
        inputs[name] = tensor("int32", [0, *np.cumsum(counts, dtype=int).tolist()])
    return {k: v for k, v in {**inputs, **changes}.items() if v is not None}


def score(inputs: Any, expected: Any, user: str | None = None, version: str | None = None) -> dict[str, Any]:
    request = {"inputs": inputs, "user": user, "version": version}
    return {"call": "score", "request": request, **_outcome(expected)}


def batch(inputs: Any, expected: Any, users: Any = (), versions: Any = ()) -> dict[str, Any]:
    request = {"inputs": inputs, "users": list(users), "versions": list(versions)}
    return {"call": "score_batch", "request": request, **_outcome(expected)}


def append(user: str, events: Any, version: str, expected: Any, after: str | None = None) -> dict[str, Any]:
    order = {} if after is None else {"after": after}
    return {"call": "append", "user": user, "events": events, "version": version, **order, **_outcome(expected)}


def events(items: list[int], actions: list[int]) -> dict[str, Any]:
    return {"history_item": tensor("int64", items), "history_action": tensor("int64", actions)}


def warm(user: str, history: dict[str, Any], version: str | None, expected: Any) -> dict[str, Any]:
    return {"call": "warm", "user": user, "history": history, "version": version, **_outcome(expected)}


def forget(user: str, expected: bool) -> dict[str, Any]:
    return {"call": "forget", "user": user, "kept": expected}


def residence(user: str, tier: str | None, kept: str | None = None, version: str | None = None) -> dict[str, Any]:
    return {"call": "residence", "user": user, "version": version, "tier": tier, "kept_version": kept}


def swap(bundle: str, expected: Any = None) -> dict[str, Any]:
    return {"call": "swap", "bundle": bundle, **_outcome(expected)}


def stats(**expected: int) -> dict[str, Any]:
    return {"call": "stats", "stats": expected}


def refused(*says: str, code: int = 8) -> dict[str, Any]:
    """An error: its code, and what its message must contain."""
    return {"error": {"code": code, "says": list(says)}}


def _outcome(expected: Any) -> dict[str, Any]:
    if isinstance(expected, dict):
        return expected
    if isinstance(expected, bool):
        return {"kept": expected}
    return {} if expected is None else {"scores": expected}


def case(
    name: str, *steps: Any, bundle: str = "log", cache_bytes: int = 1 << 20, truncate: bool = False, **options: Any
) -> Any:
    return {"name": name, "bundle": bundle, "cache_bytes": cache_bytes, "truncate": truncate, **options, "steps": steps}


def good_cases() -> list[Any]:
    a, b, empty = Log([1, 2, 3], [0, 1, 3]), Log([10, 20], [2, 2], 4, (-1.0, 0.25)), Log([], [], 0)
    none = Log([5], [1])
    none.targets, none.prices = [], []
    longer = Log([1, 2, 3, 40, 50], [0, 1, 3, 2, 2])
    full = Log([1, 2, 3, 40, 50, 60, 70, 80], [0, 1, 3, 2, 2, 0, 0, 1])
    more = Log([1999] * (WINDOW + 1), [7] * (WINDOW + 1))  # more than the `log` bundle takes, of each
    more.window = WINDOW + 1
    size = a.state_bytes()
    return [
        case("one request", score(a.inputs(), a.scores()), stats(hits=0, misses=0, users=0, bytes=0)),
        case("empty history", score(empty.inputs(), empty.scores())),
        case("an empty list has no dtype", score(empty.inputs(history_item=tensor("float64", [])), empty.scores())),
        case("no targets", score(none.inputs(), [])),
        case(
            "other dtypes of the same kind",
            score(
                a.inputs(
                    history_item=tensor("uint8", a.items),
                    history_action=tensor("int32", a.actions),
                    target_item=tensor("uint64", a.targets),
                    target_price=tensor("float64", a.prices),
                    user_profile=tensor("float16", [list(a.profile)]),
                ),
                a.scores(),
            ),
        ),
        case(
            "one user's values without the batch axis",
            score(a.inputs(user_segment=tensor("int64", 2), user_profile=tensor("float32", [0.5, 1.0])), a.scores()),
        ),
        case(
            "a hit needs no user inputs",
            score(a.inputs(), a.scores(), "ann", "v1"),
            score(a.rest(), a.scores(), "ann", "v1"),
            stats(hits=1, misses=1, users=1, state_bytes=size),
        ),
        case(
            "who is warm is a hit",
            warm("ann", a.user(), "v1", True),
            score(a.rest(), a.scores(), "ann", "v1"),
            warm("ann", {}, "v1", True),
            append("ann", events([40, 50], [2, 2]), "v2", True),
            warm("bob", b.inputs(), None, True),
            score(b.inputs(), b.scores(), "bob"),
            warm("cid", {}, "v1", refused("cid", "v1", "send the user inputs")),
            warm("cid", {**a.user(), "history_item": tensor("int64", [-1, 1, 2])}, "v1", refused("history_item", "-1")),
            stats(hits=2, misses=0, users=2, warmed=2, appends=1),
        ),
        case(
            "what is over the budget is not warm",
            warm("ann", a.user(), "v1", False),
            stats(users=0, warmed=1, refused=1),
            cache_bytes=10,
        ),
        case(
            "it is told how states were come by",
            score(a.inputs(), a.scores(), "ann", "v1"),
            score(a.rest(), a.scores(), "ann", "v1"),
            score(longer.inputs(), longer.scores(), "ann", "v2"),
            batch(packed([b, b]), [*b.scores(), *b.scores()], ["bob"] * 2, ["v1"] * 2),
            score(a.inputs(), a.scores(), "ann", "v1"),
            swap("log_other_weights"),
            score(a.inputs(), a.scores(1000.0), "ann", "v1"),
            stats(hits_memory=1, hits_joined=1, misses_new_user=2, misses_version=1, misses_evicted=1),
            stats(hits=2, misses=5, misses_weights=1, misses_expired=0, misses_too_large=0),
            max_users=1,
        ),
        case(
            "a history sent is compared with the kept one",
            score(a.inputs(), a.scores(), "ann", "v1"),
            score(a.inputs(), a.scores(), "ann", "v1"),
            score(longer.inputs(), refused("ann", "v1", "history"), "ann", "v1"),
            append("ann", events([40, 50], [2, 2]), "v2", True),
            score(longer.inputs(), longer.scores(), "ann", "v2"),
            check_versions=True,
        ),
        case(
            "a hit does not look at the user inputs",
            score(a.inputs(), a.scores(), "ann", "v1"),
            score(a.inputs(history_item=tensor("int64", [5000])), a.scores(), "ann", "v1"),
        ),
        case(
            "another version is another history",
            score(a.inputs(), a.scores(), "ann", "v1"),
            score(longer.inputs(), longer.scores(), "ann", "v2"),
            score(longer.rest(), longer.scores(), "ann", "v2"),
            score(a.rest(), refused("ann", "v1", "send the user inputs"), "ann", "v1"),
            stats(hits=1, users=1, state_bytes=longer.state_bytes()),
        ),
        case(
            "without a version the digest of the history is one",
            score(a.inputs(), a.scores(), "ann"),
            score(a.inputs(), a.scores(), "ann"),
            score(b.inputs(), b.scores(), "ann"),
            stats(hits=1, misses=2, users=1),
        ),
        case(
            "appended events count",
            score(a.inputs(), a.scores(), "ann", "v1"),
            append("ann", events([40, 50], [2, 2]), "v2", True),
            score(a.rest(), longer.scores(), "ann", "v2"),
            append("ann", events([60, 70, 80], [0, 0, 1]), "v3", True),
            score(a.rest(), full.scores(), "ann", "v3"),
            # Three old rows of 8 bytes and two new ones move into a room; the next three are written behind them.
            stats(hits=2, misses=1, users=1, state_bytes=full.state_bytes(), appended_bytes=(3 + 2 + 3) * 8),
        ),
        case(
            "appending a whole window replaces the history",
            score(a.inputs(), a.scores(), "ann", "v1"),
            append("ann", events(full.items[-WINDOW:], full.actions[-WINDOW:]), "v2", True),
            score(a.rest(), full.scores(), "ann", "v2"),
        ),
        case(
            "appending nothing is a new version",
            score(a.inputs(), a.scores(), "ann", "v1"),
            append("ann", events([], []), "v2", True),
            score(a.rest(), a.scores(), "ann", "v2"),
        ),
        case(
            "a longer append with truncation",
            score(a.inputs(), a.scores(), "ann", "v1"),
            append("ann", events(full.items, full.actions), "v2", True),
            score(a.rest(), full.scores(), "ann", "v2"),
            truncate=True,
        ),
        case(
            "the same append again changes nothing",
            score(a.inputs(), a.scores(), "ann", "v1"),
            append("ann", events([40, 50], [2, 2]), "v2", True),
            append("ann", events([40, 50], [2, 2]), "v2", True),
            score(a.rest(), longer.scores(), "ann", "v2"),
        ),
        case(
            "events follow the version they name",
            score(a.inputs(), a.scores(), "ann", "v1"),
            append("ann", events([40, 50], [2, 2]), "v3", False, after="v2"),
            append("ann", events([40, 50], [2, 2]), "v2", True, after="v1"),
            score(a.rest(), longer.scores(), "ann", "v2"),
        ),
        case("nothing to append to", append("bob", events([1], [1]), "v2", False)),
        case(
            "forget",
            score(a.inputs(), a.scores(), "ann", "v1"),
            forget("ann", True),
            forget("ann", False),
            score(a.rest(), refused("ann", "v1"), "ann", "v1"),
            stats(users=0, bytes=0),
        ),
        case(
            "where a state is",
            residence("ann", None),
            score(a.inputs(), a.scores(), "ann", "v1"),
            residence("ann", "memory", "v1"),
            residence("ann", "memory", "v1", version="v1"),
            residence("ann", None, version="v2"),
            append("ann", events([40, 50], [2, 2]), "v2", True, after="v1"),
            residence("ann", "memory", "v2"),
            residence("ann", None, version="v1"),
            swap("log_other_weights"),
            residence("ann", None),
            stats(hits=0, misses=1, appends=1),
        ),
        case("the window, exactly", score(full.inputs(**events(full.items[2:], full.actions[2:])), full.scores())),
        case(
            "the most recent behind a batch axis",
            score(_rows([[9, 9], [1, 4], [2, 5]]), [[3 + 3], [3 * 0.5 + 9 * 2 + 3]]),
            bundle="rows",
            truncate=True,
        ),
        case("truncation keeps the most recent", score(full.inputs(), full.scores()), truncate=True),
        case(
            "a state larger than the budget is served and not kept",
            score(a.inputs(), a.scores(), "ann", "v1"),
            append("ann", events([1], [1]), "v2", False),
            stats(refused=1, users=0, bytes=0),
            cache_bytes=size - 1,
        ),
        case(
            "a swap to other weights drops the states",
            score(a.inputs(), a.scores(), "ann", "v1"),
            swap("log_other_weights"),
            stats(users=0, bytes=0),
            score(a.inputs(), a.scores(1000.0), "ann", "v1"),
            score(a.rest(), a.scores(1000.0), "ann", "v1"),
        ),
        case(
            "a swap to the same weights keeps them",
            score(a.inputs(), a.scores(), "ann", "v1"),
            swap("log"),
            score(a.rest(), a.scores(), "ann", "v1"),
        ),
        case(
            "a failed swap changes nothing",
            score(a.inputs(), a.scores(), "ann", "v1"),
            swap("nowhere", refused("nowhere", "no such bundle", code=6)),
            score(a.rest(), a.scores(), "ann", "v1"),
        ),
        case(
            "a swap to other limits",
            score(a.inputs(), a.scores(), "ann", "v1"),
            swap("log_other_limits"),
            stats(users=0),
            score(more.inputs(), more.scores(), "ann", "v2"),
        ),
        *(
            case(
                f"no swap to other {what}",
                score(a.inputs(), a.scores(), "ann", "v1"),
                swap(bundle, refused(bundle, *says, code=6)),
                score(a.rest(), a.scores(), "ann", "v1"),
                stats(hits=1, misses=1, users=1),
            )
            for what, bundle, *says in (
                ("inputs", "plain", "'history_item' is missing in it, int64 [N_h] of scope user there"),
                ("dtypes", "log_other_dtype", "'request_device' is int32 [B] of scope request in it, int64 [B]"),
                ("scores", "log_other_scores", "output is float32 [*] in it, float32 [*, 2] there"),
            )
        ),
        case(
            "no swap to fewer inputs",
            swap("log", refused("log", "'clicks' is missing in it, float32 [L, 2] of scope user there", code=6)),
            score(_plain(), [[1 + 1 * 4 + 2 * 6 + 3, 3], [1 + 3 + 0.5 * 4, 0.5]]),
            bundle="plain",
        ),
        case("a batch", batch(packed([a, b, empty, none]), [*a.scores(), *b.scores(), *empty.scores()])),
        case("a batch of one", batch(packed([a]), a.scores())),
        case("a batch of none", batch(_no_requests(packed([a])), [])),
        case(
            "a batch of hits and misses",
            score(b.inputs(), b.scores(), "bob", "v1"),
            batch(packed([a, b, empty]), [*a.scores(), *b.scores(), *empty.scores()], ["ann", "bob", None], ["v1"] * 3),
            score(a.rest(), a.scores(), "ann", "v1"),
            stats(hits=2, misses=2, users=2, state_bytes=a.state_bytes() + b.state_bytes()),
        ),
        case(
            "users encoded together are kept apart",
            batch(
                packed([a, empty, b, longer]),
                [*a.scores(), *empty.scores(), *b.scores(), *longer.scores()],
                ["ann", "eve", "bob", "cat"],
                ["v1"] * 4,
            ),
            stats(hits=0, misses=4, users=4, state_bytes=sum(x.state_bytes() for x in (a, empty, b, longer))),
            *(score(x.rest(), x.scores(), u, "v1") for x, u in ((b, "bob"), (empty, "eve"), (longer, "cat"))),
            append("ann", events([40, 50], [2, 2]), "v2", True),
            score(a.rest(), longer.scores(), "ann", "v2"),
            append("eve", events([], []), "v2", True),
            score(empty.rest(), empty.scores(), "eve", "v2"),
        ),
        case(
            "a user with two requests in a batch",
            batch(packed([a, b, a]), [*a.scores(), *b.scores(), *a.scores()], ["ann", "bob", "ann"], ["v1"] * 3),
            stats(users=2),
            score(a.rest(), a.scores(), "ann", "v1"),
            score(b.rest(), b.scores(), "bob", "v1"),
        ),
        case(
            "a model without offsets and with two outputs",
            score(_plain(), [[1 + 1 * 4 + 2 * 6 + 3, 3], [1 + 3 + 0.5 * 4, 0.5]], "ann", "v1"),
            score({k: v for k, v in _plain().items() if k in ("hour", "candidates")}, [[20, 3], [6, 0.5]], "ann", "v1"),
            stats(hits=1, misses=1, users=1, state_bytes=2 * 2 * 4 + 4),
            bundle="plain",
        ),
    ]


def _no_requests(inputs: dict[str, Any]) -> dict[str, Any]:
    nothing = {name: {**t, "shape": [0, *t["shape"][1:]], "data": []} for name, t in inputs.items()}
    return {**nothing, **{f"{x}_offsets": tensor("int32", [0]) for x in ("history", "target")}}


def _rows(clicks: list[list[float]], hour: int = 3) -> dict[str, Any]:
    return {
        "clicks": tensor("float32", clicks, [1, len(clicks), 2]),
        "hour": tensor("int32", [hour]),
        "candidates": tensor("float32", [[1, 0], [0.5, 2]]),
    }


def _plain(**changes: Any) -> dict[str, Any]:
    inputs = {
        "clicks": tensor("float32", [[1, 2], [3, 4]]),
        "profile": tensor("float16", [0.5, 0.5, 2.0]),
        "hour": tensor("int32", 1),
        "candidates": tensor("float32", [[1, 2], [0.5, 0]]),
    }
    return {k: v for k, v in {**inputs, **changes}.items() if v is not None}


def bad_cases() -> list[Any]:
    a, b = Log([1, 2, 3], [0, 1, 3]), Log([10, 20], [2, 2])
    bad = [
        ("a user input is missing", a.inputs(user_segment=None), "user_segment", "missing"),
        ("a request input is missing", a.inputs(request_device=None), "request_device", "missing"),
        ("a target input is missing", a.inputs(target_item=None), "target_item", "missing"),
        (
            "a misspelt input",
            a.inputs(Target_itm=tensor("int64", [1])),
            "no such input",
            "it takes history_item",
            "; did you mean 'target_item'?",
        ),
        ("an unknown input", a.inputs(history_color=tensor("int64", [1])), "history_color", "no such input"),
        ("offsets in a single request", a.inputs(target_offsets=tensor("int32", [0, 3])), "target_offsets", "runtime"),
        ("floats for ids", a.inputs(target_item=tensor("float32", [1.0])), "target_item", "float32", "int64"),
        ("booleans for ids", a.inputs(target_item=tensor("bool", [True])), "target_item", "bool", "int64"),
        ("integers for floats", a.inputs(target_price=tensor("int64", [[1, 2]])), "target_price", "int64", "float32"),
        (
            "an id too large",
            a.inputs(target_item=tensor("int64", [0, 1000, 1])),
            "target_item",
            "1000",
            "[1]",
            "[0, 999]",
        ),
        (
            "an id too small",
            a.inputs(history_action=tensor("int64", [0, 1, -1])),
            "history_action",
            "-1",
            "[2]",
            "[0, 3]",
        ),
        ("a small type's id too large", a.inputs(request_device=tensor("int8", [3])), "request_device", "3", "[0, 2]"),
        ("a huge unsigned id", a.inputs(target_item=tensor("uint64", [2**64 - 1] * 3)), "target_item", str(2**64 - 1)),
        (
            "a NaN",
            a.inputs(target_price=tensor("float32", [[1, 2], [3, float("nan")], [5, 6]])),
            "target_price",
            "[1, 1]",
        ),
        (
            "an infinity",
            a.inputs(user_profile=tensor("float64", [[float("-inf"), 0]])),
            "user_profile",
            "-inf",
            "finite",
        ),
        (
            "too large for float32",
            a.inputs(user_profile=tensor("float64", [[0, 1e300]])),
            "user_profile",
            "1e+300",
            "[0, 1]",
        ),
        (
            "histories differ",
            a.inputs(history_action=tensor("int64", [0, 1])),
            "history_action",
            "[2]",
            "3",
            "history_item",
        ),
        ("targets differ", a.inputs(target_price=tensor("float32", [[1, 2]])), "target_price", "[1, 2]", "target_item"),
        ("a fixed axis differs", a.inputs(target_price=tensor("float32", [[1]] * 3)), "target_price", "[3, 1]", "2"),
        ("too many axes", a.inputs(target_item=tensor("int64", [[1, 2, 3]])), "target_item", "[1, 3]"),
        ("too few axes", a.inputs(history_item=tensor("int64", 1)), "history_item", "[]", "[N_h]"),
        ("two users in one request", a.inputs(user_segment=tensor("int64", [1, 2])), "user_segment", "[2]", "1"),
        ("too long", a.inputs(**events([1] * 7, [1] * 7)), "history_item", "7", "6"),
    ]
    offsets = [
        ("no offsets", packed([a, b], target_offsets=None), "target_offsets", "missing"),
        ("offsets not from 0", packed([a, b], target_offsets=tensor("int32", [1, 3, 6])), "target_offsets", "1", "0"),
        (
            "backward offsets",
            packed([a, b], history_offsets=tensor("int64", [0, 5, 3])),
            "history_offsets",
            "2",
            "5",
            "3",
        ),
        (
            "offsets of floats",
            packed([a, b], target_offsets=tensor("float32", [0.0, 3.0, 6.0])),
            "target_offsets",
            "float32",
        ),
        (
            "offsets of two axes",
            packed([a, b], target_offsets=tensor("int32", [[0, 3, 6]])),
            "target_offsets",
            "[1, 3]",
        ),
        ("no offset at all", packed([a, b], target_offsets=tensor("int32", [])), "target_offsets", "[0]"),
        (
            "offsets of other lengths",
            packed([a, b], target_offsets=tensor("int32", [0, 6])),
            "offsets",
            "one entry more",
        ),
        ("offsets end early", packed([a, b], target_offsets=tensor("int32", [0, 3, 5])), "target_item", "[6]", "5"),
        ("offsets end late", packed([a, b], history_offsets=tensor("int32", [0, 3, 6])), "history_item", "[5]", "6"),
        ("users differ", packed([a, b], user_segment=tensor("int64", [1])), "user_segment", "[1]", "2"),
        ("a bad id in the second", packed([a, b], user_segment=tensor("int64", [1, 9])), "user_segment", "9", "[0, 4]"),
        ("an unknown input in a batch", packed([a, b], color=tensor("int64", [1])), "color", "no such input"),
    ]
    plain = [
        ("an axis of the model differs", _plain(profile=tensor("float32", [1.0, 2.0])), "profile", "[2]", "3"),
        ("too large for a narrow type", _plain(hour=tensor("int64", 2**31)), "hour", str(2**31), str(2**31 - 1)),
        ("several for a number", _plain(hour=tensor("int32", [1, 2])), "hour", "[2]", "make it a target input"),
        ("a number for a table", _plain(clicks=tensor("float32", 1.0)), "clicks", "[]", "[L, 2]"),
    ]
    names = ("user_segment", "user_profile")
    return [
        *(case(name, score(inputs, refused(*says)), stats(users=0)) for name, inputs, *says in bad),
        case("a version of no user", score(a.inputs(), refused("version: is 'v1' of no user", "whose"), None, "v1")),
        *(case(name, batch(inputs, refused(*says)), stats(users=0)) for name, inputs, *says in offsets),
        *(case(name, score(inputs, refused(*says)), bundle="plain") for name, inputs, *says in plain),
        case(
            "too many targets",
            score(b.inputs(), refused("target_item", "3 targets", "limit is 2")),
            score(b.inputs(target_item=tensor("int64", [1, 2])), refused("target_price", "[3, 2]")),
            max_targets=2,
        ),
        case(
            "too many targets together",
            batch(packed([a, b]), refused("targets of all requests", "6 targets", "limit is 5")),
            score(a.inputs(), a.scores()),
            max_targets=5,
        ),
        case("too few users", batch(packed([a, b]), refused("users", "1", "2"), ["ann"])),
        case("too many versions", batch(packed([a, b]), refused("versions", "3", "2"), (), ["v1"] * 3)),
        case(
            "an empty history of a model that needs one",
            score(_rows([]), refused("clicks", "0", "at least 1")),
            bundle="rows",
        ),
        case("too low a value", score(_rows([[1, 1]], hour=0), refused("hour", "0", "[1, 23]")), bundle="rows"),
        case(
            "a request's value for each target",
            score(
                {**_rows([[1, 1]]), "hour": tensor("int32", [1, 2])}, refused("hour", "[2]", "one value per request")
            ),
            bundle="rows",
        ),
        case("too long behind a batch axis", score(_rows([[1, 1]] * 3), refused("clicks", "3", "2")), bundle="rows"),
        case("no batches of this model", batch(_plain(), refused("one Request at a time")), bundle="plain"),
        case("no appending to this model", append("ann", {}, "v2", refused("append")), bundle="plain"),
        case(
            "no appending behind a batch axis",
            append("ann", {}, "v2", refused("of clicks on another axis")),
            bundle="rows",
        ),
        *(
            case(
                f"{name} is no part of an event",
                append("ann", {**events([1], [1]), name: a.user()[name]}, "v2", refused(name, "event")),
            )
            for name in names
        ),
        case(
            "an event lacks a field",
            append("ann", {"history_item": tensor("int64", [1])}, "v2", refused("history_action")),
        ),
        case(
            "a bad event leaves the state",
            score(a.inputs(), a.scores(), "ann", "v1"),
            append("ann", events([1000], [1]), "v2", refused("history_item", "1000", "[0, 999]")),
            score(a.rest(), a.scores(), "ann", "v1"),
        ),
        case("too many events", append("ann", events([1] * 7, [1] * 7), "v2", refused("history_item", "7", "6"))),
        case("no state, no history", score(a.rest(), refused("ann", "v1", "send the user inputs"), "ann", "v1")),
        case(
            "one bad request refuses the batch",
            batch(
                packed([a, b], user_segment=tensor("int64", [1, 9])),
                refused("user_segment"),
                ["ann", "bob"],
                ["v1"] * 2,
            ),
            stats(users=0),
        ),
    ]


def damage_cases() -> list[Any]:
    """Bundles that must be refused: how each is made from a good one, and what the error says."""

    def edit(find: str, put: str, times: int = 1) -> dict[str, Any]:
        return {"op": "edit", "find": find, "put": put, "times": times}

    def damage(name: str, *ops: dict[str, Any], says: tuple[str, ...]) -> Any:
        return {"name": name, "bundle": "log", "ops": ops, **refused(*says, code=6)}

    first = '"name": "history_item",\n     "dtype": "int64"'
    return [
        {"name": "whole", "bundle": "log", "ops": []},
        *(
            damage(f"a changed byte in {file}", {"op": "flip", "file": file, "at": 3}, says=(file, "changed"))
            for file in ("request.onnx", "user_encoder.onnx", "target_scorer.onnx", "weights.safetensors")
        ),
        damage(
            "a file is missing", {"op": "remove", "file": "user_encoder.onnx"}, says=("user_encoder.onnx", "missing")
        ),
        damage("no manifest", {"op": "remove", "file": "manifest.json"}, says=("manifest.json",)),
        damage("an extra file", {"op": "add", "file": "extra.bin"}, says=("extra.bin", "not in the manifest")),
        damage("a longer file", {"op": "add", "file": "weights.safetensors"}, says=("weights.safetensors", "bytes")),
        {"name": "a linked file", "bundle": "log", "ops": [{"op": "link", "file": "request.onnx"}]},
        damage("not JSON", edit('"format"', "format"), says=("manifest.json", "JSON")),
        damage("half a manifest", {"op": "cut", "file": "manifest.json", "at": 1000}, says=("manifest.json", "JSON")),
        damage("not UTF-8", {"op": "flip", "file": "manifest.json", "at": 5}, says=("manifest.json",)),
        damage("nested without end", edit("{}", "[", 100_000), says=("manifest.json", "JSON")),
        damage("another format", edit("stca-bundle", "other-bundle"), says=("manifest.json", "stca-bundle")),
        damage("a newer version", edit('"version": 1', '"version": 99'), says=("version 99", "up to", "upgrade")),
        damage("no version", edit('"version": 1', '"version": "1"'), says=("version", "integer")),
        damage(
            "a changed size in the manifest",
            edit('"max_history": 6', '"max_history": 7'),
            says=("manifest.json", "changed"),
        ),
        damage("no digest", edit('"digest"', '"digests"'), says=("manifest.json",)),
        damage("an unknown field", edit('"format"', '"color": 1, "format"'), says=("malformed", "color")),
        damage(
            "a state of nothing",
            edit('"input": "history_offsets"', '"input": "nothing"'),
            says=("malformed", "nothing"),
        ),
        damage("a graph without outputs", edit('"outputs": [', '"outputs": [], "_": ['), says=("malformed",)),
        damage("a version of true", edit('"version": 1', '"version": true'), says=("version", "integer")),
        damage("a field is missing", edit('"precision"', '"precisely"'), says=("misses", "precision")),
        damage("a graph is missing", edit('"user_encoder": {', '"user_decoder": {'), says=("misses", "user_encoder")),
        damage("a file's digest is missing", edit('"sha256"', '"sha1"'), says=("sha256",)),
        damage("a field of the wrong kind", edit('"split": {}', '"split": []'), says=("manifest.json", "malformed")),
        damage("an unknown dtype", edit(first, first.replace("int64", "complex64")), says=("malformed", "dtype")),
        damage("a tensor's field too many", edit(first, first + ', "color": 1'), says=("malformed", "color")),
        damage("a shape of booleans", edit('"N_h",\n      2', "true,\n      2"), says=("malformed", "shape")),
        damage(
            "a graph file elsewhere",
            edit('"file": "request.onnx"', '"file": "../request.onnx"'),
            says=("../request.onnx",),
        ),
        damage("weights of another version", edit('"weights": "', '"weights": "0'), says=("weights", "digest")),
    ]


def main() -> None:
    import golden_bags  # which take this module's helpers
    import golden_changes
    import golden_one_user
    import golden_padding
    import golden_sums

    shutil.rmtree(GOLDEN, ignore_errors=True)
    scores = (TensorSpec("scores", "float32", ("N_t", 2)),)
    for name, bias in (("log", 0.0), ("log_other_weights", 1000.0)):
        write_bundle(name, LOG_INPUTS, LOG_STATE, scores, log_halves(), bias, appendable=True, max_history=WINDOW)
    for name, inputs, window in (
        ("log_other_limits", [dataclasses.replace(s, limit=s.limit and 2 * s.limit) for s in LOG_INPUTS], WINDOW + 1),
        ("log_other_dtype", [_int32(s) if s.name == "request_device" else s for s in LOG_INPUTS], WINDOW),
    ):
        write_bundle(name, inputs, LOG_STATE, scores, log_halves(), 0.0, appendable=True, max_history=window)
    needy = [dataclasses.replace(s, blank=0) if s.name == "history_item" else s for s in LOG_INPUTS]
    halves = log_halves(needy=True)
    write_bundle("log_not_blank", needy, LOG_STATE, scores, halves, NEEDY_BIAS, appendable=True, max_history=WINDOW)
    first = (TensorSpec("scores", "float32", ("N_t",)),)
    write_bundle(
        "log_other_scores", LOG_INPUTS, LOG_STATE, first, log_halves(first=True), 0.0, appendable=True, max_history=6
    )
    outputs = (TensorSpec("finish", "float32", ("m", 1)), TensorSpec("like", "float32", ("m",)))
    write_bundle("plain", PLAIN_INPUTS, PLAIN_STATE, outputs, plain_halves(), 0.0, appendable=False, max_history=None)
    one = (TensorSpec("scores", "float32", ("N_t",)),)
    write_bundle(
        "rows", ROWS_INPUTS, ROWS_STATE, one, rows_halves(), 0.0, appendable=False, max_history=2, min_history=1
    )
    golden_bags.write_bundles()
    golden_padding.write_bundles()
    golden_changes.write_bundle()
    golden_one_user.write_bundle()
    golden_sums.write_bundle()
    (GOLDEN / "cases.json").write_text(cases_text(), encoding="utf-8")


def _int32(spec: TensorSpec) -> TensorSpec:
    return dataclasses.replace(spec, dtype="int32")


def cases_text() -> str:
    """All cases as JSON, one to a line."""
    import golden_bags
    import golden_changes
    import golden_one_user
    import golden_padding
    import golden_sums

    parts = golden_padding, golden_bags, golden_changes, golden_one_user, golden_sums
    others = [one for part in parts for one in part.cases()]
    cases = {"cases": [*good_cases(), *bad_cases(), *others], "damages": damage_cases()}
    lines = (f' "{key}": [\n  ' + ",\n  ".join(map(json.dumps, value)) + "\n ]" for key, value in cases.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
