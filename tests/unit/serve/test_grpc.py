"""The Open Inference Protocol over gRPC: Triton's client, its messages' numbers, and frames that are none."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
import numpy as np
import pytest
from support.serving import DATATYPES, running

from stca.runtime import Request
from stca.serve.messages import DATA_TYPES, SERVICE, message

client_of = pytest.importorskip("tritonclient.grpc")


def call(server: Any, method: str, data: bytes) -> Any:
    """The answer's bytes, or the error."""
    with grpc.insecure_channel(f"127.0.0.1:{server.ports['grpc']}") as channel:
        return channel.unary_unary(f"/{SERVICE}/{method}")(data, timeout=20)


def refused(server: Any, data: bytes) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(server, "ModelInfer", data)
    trailing = dict(caught.value.trailing_metadata() or ())
    return caught.value.code().name, trailing.get("stca-code", "")


def sent(inputs: dict[str, Any]) -> list[Any]:
    made = []
    for name, x in inputs.items():
        made.append(client_of.InferInput(name, list(x.shape), DATATYPES[x.dtype.name]))
        made[-1].set_data_from_numpy(x)
    return made


def test_tritons_client_over_grpc(server, asked):
    with client_of.InferenceServerClient(f"127.0.0.1:{server.ports['grpc']}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("ranker", "1")
        assert client.get_server_metadata().name == "stca"
        inputs = asked()
        assert {i.name for i in client.get_model_metadata("ranker").inputs} == set(inputs)
        config = client.get_model_config("ranker").config
        assert (config.backend, list(config.output[0].dims)) == ("stca", [-1, 2])
        assert client.get_model_repository_index().models[0].state == "READY"
        wanted = server.served.session.score(Request(inputs))
        for packed in (None, "gzip"):
            got = client.infer(
                "ranker",
                sent(inputs),
                request_id="7",
                outputs=[client_of.InferRequestedOutput("scores")],
                parameters={"user": "ann over grpc", "version": 3},
                compression_algorithm=packed,
            )
            assert got.get_response().id == "7"
            np.testing.assert_allclose(got.as_numpy("scores"), wanted, 1e-6)
        assert got.get_response().parameters["hit"].bool_param
        assert client.get_inference_statistics("ranker").model_stats[0].inference_count >= 2
        with pytest.raises(client_of.InferenceServerException, match="is not served"):
            client.infer("other", sent(inputs))


def test_values_as_contents(server, asked):
    inputs = asked()
    request = message("ModelInferRequest")(model_name="ranker")
    for name, x in inputs.items():
        made = request.inputs.add(name=name, datatype=DATATYPES[x.dtype.name], shape=x.shape)
        made.contents.int64_contents.extend(x.ravel().tolist())
    answer = message("ModelInferResponse").FromString(call(server, "ModelInfer", request.SerializeToString()))
    scores = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(answer.outputs[0].shape)
    np.testing.assert_allclose(scores, server.served.session.score(Request(inputs)), 1e-6)


def test_the_messages_are_the_protocols():
    """Every field that we declare has the number and the kind that Triton's client knows it by."""
    from tritonclient.grpc import model_config_pb2, service_pb2

    from stca.serve import messages

    theirs: dict[str, Any] = dict(service_pb2.DESCRIPTOR.message_types_by_name)
    theirs |= dict(model_config_pb2.DESCRIPTOR.message_types_by_name)
    nested = {n.name: n for d in list(theirs.values()) for n in d.nested_types}
    ours = [line.partition(":")[0] for line in messages._DECLARED.strip().splitlines()]
    for name in ours:
        known = theirs.get(name) or nested[name]
        for field in message(name).DESCRIPTOR.fields:
            other = known.fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated), name
            assert (field.containing_oneof is None) == (other.containing_oneof is None), name
    assert [v.name for v in model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"].values] == list(DATA_TYPES)


def test_what_is_wrong_is_told_by_status_and_code(server, asked):
    made = message("ModelInferRequest")
    assert refused(server, made(model_name="other").SerializeToString()) == ("NOT_FOUND", "not_found")
    needs = made(model_name="ranker")
    needs.parameters["user"].string_param = "nobody"
    needs.parameters["version"].int64_param = 1
    for name in ("target_item", "target_category", "request_device"):
        x = asked()[name]
        needs.inputs.add(name=name, datatype="INT64", shape=x.shape)
        needs.raw_input_contents.append(x.tobytes())
    assert refused(server, needs.SerializeToString()) == ("FAILED_PRECONDITION", "history_needed")


def hostile() -> dict[str, bytes]:
    made = message("ModelInferRequest")

    def of(**fields: Any) -> bytes:
        return bytes(made(model_name="ranker", **fields).SerializeToString())

    item = {"name": "target_item", "datatype": "INT64", "shape": [2]}
    return {
        "nothing": b"",
        "no message": b"\xff" * 40,
        "a number without an end": b"\xff" * 9,
        "a length beyond the end": b"\x0a\xff\xff\xff\xff\x0f",
        "a group": b"\x0b\x0c",
        "many fields": b"\x2a\x00" * 10_000,
        "no UTF-8": b"\x0a\x01\xff",
        "raw bytes too short": of(inputs=[item], raw_input_contents=[b"1"]),
        "raw bytes of nobody": of(raw_input_contents=[b"1"]),
        "a product that overflows": of(inputs=[{**item, "shape": [1 << 62, 1 << 62]}], raw_input_contents=[b""]),
        "a negative dimension": of(inputs=[{**item, "shape": [-2]}], raw_input_contents=[b""]),
        "an input twice": of(inputs=[item, item], raw_input_contents=[bytes(16), bytes(16)]),
        "text": of(inputs=[{**item, "datatype": "BYTES"}], raw_input_contents=[b"a"]),
        "contents of another type": of(inputs=[{**item, "contents": {"fp32_contents": [1, 2]}}]),
        "contents and bytes": of(
            inputs=[{**item, "contents": {"int64_contents": [1, 2]}}], raw_input_contents=[bytes(16)]
        ),
        "an unknown parameter": of(parameters={"usr": {"string_param": "ann"}}),
        "a parameter without a value": of(parameters={"user": {}, "deadline_ms": {"string_param": "1"}}),
        "shared memory": of(
            inputs=[{**item, "parameters": {"shared_memory_region": {"string_param": "r"}}}],
            raw_input_contents=[bytes(16)],
        ),
    }


def test_what_perf_analyzer_adds_to_each_request_is_no_mistake(server, asked):
    inputs = asked()
    request = message("ModelInferRequest")(
        model_name="ranker",
        inputs=[{"name": n, "datatype": DATATYPES[x.dtype.name], "shape": x.shape} for n, x in inputs.items()],
        raw_input_contents=[x.tobytes() for x in inputs.values()],
        parameters={"triton_enable_empty_final_response": {"bool_param": True}},
    )
    misses = server.served.statistics.cache_miss.count
    answer = message("ModelInferResponse").FromString(call(server, "ModelInfer", request.SerializeToString()))
    assert answer.outputs[0].name == "scores"
    # It takes the time of looking for kept responses off the others', and there are none.
    counted = server.served.statistics.cache_miss
    assert (counted.count, counted.ns) == (misses + 1, 0)


@pytest.mark.parametrize("name", hostile())
def test_hostile_messages_are_refused(server, name):
    status, code = refused(server, hostile()[name])
    assert (status, code) in (("INVALID_ARGUMENT", "bad_request"), ("NOT_FOUND", "not_found"))
    assert call(server, "ServerLive", b"")


def test_large_messages_are_refused_packed_or_not(bundle_dir):
    with running(bundle_dir, body_mib=1) as small:
        large = message("ModelInferRequest")(model_name="ranker", id="x" * (2 << 20)).SerializeToString()
        assert refused(small, large)[0] == "RESOURCE_EXHAUSTED"
        outside = message("ModelInferRequest")(model_name="ranker", id="x" * (1 << 19)).SerializeToString()
        assert refused(small, outside) == ("RESOURCE_EXHAUSTED", "too_large")
        with grpc.insecure_channel(f"127.0.0.1:{small.ports['grpc']}") as channel:
            method = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            with pytest.raises(grpc.RpcError) as caught:
                method(large, timeout=20, compression=grpc.Compression.Gzip)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert call(small, "ServerReady", b"") == b"\x08\x01"


def test_more_connections_than_there_may_be_are_closed_and_one_that_ends_makes_room(bundle_dir, monkeypatch):
    monkeypatch.setattr("stca.serve.server.most_connections", lambda: 2)
    method = f"/{SERVICE}/ServerLive"
    with running(bundle_dir) as server, contextlib.ExitStack() as kept:
        # Channels to one address share a connection unless each has a pool of its own.
        made = [
            grpc.insecure_channel(f"127.0.0.1:{server.ports['grpc']}", [("grpc.use_local_subchannel_pool", 1)])
            for _ in range(3)
        ]
        for channel in made[1:]:
            kept.callback(channel.close)
            assert channel.unary_unary(method)(b"", timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            made[0].unary_unary(method)(b"", timeout=20)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        made[1].close()
        assert made[0].unary_unary(method)(b"", timeout=20, wait_for_ready=True)
        made[0].close()
