// What is used of ONNX Runtime, declared as its C ABI has it. The library is loaded when the first engine is made, so
// neither its header nor the library itself is needed to build this one.
//
// OrtApi is a table of functions in which places never change: a new version adds its own behind the last. The places
// here are held against its header in onnxruntime_header.cpp, which is compiled where that is given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "error.hpp"

// ONNX Runtime's own names.
struct OrtEnv;
struct OrtMemoryInfo;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtTypeInfo;
struct OrtValue;
struct OrtAllocator;

namespace stca::core {

/// Throws BuildError unless this version can serve. Those before 1.32 divide by zero, which ends the process, in a
/// product of matrices without rows: a request without events.
inline void check_version(const std::string& version) {
  constexpr int oldest = 32;
  const std::size_t dot = version.find('.');
  if (dot == version.npos || std::atoi(version.c_str()) != 1) {
    fail(STCA_BUILD_ERROR, "ONNX Runtime ", shown(version), " may have another C ABI; install a 1.x from 1.", oldest,
         " on");
  }
  if (std::atoi(version.c_str() + dot + 1) >= oldest) return;
  fail(STCA_BUILD_ERROR, "ONNX Runtime ", shown(version),
       " can end the process on a request without events or targets; install onnxruntime 1.", oldest, " or newer");
}

struct OnnxRuntimeFunctions {
  using Log = void (*)(void*, int severity, const char*, const char*, const char*, const char*);

  /// Oldest version of the C API with all that is used here.
  static constexpr std::uint32_t api_version = 18;
  // Values of its enumerations.
  static constexpr int log_fatal = 4, device_allocator = 0, memory_default = 0, type_tensor = 1;
  static constexpr int element_float = 1, element_uint8 = 2, element_int8 = 3, element_int16 = 5, element_int32 = 6,
                       element_int64 = 7, element_bool = 9, element_float16 = 10, element_double = 11,
                       element_bfloat16 = 16, element_float8 = 17;

  /// A function of the table, by its place.
  template <std::size_t Place, class Function>
  struct At {
    static constexpr std::size_t place = Place;
    void take(const void* const* table) { call = reinterpret_cast<Function>(const_cast<void*>(table[Place])); }
    template <class... Arguments>
    auto operator()(Arguments... arguments) const {
      return call(arguments...);
    }
    Function call = nullptr;
  };
  template <class... Arguments>
  using Fallible = OrtStatus* (*)(Arguments...);

  At<2, const char* (*)(const OrtStatus*)> get_error_message;
  At<4, Fallible<Log, void*, int, const char*, OrtEnv**>> create_env_with_custom_logger;
  At<7, Fallible<const OrtEnv*, const char*, const OrtSessionOptions*, OrtSession**>> create_session;
  At<8, Fallible<const OrtEnv*, const void*, std::size_t, const OrtSessionOptions*, OrtSession**>>
      create_session_from_array;
  At<9, Fallible<OrtSession*, const OrtRunOptions*, const char* const*, const OrtValue* const*, std::size_t,
                 const char* const*, std::size_t, OrtValue**>>
      run;
  At<10, Fallible<OrtSessionOptions**>> create_session_options;
  At<24, Fallible<OrtSessionOptions*, int>> set_intra_op_num_threads;
  At<30, Fallible<const OrtSession*, std::size_t*>> session_get_input_count;
  At<31, Fallible<const OrtSession*, std::size_t*>> session_get_output_count;
  At<33, Fallible<const OrtSession*, std::size_t, OrtTypeInfo**>> session_get_input_type_info;
  At<34, Fallible<const OrtSession*, std::size_t, OrtTypeInfo**>> session_get_output_type_info;
  At<36, Fallible<const OrtSession*, std::size_t, OrtAllocator*, char**>> session_get_input_name;
  At<37, Fallible<const OrtSession*, std::size_t, OrtAllocator*, char**>> session_get_output_name;
  At<49, Fallible<const OrtMemoryInfo*, void*, std::size_t, const std::int64_t*, std::size_t, int, OrtValue**>>
      create_tensor_with_data_as_ort_value;
  At<51, Fallible<OrtValue*, void**>> get_tensor_mutable_data;
  At<55, Fallible<const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**>> cast_type_info_to_tensor_info;
  At<60, Fallible<const OrtTensorTypeAndShapeInfo*, int*>> get_tensor_element_type;
  At<61, Fallible<const OrtTensorTypeAndShapeInfo*, std::size_t*>> get_dimensions_count;
  At<62, Fallible<const OrtTensorTypeAndShapeInfo*, std::int64_t*, std::size_t>> get_dimensions;
  At<63, Fallible<const OrtTensorTypeAndShapeInfo*, const char**, std::size_t>> get_symbolic_dimensions;
  At<65, Fallible<const OrtValue*, OrtTensorTypeAndShapeInfo**>> get_tensor_type_and_shape;
  At<69, Fallible<int, int, OrtMemoryInfo**>> create_cpu_memory_info;
  At<76, Fallible<OrtAllocator*, void*>> allocator_free;
  At<78, Fallible<OrtAllocator**>> get_allocator_with_default_options;
  At<93, void (*)(OrtStatus*)> release_status;
  At<95, void (*)(OrtSession*)> release_session;
  At<96, void (*)(OrtValue*)> release_value;
  At<98, void (*)(OrtTypeInfo*)> release_type_info;
  At<99, void (*)(OrtTensorTypeAndShapeInfo*)> release_tensor_type_and_shape_info;
  At<100, void (*)(OrtSessionOptions*)> release_session_options;
  At<130, Fallible<OrtSessionOptions*, const char*, const char*>> add_session_config_entry;

  At<279, Fallible<OrtSessionOptions*, const char* const*, char* const*, const std::size_t*, std::size_t>>
      add_external_initializers_from_files_in_memory;

  /// All functions, out of their table.
  static OnnxRuntimeFunctions of(const void* const* table) {
    OnnxRuntimeFunctions all;
    const auto take = [&](auto&... functions) { (functions.take(table), ...); };
    take(all.create_session_from_array, all.add_external_initializers_from_files_in_memory, all.get_error_message,
         all.create_env_with_custom_logger, all.create_session, all.run, all.create_session_options,
         all.set_intra_op_num_threads, all.session_get_input_count, all.session_get_output_count,
         all.session_get_input_type_info, all.session_get_output_type_info, all.session_get_input_name,
         all.session_get_output_name, all.create_tensor_with_data_as_ort_value, all.get_tensor_mutable_data,
         all.cast_type_info_to_tensor_info, all.get_tensor_element_type, all.get_dimensions_count, all.get_dimensions,
         all.get_symbolic_dimensions, all.get_tensor_type_and_shape, all.create_cpu_memory_info, all.allocator_free,
         all.get_allocator_with_default_options, all.release_status, all.release_session, all.release_value,
         all.release_type_info, all.release_tensor_type_and_shape_info, all.release_session_options,
         all.add_session_config_entry);
    return all;
  }
};

/// The start of OrtApiBase.
struct OnnxRuntimeBase {
  const void* const* (*get_api)(std::uint32_t version);
  const char* (*get_version_string)();
};

}  // namespace stca::core
