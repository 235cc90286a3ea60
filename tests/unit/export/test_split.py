"""The cut: its guarantees on random graphs, its optimality by enumeration, and what it says of the operator's graph."""

from __future__ import annotations

import json
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from onnx import helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from support.graphs import SIZES, Case, attention_graph, cases, packed_feeds
from support.joined import joined_equals_whole

import stca.export.split as split_module
from stca.errors import SplitError
from stca.export.analysis.cost import DEFAULT_WORKLOAD
from stca.export.analysis.scope import Scope, infer_scopes
from stca.export.split import Split, check_postconditions, split

FLOPS_PER_BYTE = (0.125, 1.0, 16.0, 1000.0)
RANK = {"user": 1, "request": 2, "target": 3}


def run_onnxruntime(model, feeds):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


class Independent:
    """The same questions answered without the code under test: by recursion, and from arrays actually computed."""

    def __init__(self, case: Case) -> None:
        self.graph = case.model.graph
        self.scopes = case.scopes
        self.maker = {name: node for node in self.graph.node for name in node.output}
        self.outputs = [o.name for o in self.graph.output]
        watched = onnx.ModelProto()
        watched.CopyFrom(case.model)
        extra = [name for name in self.maker if name not in self.outputs]
        watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
        feeds = case.feeds()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = ReferenceEvaluator(watched).run(None, feeds)
        self.arrays = dict(feeds) | dict(zip((*self.outputs, *extra), values, strict=True))
        for tensor in self.graph.initializer:
            self.arrays[tensor.name] = numpy_helper.to_array(tensor)

    def sources(self, node):
        inner = [n for a in node.attribute if a.type == onnx.AttributeProto.GRAPH for n in a.g.node]
        return [*node.input, *(name for n in inner for name in n.input)]

    def rank(self, name) -> int:
        if name not in self.maker:
            return RANK.get(self.scopes.get(name, ""), 0)
        return max((self.rank(s) for s in self.sources(self.maker[name])), default=0)

    def live(self):
        found, todo = [], list(self.outputs)
        while todo:
            node = self.maker.get(todo.pop())
            if node is not None and node not in found:
                found.append(node)
                todo.extend(self.sources(node))
        return found

    def work(self, node) -> int:
        out = sum(int(np.size(self.arrays[name])) for name in node.output)
        first = self.arrays[node.input[0]]
        price = {
            "MatMul": lambda: 2 * out * first.shape[-1],
            "Tanh": lambda: 8 * out,
            "ReduceMean": lambda: first.size,
            "ReduceSum": lambda: first.size,
            "Shape": lambda: 1,
            "If": lambda: 2 * out,  # one elementwise operator in each branch
        }
        return max(1, price.get(node.op_type, lambda: out)())

    def user_nodes(self):
        return [n for n in self.live() if self.rank(n.output[0]) == 1]

    def best(self, flops_per_byte: float):
        """(cost, recomputed work) of the best of all legal cuts: any subset of the user nodes may be recomputed."""
        nodes = self.user_nodes()
        above = {name for n in self.live() if self.rank(n.output[0]) > 1 for name in self.sources(n)} | {*self.outputs}
        work = [self.work(n) for n in nodes]
        values = []  # bytes, bit of the maker, bits of the user nodes that read it, whether the scorer reads it anyway
        for name in {*self.scopes, *(name for n in nodes for name in n.output)}:
            if self.rank(name) == 1:
                maker = sum(1 << i for i, n in enumerate(nodes) if name in n.output)
                readers = sum(1 << i for i, n in enumerate(nodes) if name in self.sources(n))
                values.append((self.arrays[name].nbytes, maker, readers, name in above))
        options = []
        for recomputed in range(1 << len(nodes)):
            flops = sum(w for i, w in enumerate(work) if recomputed >> i & 1)
            size = sum(b for b, made, read, always in values if not recomputed & made and (always or recomputed & read))
            options.append((size * flops_per_byte + flops, flops))  # exact: the prices are powers of two or integers
        cost, flops = min(options)
        return cost / flops_per_byte, flops


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=cases(), flops_per_byte=st.sampled_from(FLOPS_PER_BYTE))
def test_random_graphs_keep_every_guarantee_at_the_least_cost(case: Case, flops_per_byte: float) -> None:
    onnx.checker.check_model(case.model, full_check=True)
    truth = Independent(case)
    assume(len(truth.user_nodes()) <= 10)  # more are too many to enumerate
    if not truth.user_nodes():
        with pytest.raises(SplitError, match="no node depends on user inputs alone"):
            split(case.model, case.scopes, workload=SIZES)
        return
    result = split(case.model, case.scopes, workload=SIZES, flops_per_byte=flops_per_byte)

    # No request or target input reaches the encoder, all outputs are there, every live node is in a half.
    assert {RANK[case.scopes[i.name]] for i in result.user_encoder.graph.input} <= {1}
    assert [o.name for o in result.target_scorer.graph.output] == truth.outputs
    halves = (result.user_encoder, result.target_scorer)
    made = {name for half in halves for node in half.graph.node for name in node.output}
    assert {name for node in truth.live() for name in node.output} <= made
    for half in halves:
        onnx.checker.check_model(half, full_check=True)
    # The joined halves equal the whole, also with an empty history.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert joined_equals_whole(case.model, result, case.feeds())
        assert joined_equals_whole(case.model, result, case.feeds(N_h=0))
    # Bytes are what the arrays weigh, and no cheaper legal cut exists; ties go to less recomputed work.
    for tensor in result.state:
        assert tensor.bytes == truth.arrays[tensor.value].nbytes
    report = result.report
    cost = (report.state_bytes * flops_per_byte + report.recomputed_work) / flops_per_byte
    assert (cost, report.recomputed_work) == truth.best(flops_per_byte)


