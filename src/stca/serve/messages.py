"""The messages of `inference.GRPCInferenceService`, declared in code: numbers and types are the protocol's."""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE: Final = "inference"
SERVICE: Final = f"{PACKAGE}.GRPCInferenceService"

# A line each message: its name, then `number name type`; `*` stands before what repeats, `%` before the values of a map
# by text. Types that are no scalars are messages of this table.
_DECLARED: Final = """
ServerLiveRequest
ServerLiveResponse: 1 live bool
ServerReadyRequest
ServerReadyResponse: 1 ready bool
ModelReadyRequest: 1 name string, 2 version string
ModelReadyResponse: 1 ready bool
ServerMetadataRequest
ServerMetadataResponse: 1 name string, 2 version string, 3 extensions *string
ModelMetadataRequest: 1 name string, 2 version string
TensorMetadata: 1 name string, 2 datatype string, 3 shape *int64
ModelMetadataResponse: 1 name string, 2 versions *string, 3 platform string, 4 inputs *TensorMetadata, 5 outputs *TensorMetadata
InferParameter: 1 bool_param bool, 2 int64_param int64, 3 string_param string, 4 double_param double, 5 uint64_param uint64
InferTensorContents: 1 bool_contents *bool, 2 int_contents *int32, 3 int64_contents *int64, 4 uint_contents *uint32, 5 uint64_contents *uint64, 6 fp32_contents *float, 7 fp64_contents *double, 8 bytes_contents *bytes
InferInputTensor: 1 name string, 2 datatype string, 3 shape *int64, 4 parameters %InferParameter, 5 contents InferTensorContents
InferRequestedOutputTensor: 1 name string, 2 parameters %InferParameter
ModelInferRequest: 1 model_name string, 2 model_version string, 3 id string, 4 parameters %InferParameter, 5 inputs *InferInputTensor, 6 outputs *InferRequestedOutputTensor, 7 raw_input_contents *bytes
InferOutputTensor: 1 name string, 2 datatype string, 3 shape *int64, 4 parameters %InferParameter, 5 contents InferTensorContents
ModelInferResponse: 1 model_name string, 2 model_version string, 3 id string, 4 parameters %InferParameter, 5 outputs *InferOutputTensor, 6 raw_output_contents *bytes
ModelConfigRequest: 1 name string, 2 version string
ModelInput: 1 name string, 2 data_type DataType, 4 dims *int64, 8 optional bool
ModelOutput: 1 name string, 2 data_type DataType, 3 dims *int64
ModelConfig: 1 name string, 2 platform string, 4 max_batch_size int32, 5 input *ModelInput, 6 output *ModelOutput, 17 backend string
ModelConfigResponse: 1 config ModelConfig
ModelStatisticsRequest: 1 name string, 2 version string
StatisticDuration: 1 count uint64, 2 ns uint64
InferStatistics: 1 success StatisticDuration, 2 fail StatisticDuration, 3 queue StatisticDuration, 4 compute_input StatisticDuration, 5 compute_infer StatisticDuration, 6 compute_output StatisticDuration, 7 cache_hit StatisticDuration, 8 cache_miss StatisticDuration
InferBatchStatistics: 1 batch_size uint64, 2 compute_input StatisticDuration, 3 compute_infer StatisticDuration, 4 compute_output StatisticDuration
ModelStatistics: 1 name string, 2 version string, 3 last_inference uint64, 4 inference_count uint64, 5 execution_count uint64, 6 inference_stats InferStatistics, 7 batch_stats *InferBatchStatistics
ModelStatisticsResponse: 1 model_stats *ModelStatistics
RepositoryIndexRequest: 1 repository_name string, 2 ready bool
ModelIndex: 1 name string, 2 version string, 3 state string, 4 reason string
RepositoryIndexResponse: 1 models *ModelIndex
"""  # noqa: E501
DATA_TYPES: Final = (
    "TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8", "TYPE_INT16",
    "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING", "TYPE_BF16",
)  # fmt: skip

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS: Final = {
    n: getattr(_Field, f"TYPE_{n.upper()}")
    for n in ("bool", "string", "bytes", "int32", "int64", "uint32", "uint64", "float", "double")
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="stca/serve/inference.proto", package=PACKAGE, syntax="proto3")
    kinds = file.enum_type.add(name="DataType")
    for value, kind in enumerate(DATA_TYPES):
        kinds.value.add(name=kind, number=value)
    for line in _DECLARED.strip().splitlines():
        name, _, fields = line.partition(": ")
        message = file.message_type.add(name=name)
        for told in fields.split(", ") if fields else ():
            number, field, kind = told.split(" ")
            if kind.startswith("%"):
                kind = _add_map(message, field, kind[1:])
            made = _add(message, int(number), field, kind.removeprefix("*"), repeated=kind.startswith("*"))
            if name == "InferParameter":
                made.oneof_index = 0
        if name == "InferParameter":
            message.oneof_decl.add(name="parameter_choice")
    return file


def _add(message: Any, number: int, name: str, kind: str, *, repeated: bool) -> Any:
    label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    if kind in _SCALARS:
        return message.field.add(name=name, number=number, label=label, type=_SCALARS[kind])
    made = _Field.TYPE_ENUM if kind == "DataType" else _Field.TYPE_MESSAGE
    return message.field.add(name=name, number=number, label=label, type=made, type_name=f".{PACKAGE}.{kind}")


def _add_map(message: Any, field: str, kind: str) -> str:
    """The entries of a map, and their type."""
    name = "".join(part.capitalize() for part in field.split("_")) + "Entry"
    entry = message.nested_type.add(name=name)
    entry.options.map_entry = True
    _add(entry, 1, "key", "string", repeated=False)
    _add(entry, 2, "value", kind, repeated=False)
    return f"*{message.name}.{name}"


# A pool of our own: a process may hold a client's messages of the same names.
_POOL: Final = descriptor_pool.DescriptorPool()
_POOL.AddSerializedFile(_file().SerializeToString())


def message(name: str) -> Any:
    """The class of a message, by its name in `_DECLARED`."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))
