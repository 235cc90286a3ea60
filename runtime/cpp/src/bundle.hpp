// The deployment artifact, checked before anything else sees its files. docs/bundle_format.md specifies it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "folder.hpp"
#include "tensor.hpp"

namespace stca::core {

/// One axis: a fixed size, or the name of one that each request decides.
struct Axis {
  std::int64_t size = -1;
  std::string symbol;  ///< empty when fixed
};

/// Symbols whose rows can be joined with other requests' rows in a ragged batch.
inline constexpr std::string_view tokens_symbol = "N_h", targets_symbol = "N_t", users_symbol = "B",
                                  offsets_symbol = "B_plus_1";

/// One input or output of a graph.
struct TensorSpec {
  std::string name;
  DType dtype = STCA_INT64;
  std::vector<Axis> shape;
  stca_scope scope = STCA_NO_SCOPE;  ///< where an input's values come from; none for outputs and states
  std::int64_t limit = 0;            ///< ids are in [low, limit); 0 when any value will do
  std::optional<std::int64_t> low;   ///< the least valid integer; nothing is 0 where there is a limit
  std::string length_of;             ///< the dimension whose rows the value counts; empty when it counts none
  std::optional<std::int64_t> blank; ///< what stands for no event, where the model has no score for it alone

  /// Whether the first axis has this symbol.
  bool rows_are(std::string_view symbol) const { return !shape.empty() && shape[0].symbol == symbol; }
  /// Whether any axis has this symbol.
  bool counts(std::string_view symbol) const;
  /// "[N_h, 2]".
  std::string shape_text() const;
};

inline const char* scope_name(stca_scope scope) {
  return scope == STCA_USER ? "user" : scope == STCA_REQUEST ? "request" : "target";
}

/// One tensor of a user state: leaves the user encoder and enters the target scorer under its name.
struct StateSpec : TensorSpec {
  std::optional<std::string> input;  ///< the user input it is a copy of
  bool is_sum = false;               ///< over all history tokens, so that new tokens' is added to it
};

/// An input with an entry for each event of a history that is not packed.
struct EventInput {
  std::string name;
  int axis = 0;                       ///< along which its entries lie, 0 or 1
  std::int64_t value = 0;             ///< what places without an event hold
  std::optional<std::int64_t> event;  ///< of a mask: what places with an event hold when it is left out
};

enum class Side { none, left, right };

/// A history that is not packed, and how a shorter one is brought to the model's length.
struct Padding {
  std::vector<EventInput> inputs;
  Side side = Side::none;
  std::string lengths;  ///< the input with the number of events; empty for none
};

/// Rows that a graph's file takes as an input, in place of the ids that its inputs have.
struct Lookup {
  std::string rows;   ///< the input of the file, float32, of the ids' shape and one axis more
  std::string table;  ///< the table's name
  std::string ids;    ///< an input of the graph or, where they are computed, an output of its `ids` graph
};

struct GraphSpec {
  std::string file;
  std::vector<TensorSpec> inputs, outputs;  ///< with look-ups, the file may lack inputs that were ids alone
  std::vector<Lookup> lookups;
  std::string ids;  ///< file of the graph that computes ids; empty where all are inputs
};

/// An embedding table that left the graphs.
struct TableSpec {
  std::string name, file, digests;
  DType dtype = STCA_FLOAT32;  ///< of the file's elements; rows are looked up as float32
  std::int64_t rows = 0, width = 0, block_rows = 0;

  /// Rows of 8-bit numbers end in the float32 that these are multiplied with.
  bool has_scales() const { return item_bytes(dtype) == 1; }
  std::size_t row_bytes() const {
    return static_cast<std::size_t>(width) * item_bytes(dtype) + (has_scales() ? sizeof(float) : 0);
  }
  std::size_t bytes() const { return static_cast<std::size_t>(rows) * row_bytes(); }
  std::int64_t blocks() const { return (rows + block_rows - 1) / block_rows; }
};

struct FileEntry {
  std::int64_t bytes = 0;
  std::string sha256;
};

/// Smallest and largest size of each symbol that an optimization profile admits.
using Profile = std::map<std::string, std::pair<std::int64_t, std::int64_t>>;

/// An engine that `stca build` put into the bundle. What follows `provider` is read of TensorRT plans alone.
struct EngineEntry {
  std::string graph, flavour, file, precision;
  std::int64_t sm = 0;        ///< compute capability, 90 for 9.0; 0 where the engine is for none
  std::string provider;       ///< of ONNX Runtime
  std::string lowering;       ///< how the operator got into it; empty in a half that has none
  std::string version;        ///< of the library that built it, "11.4.0.106"
  std::int64_t requests = 0;  ///< most requests of one run; 0 for no limit
  GraphSpec spec;             ///< inputs and outputs in the engine's own types, which may be narrower than the graph's
  std::vector<Profile> profiles;
  std::vector<std::string> padded;  ///< symbols that count rows: such as the offsets leave out change no other row
};

/// The graph that makes a longer history's state of new events and kept sums.
inline constexpr const char* user_grower = "user_grower";
/// The target scorer for a history in several pieces, which Python alone opens.
inline constexpr const char* pieces_scorer = "pieces_scorer";

struct Manifest {
  std::string text;  ///< the file as it is
  std::string weights;
  std::string precision;
  std::map<std::string, GraphSpec, std::less<>> graphs;
  std::vector<StateSpec> state;
  bool appendable = false;
  std::optional<std::int64_t> max_history;
  std::vector<Padding> padding;
  std::int64_t min_history = 0;
  std::vector<EngineEntry> engines;
  std::vector<TableSpec> tables;
  std::map<std::string, FileEntry> files;

  /// Throws BundleError when the text is not ours, newer than this library, or lacks a field or has a wrong one.
  static Manifest parse(std::string text);
  const GraphSpec& graph(const std::string& name) const { return graphs.at(name); }
  /// Whether states hold sums over events, to which the user grower adds new ones.
  bool grows() const { return graphs.count(user_grower) != 0; }
};

struct Bundle {
  std::filesystem::path path;
  Manifest manifest;
  std::shared_ptr<const Folder> folder;            ///< held open, so that its files stay those that were checked
  std::map<std::string, std::string, std::less<>> graph_files;  ///< path of each graph's ONNX file, through `folder`

  /// Reads the manifest and holds every file against it. Throws BundleError.
  static std::shared_ptr<const Bundle> load(const std::filesystem::path& path);
  /// The same of a folder that is open; whoever reads a file again asks `folder` whether all are still the same.
  static std::shared_ptr<const Bundle> read(const std::shared_ptr<const Folder>& folder);
};

}  // namespace stca::core