def names(result: Split) -> set[str]:
    return {tensor.value for tensor in result.state}


def text_graph(inputs: str, outputs: str, body: str, **weights: tuple[int, ...]) -> Case:
    """A graph in ONNX's text form; the scope of an input is the start of its name."""
    model = parser.parse_model(f"""<ir_version: 10, opset_import: ["": 18]> g ({inputs}) => ({outputs}) {{ {body} }}""")
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for node in model.graph.node:
        node.name = f"make_{node.output[0]}"
    return Case(model, {v.name: v.name.split("_")[0] for v in model.graph.input})


def plain() -> Case:
    return text_graph(
        "float[N_h, 8] user_x, float[1, 8] request_x, float[N_t, 8] target_x",
        "float[N_t, N_h] y",
        """h = MatMul (user_x, w)
           k = Add (h, request_x)
           turned = Transpose <perm: ints = [1, 0]> (k)
           y = MatMul (target_x, turned)""",
        w=(8, 8),
    )


# What the cut says of the operator's own graph.

ROWS = [([4], [3]), ([1], [1]), ([0], [2]), ([5], [0]), ([3, 0, 2], [1, 2, 0]), ([0, 0], [0, 0])]


@pytest.mark.parametrize(("histories", "targets"), ROWS)
@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_the_operators_halves_equal_the_whole_at_every_size(
    form: str, histories: list[int], targets: list[int]
) -> None:
    case = attention_graph(form)
    result = split(case.model, case.scopes)
    feeds = packed_feeds(case, histories, targets)
    assert joined_equals_whole(case.model, result, feeds)
    assert joined_equals_whole(case.model, result, feeds, run_onnxruntime, rtol=1e-5, atol=1e-6)


def test_the_absorbed_state_is_the_encoded_history() -> None:
    case = attention_graph("absorbed", d=32)
    result = split(case.model, case.scopes)
    offsets, encoded = result.state
    assert (offsets.name, offsets.value, offsets.verbatim) == ("state_history_offsets", "history_offsets", True)
    assert (encoded.name, encoded.dtype, encoded.shape) == ("key", "float32", ("N_h", 1, 32))
    assert (encoded.bytes, encoded.bytes_per_token, encoded.verbatim) == (10_000 * 32 * 4, 128, False)
    assert result.report.bytes_per_token == 128
    assert result.report.recomputed_nodes == ("begin", "finish", "lengths")


def test_each_half_carries_what_it_uses_and_no_more() -> None:
    case = attention_graph("absorbed")
    result = split(case.model, case.scopes)
    assert [f.name for f in result.target_scorer.functions] == ["AttendSegment", "TargetHistoryAttention"]
    assert not result.user_encoder.functions
    assert [o.domain for o in result.user_encoder.opset_import] == [""]
    encoder, scorer = ({t.name for t in h.graph.initializer} for h in (result.user_encoder, result.target_scorer))
    assert encoder == {"table", "to_hidden", "to_model", "gain", "one"}
    assert encoder & scorer == {"table", "one"}
    assert "to_wide" in scorer


