// Holds our places of ONNX Runtime's functions, and our values of its constants, against its header. Compiled where
// that is given; nothing here runs.
#include <onnxruntime_c_api.h>

#include <cstddef>

#include "onnxruntime_interface.hpp"

namespace stca::core {

using F = OnnxRuntimeFunctions;
#define STCA_SAME_PLACE(ours, theirs) \
  static_assert(decltype(F::ours)::place == offsetof(OrtApi, theirs) / sizeof(void*), #theirs)
STCA_SAME_PLACE(get_error_message, GetErrorMessage);
STCA_SAME_PLACE(create_env_with_custom_logger, CreateEnvWithCustomLogger);
STCA_SAME_PLACE(create_session, CreateSession);
STCA_SAME_PLACE(create_session_from_array, CreateSessionFromArray);
STCA_SAME_PLACE(add_external_initializers_from_files_in_memory, AddExternalInitializersFromFilesInMemory);
STCA_SAME_PLACE(run, Run);
STCA_SAME_PLACE(create_session_options, CreateSessionOptions);
STCA_SAME_PLACE(set_intra_op_num_threads, SetIntraOpNumThreads);
STCA_SAME_PLACE(session_get_input_count, SessionGetInputCount);
STCA_SAME_PLACE(session_get_output_count, SessionGetOutputCount);
STCA_SAME_PLACE(session_get_input_type_info, SessionGetInputTypeInfo);
STCA_SAME_PLACE(session_get_output_type_info, SessionGetOutputTypeInfo);
STCA_SAME_PLACE(session_get_input_name, SessionGetInputName);
STCA_SAME_PLACE(session_get_output_name, SessionGetOutputName);
STCA_SAME_PLACE(create_tensor_with_data_as_ort_value, CreateTensorWithDataAsOrtValue);
STCA_SAME_PLACE(get_tensor_mutable_data, GetTensorMutableData);
STCA_SAME_PLACE(cast_type_info_to_tensor_info, CastTypeInfoToTensorInfo);
STCA_SAME_PLACE(get_tensor_element_type, GetTensorElementType);
STCA_SAME_PLACE(get_dimensions_count, GetDimensionsCount);
STCA_SAME_PLACE(get_dimensions, GetDimensions);
STCA_SAME_PLACE(get_symbolic_dimensions, GetSymbolicDimensions);
STCA_SAME_PLACE(get_tensor_type_and_shape, GetTensorTypeAndShape);
STCA_SAME_PLACE(create_cpu_memory_info, CreateCpuMemoryInfo);
STCA_SAME_PLACE(allocator_free, AllocatorFree);
STCA_SAME_PLACE(get_allocator_with_default_options, GetAllocatorWithDefaultOptions);
STCA_SAME_PLACE(release_status, ReleaseStatus);
STCA_SAME_PLACE(release_session, ReleaseSession);
STCA_SAME_PLACE(release_value, ReleaseValue);
STCA_SAME_PLACE(release_type_info, ReleaseTypeInfo);
STCA_SAME_PLACE(release_tensor_type_and_shape_info, ReleaseTensorTypeAndShapeInfo);
STCA_SAME_PLACE(release_session_options, ReleaseSessionOptions);
STCA_SAME_PLACE(add_session_config_entry, AddSessionConfigEntry);

static_assert(F::log_fatal == ORT_LOGGING_LEVEL_FATAL && F::device_allocator == OrtDeviceAllocator &&
              F::memory_default == OrtMemTypeDefault && F::type_tensor == ONNX_TYPE_TENSOR);
static_assert(offsetof(OnnxRuntimeBase, get_api) == offsetof(OrtApiBase, GetApi) &&
              offsetof(OnnxRuntimeBase, get_version_string) == offsetof(OrtApiBase, GetVersionString));
static_assert(F::element_float == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT &&
              F::element_uint8 == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 &&
              F::element_int8 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 &&
              F::element_int16 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16 &&
              F::element_int32 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 &&
              F::element_int64 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 &&
              F::element_bool == ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL &&
              F::element_float16 == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 &&
              F::element_double == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE &&
              F::element_bfloat16 == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 &&
              F::element_float8 == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN);

}  // namespace stca::core