def test_projections_move_to_the_scorer_when_work_is_cheap_enough() -> None:
    """K and V are 4·d bytes more than X̃ for each token, and 4·d² operations: they move at a price of d, here 32."""
    case = attention_graph("projected", d=32)
    assert names(split(case.model, case.scopes)) == {"history_offsets", "key", "value"}
    assert names(split(case.model, case.scopes, flops_per_byte=31)) == {"history_offsets", "key", "value"}
    assert names(split(case.model, case.scopes, flops_per_byte=33)) == {"history_offsets", "encoded"}
    raw = split(case.model, case.scopes, flops_per_byte=1e6)
    assert names(raw) == {"history_offsets", "history_item"}
    assert raw.report.notes == ("the state is user inputs as they came: at this price no user work is worth caching",)


def test_what_only_widens_moves_to_the_scorer() -> None:
    case = text_graph(
        "float[N_h, 8] user_x, float[N_t, 8] target_x",
        "float[N_t, N_h] y",
        """h = MatMul (user_x, w)
           half = Cast <to: int = 10> (h)
           wide = Cast <to: int = 1> (half)
           turned = Transpose <perm: ints = [1, 0]> (wide)
           y = MatMul (target_x, turned)""",
        w=(8, 8),
    )
    result = split(case.model, case.scopes)
    assert [(t.name, t.dtype, t.bytes_per_token) for t in result.state] == [("half", "float16", 16)]
    assert joined_equals_whole(case.model, result, case.feeds())


def test_a_time_delta_is_reported_with_its_path_and_price() -> None:
    d, n = 32, DEFAULT_WORKLOAD["N_h"]
    case = attention_graph("absorbed", d=d, delta=True)
    result = split(case.model, case.scopes)
    (found,) = result.report.request_dependencies
    assert (found.value, found.path, found.encodings) == ("waited", ("request_time", "waited"), ("key",))
    time = n + n + 1 + n * d  # Sub, Cast, Unsqueeze, Add
    mlp = 2 * (2 * n * d * 4 * d) + 8 * n * 4 * d
    assert found.flops == result.report.request_work == time + mlp + 8 * n * d + 1  # LayerNormalization, Unsqueeze
    assert found.bytes == 4 * n * d
    assert str(found) == (
        "history encoding 'key' depends on request input 'request_time' via request_time → waited; "
        "0.177 GFLOP of history work per request cannot be cached"
    )
    report = json.loads(json.dumps(result.report.as_dict()))
    assert report["request_dependencies"][0]["text"] == str(found)
    assert joined_equals_whole(case.model, result, packed_feeds(case, [4], [2]))


def test_no_time_delta_or_a_light_request_feature_is_no_finding() -> None:
    case = attention_graph("absorbed")
    assert not split(case.model, case.scopes).report.request_dependencies
    case = text_graph(
        "float[N_h, 8] user_x, float[1, 8] user_y, float[1, 8] request_x, float[N_t, 8] target_x",
        "float[N_t, N_h] y",
        """h = MatMul (user_x, w)
           r = Add (user_y, request_x)
           t = Add (target_x, r)
           turned = Transpose <perm: ints = [1, 0]> (h)
           y = MatMul (t, turned)""",
        w=(8, 8),
    )
    assert not split(case.model, case.scopes).report.request_dependencies


# The postconditions look at the halves alone: they catch a mistake in whatever decided the cut.


def test_a_wrong_scope_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    case = plain()
    split(case.model, case.scopes)

    def wrong(model, inputs):
        return infer_scopes(model, inputs) | dict.fromkeys(("request_x", "k", "turned"), Scope.USER)

    monkeypatch.setattr(split_module, "infer_scopes", wrong)
    with pytest.raises(SplitError, match="the user encoder reads 'request_x'; it may not"):
        split(case.model, case.scopes)


def drop_first_node(model: onnx.ModelProto) -> None:
    del model.graph.node[0]


def drop_output(model: onnx.ModelProto) -> None:
    del model.graph.output[0]


def break_a_type(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64


@pytest.mark.parametrize(
    ("half", "tamper", "message"),
    [
        ("user_encoder", drop_output, "the outputs of the user encoder are not h"),
        ("user_encoder", drop_first_node, "the user encoder reads 'h'; it may not"),
        ("target_scorer", drop_first_node, "the target scorer reads 'k'; it may not"),
        ("target_scorer", drop_output, "the outputs of the target scorer are not y"),
        ("target_scorer", break_a_type, "the target scorer is not valid ONNX"),
    ],
)
def test_tampered_halves_fail_their_postconditions(half: str, tamper, message: str) -> None:
    case = plain()
    result = split(case.model, case.scopes)
    tamper(getattr(result, half))
    with pytest.raises(SplitError, match=message):
        check_postconditions(case.model, {n: Scope.of(s) for n, s in case.scopes.items()}, result)


def test_a_live_node_in_neither_half_is_found() -> None:
    case = plain()
    result = split(case.model, case.scopes)
    case.model.graph.node[-1].output[0] = "z"
    case.model.graph.node.append(helper.make_node("Exp", ["z"], ["y"]))
    with pytest.raises(SplitError, match="neither half computes 'z'"):
        check_postconditions(case.model, {n: Scope.of(s) for n, s in case.scopes.items()}, result)


# Bad input is one line that names the thing.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_x": None}, "input 'user_x' has no scope; list it in one of --user-inputs"),
        ({"usr_x": "user"}, "no input 'usr_x'; its inputs are user_x, request_x, target_x"),
        ({"user_x": "constant"}, "'constant' is not a scope of an input"),
        ({"user_x": "request"}, "no input has scope user"),
        ({"target_x": "request"}, "no input has scope target"),
        ({"user_x": "request", "request_x": "user"}, "no node depends on user inputs alone"),
    ],
)
def test_wrong_marks_are_refused_with_the_option_to_use(change: dict[str, str | None], message: str) -> None:
    case = plain()
    scopes = {name: scope for name, scope in {**case.scopes, **change}.items() if scope is not None}
    with pytest.raises(SplitError, match=message):
        split(case.model, scopes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workload": {"N_h": 10}}, "dimension 0 of input 'target_x' has no nominal size; give one for 'N_t'"),
        ({"workload": {"N_h": 0, "N_t": 1}}, "workload: N_h is 0; a nominal size must be at least 1"),
        ({"flops_per_byte": 0.0}, "flops_per_byte is 0.0; it must be a positive number"),
        ({"flops_per_byte": float("nan")}, "flops_per_byte is nan"),
    ],
)
def test_wrong_options_are_refused(options, message: str) -> None:
    case = plain()
    with pytest.raises(SplitError, match=message):
        split(case.model, case.scopes, **options)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("h = RandomNormalLike (user_x) y = Concat <axis: int = 0> (h, target_x)", "'make_h' .* draws random numbers"),
        (
            "n = RandomNormal <shape: ints = [1, 8]> () u = Add (user_x, n) y = Concat <axis: int = 0> (u, target_x)",
            "'make_n' .* draws random numbers",
        ),
        ("h = Exp (user_y) y = Concat <axis: int = 0> (h, target_x)", "the model is not valid ONNX: .*user_y"),
        ("h = Exp (user_x) y = Neg (h)", "no output depends on a target input"),
        ("h = Exp (user_x) y = NoSuchOp (h, target_x)", "the model is not valid ONNX: .*NoSuchOp"),
    ],
)
def test_graphs_that_cannot_be_cut_are_refused(body: str, message: str) -> None:
    case = text_graph("float[N_h, 8] user_x, float[N_t, 8] target_x", "float[n, 8] y", body)
    with pytest.raises(SplitError, match=message) as error:
        split(case.model, case.scopes)
    assert "\n" not in str(error.value)


def test_a_weight_shorter_than_its_shape_is_refused() -> None:
    case = attention_graph("absorbed", d=64)
    table = next(t for t in case.model.graph.initializer if t.name == "table")
    table.raw_data = table.raw_data[:-4]
    with pytest.raises(SplitError, match=r"the model is not valid ONNX: .*table"):
        split(case.model, case.scopes)


def test_text_cannot_be_cached_but_what_is_read_from_it_can() -> None:
    inputs, outputs = "string[N_h, 1] user_x, string[N_t, 1] target_x", "float[n, 1] y"
    case = text_graph(
        inputs,
        outputs,
        """u = Cast <to: int = 1> (user_x)
           t = Cast <to: int = 1> (target_x)
           y = Concat <axis: int = 0> (u, t)""",
    )
    assert names(split(case.model, case.scopes, flops_per_byte=1e9)) == {"u"}
    case = text_graph(
        inputs,
        outputs,
        """u = Identity (user_x)
           both = Concat <axis: int = 0> (u, target_x)
           y = Cast <to: int = 1> (both)""",
    )
    with pytest.raises(SplitError, match="user input 'user_x' is not a tensor of numbers of known rank"):
        split(case.model, case.scopes)


# Graphs of others.


def test_functions_of_others_are_inlined_and_cut_through() -> None:
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18, "mine": 1]>
        g (float[N_h, 8] user_x, float[N_t, 8] target_x) => (float[N_t, N_h] y) { y = mine.Net (user_x, target_x) }
        <domain: "mine", opset_import: ["": 18]>
        Encode (x) => (h) { h = Exp (x) }
        <domain: "mine", opset_import: ["": 18, "mine": 1]>
        Net (x, t) => (y) { h = mine.Encode (x) turned = Transpose <perm: ints = [1, 0]> (h) y = MatMul (t, turned) }
        """)
    case = Case(model, {"user_x": "user", "target_x": "target"})
    result = split(model, case.scopes)
    assert [node.op_type for node in result.user_encoder.graph.node] == ["Exp", "Transpose"]
    assert joined_equals_whole(model, result, case.feeds())


def test_a_user_scoped_output_passes_through_the_state() -> None:
    case = text_graph(
        "float[N_h, 8] user_x, float[N_t, 8] target_x",
        "float[N_t, N_h] y, float[N_h, 8] h, float[N_t, 8] state_h",
        """h = MatMul (user_x, w)
           turned = Transpose <perm: ints = [1, 0]> (h)
           y = MatMul (target_x, turned)
           state_h = Neg (target_x)""",
        w=(8, 8),
    )
    result = split(case.model, case.scopes)
    assert [(t.name, t.value, t.verbatim) for t in result.state] == [("state_h_", "h", False)]
    assert [o.name for o in result.target_scorer.graph.output] == ["y", "h", "state_h"]
    assert joined_equals_whole(case.model, result, case.feeds())


def test_sizes_go_by_whatever_names_the_model_has() -> None:
    case = text_graph(
        "float[1, events, 8] user_x, float[items, 8] target_x, float[spare] user_spare",
        "float[1, items, events] y",
        """h = MatMul (user_x, w)
           turned = Transpose <perm: ints = [0, 2, 1]> (h)
           y = MatMul (target_x, turned)
           unused = Exp (user_spare)""",
        w=(8, 8),
    )
    case.model.graph.input[2].type.tensor_type.shape.dim[0].Clear()
    with pytest.raises(SplitError, match=r"dimension 0 of input 'user_spare' .* give one for 'user_spare.0'"):
        split(case.model, case.scopes, workload={"events": 100, "items": 5})
    workload = {"events": 100, "items": 5, "user_spare.0": 1}
    result = split(case.model, case.scopes, workload=workload, history_dim="events")
    (state,) = result.state
    assert (state.name, state.shape, state.bytes, state.bytes_per_token) == ("turned", (1, 8, "events"), 3200, 32)
    assert result.report.notes == ("input 'user_spare' is not used", "nodes left out because they reach no output: 1")
    assert [i.name for i in result.user_encoder.graph.input] == ["user_x"]


def test_a_size_that_depends_on_data_is_guessed_and_said_so() -> None:
    case = text_graph(
        "float[N_h] user_x, float[N_t, 1] target_x",
        "float[N_t, n] y",
        """big = Exp (user_x)
           where = NonZero (big)
           small = Cast <to: int = 1> (where)
           y = Mul (target_x, small)""",
    )
    result = split(case.model, case.scopes)
    assert [(t.name, t.dtype, t.bytes) for t in result.state] == [("small", "float32", 40_000)]
    assert result.report.notes == ("sizes guessed where the shape is unknown: 'where', 'small'",)
    feeds = {"user_x": np.zeros(3, np.float32), "target_x": np.ones((2, 1), np.float32)}
    assert joined_equals_whole(case.model, result, feeds)


def test_an_input_with_a_default_is_a_constant_unless_marked() -> None:
    case = plain()
    case.model.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [8, 8]))
    result = split(case.model, case.scopes)
    assert [i.name for i in result.user_encoder.graph.input] == ["user_x"]
    assert [t.name for t in result.user_encoder.graph.initializer] == ["w"]
    marked = split(case.model, {**case.scopes, "w": "user"})
    assert [i.name for i in marked.user_encoder.graph.input] == ["user_x", "w"]
    assert not marked.user_encoder.graph.initializer
    assert joined_equals_whole(case.model, marked, case.feeds())


def test_the_model_is_left_as_it_was() -> None:
    case = attention_graph("projected")
    before = case.model.SerializeToString(deterministic=True)
    split(case.model, case.scopes)
    assert case.model.SerializeToString(deterministic=True) == before
