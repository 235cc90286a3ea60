#include "tables.hpp"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <system_error>
#include <utility>

#include "digest.hpp"
#include "error.hpp"

namespace stca::core {
namespace {

/// Tables up to this size are checked as a whole at load.
constexpr std::size_t checked_at_load = std::size_t{1} << 30;
constexpr std::size_t digest_bytes = 32;

/// The number of each byte: an int8's, or E4M3's (4 bits of exponent, of bias 7, and 3 of mantissa).
std::array<float, 256> byte_levels(DType dtype) {
  std::array<float, 256> levels{};
  for (int byte = 0; byte < 256; ++byte) {
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    float size = std::ldexp(static_cast<float>(exponent > 0 ? 8 + mantissa : mantissa), std::max(exponent, 1) - 10);
    if ((byte & 127) == 127) size = std::numeric_limits<float>::quiet_NaN();
    const float small = byte > 127 ? -size : size;
    levels[static_cast<std::size_t>(byte)] =
        dtype == STCA_FLOAT8_E4M3 ? small : static_cast<float>(static_cast<std::int8_t>(byte));
  }
  return levels;
}

/// A table of a bundle, mapped. Safe to use from several threads.
class TableFile final : public RowSource {
 public:
  TableFile(const Folder& folder, const TableSpec& table) : root_(shown(folder.path().string())), table_(table) {
    folder.read(table.digests, [&](std::string_view piece) { digests_ += piece; });
    check_size(table.digests, digests_.size(), static_cast<std::size_t>(table.blocks()) * digest_bytes);
    check_size(table.file, folder.size_of(table.file), table.bytes());
    file_ = folder.open(table.file);
    void* const mapped = ::mmap(nullptr, table.bytes(), PROT_READ, MAP_SHARED, file_, 0);
    if (mapped == MAP_FAILED) {
      const int error = errno;
      ::close(file_);
      bundle_error(root_, ": ", shown(table.file), " cannot be mapped (", std::generic_category().message(error), ")");
    }
    rows_ = static_cast<const std::byte*>(mapped);
    while ((std::int64_t{1} << shift_) < table.block_rows) ++shift_;
    unchecked_ = std::vector<std::atomic<bool>>(static_cast<std::size_t>(table.blocks()));
    // A smaller one was checked when its bundle was loaded.
    for (auto& block : unchecked_) block = table.bytes() > checked_at_load;
  }
  TableFile(const TableFile&) = delete;
  TableFile& operator=(const TableFile&) = delete;
  ~TableFile() override {
    ::munmap(const_cast<std::byte*>(rows_), table_.bytes());
    ::close(file_);
  }

  Array rows(const TableSpec&, const std::vector<std::int64_t>& ids) override {
    const bool scaled = table_.has_scales();
    auto [found, to] = make_array(Memory::host(), scaled ? STCA_FLOAT32 : table_.dtype,
                                  {static_cast<std::int64_t>(ids.size()), table_.width});
    // The system ends a process that looks behind the end of a mapped file.
    struct stat now {};
    check_size(table_.file, ::fstat(file_, &now) == 0 ? static_cast<std::size_t>(now.st_size) : 0, table_.bytes());
    const std::size_t bytes = table_.row_bytes();
    for (const std::int64_t id : ids) {
      if (const auto block = static_cast<std::size_t>(id >> shift_); unchecked_[block]) {
        check_block(static_cast<std::int64_t>(block));
        unchecked_[block] = false;
      }
      const std::byte* const row = rows_ + static_cast<std::size_t>(id) * bytes;
      if (scaled) {
        scale_row(row, reinterpret_cast<float*>(to));
        to += static_cast<std::size_t>(table_.width) * sizeof(float);
      } else {
        std::memcpy(to, row, bytes);
        to += bytes;
      }
    }
    return converted(found, STCA_FLOAT32);
  }

  /// Holds every block against its digest.
  void check() const {
    for (std::int64_t block = 0; block < table_.blocks(); ++block) check_block(block);
  }

 private:
  /// A row of 8-bit numbers, times its scale.
  void scale_row(const std::byte* row, float* to) const {
    const auto width = static_cast<std::size_t>(table_.width);
    float scale = 0;
    std::memcpy(&scale, row + width, sizeof scale);  // at any address
    for (std::size_t i = 0; i < width; ++i) to[i] = levels_[static_cast<std::size_t>(row[i])] * scale;
  }

  void check_size(const std::string& file, std::size_t size, std::size_t needed) const {
    if (size == needed) return;
    bundle_error(root_, ": ", shown(file), " has ", size, " bytes, table ", in_quotes(table_.name), " needs ", needed,
                 "; copy it again");
  }

  void check_block(std::int64_t block) const {
    const std::int64_t begin = block * table_.block_rows, end = std::min(begin + table_.block_rows, table_.rows);
    // Read and not looked at in the map: whole blocks would count as this process's memory ever after.
    std::string bytes(static_cast<std::size_t>(end - begin) * table_.row_bytes(), '\0');
    std::size_t done = 0;
    while (done < bytes.size()) {
      const auto at = static_cast<off_t>(static_cast<std::size_t>(begin) * table_.row_bytes() + done);
      const ssize_t got = ::pread(file_, bytes.data() + done, bytes.size() - done, at);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) break;
      done += static_cast<std::size_t>(got);
    }
    Sha256 sha;
    sha.update(bytes.data(), done);
    std::string digest;
    for (std::size_t i = 0; i < digest_bytes; ++i) {
      const auto byte = static_cast<unsigned char>(digests_[static_cast<std::size_t>(block) * digest_bytes + i]);
      digest += "0123456789abcdef"[byte >> 4];
      digest += "0123456789abcdef"[byte & 15];
    }
    if (sha.hex() == digest) return;
    bundle_error(root_, ": ", shown(table_.file), " was changed: block ", block, " of table ", in_quotes(table_.name),
                 ", rows ", begin, " to ", end - 1, "; copy it again");
  }

  const std::string root_;
  const TableSpec table_;
  std::string digests_;
  int file_ = -1;
  const std::byte* rows_ = nullptr;
  const std::array<float, 256> levels_ = byte_levels(table_.dtype);  // of an 8-bit number's byte
  int shift_ = 0;                                                    // of a row's number, to its block's
  std::vector<std::atomic<bool>> unchecked_;  // by block
};

/// Ids as row numbers: negative ones count from the end, as in ONNX.
std::vector<std::int64_t> row_numbers(const TableSpec& table, const Array& ids) {
  std::vector<std::int64_t> numbers(ids.shape.elements());
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const std::int64_t id = integer_at(ids, i);
    if (id < -table.rows || id >= table.rows) {
      request_error("table ", in_quotes(table.name), ": is asked for row ", id, "; it must be in [", -table.rows, ", ",
                    table.rows - 1, "]");
    }
    numbers[i] = id < 0 ? id + table.rows : id;
  }
  return numbers;
}

class TableEngine final : public Engine {
 public:
  TableEngine(std::shared_ptr<const Bundle> bundle, const std::string& graph, std::unique_ptr<Engine> engine,
              std::unique_ptr<Engine> ids, const std::map<std::string, std::shared_ptr<RowSource>>& sources)
      : bundle_(std::move(bundle)),
        graph_(bundle_->manifest.graph(graph)),
        engine_(std::move(engine)),
        ids_(std::move(ids)) {
    for (const Lookup& lookup : graph_.lookups) {
      for (const TableSpec& table : bundle_->manifest.tables) {
        if (table.name == lookup.table) uses_.push_back({&table, sources.at(table.name), place_of(lookup.ids)});
      }
    }
    for (const TensorSpec& spec : ids_ == nullptr ? std::vector<TensorSpec>{} : ids_->spec().inputs) {
      const std::size_t place = index_of(graph_.inputs, spec.name);
      if (place == graph_.inputs.size()) {
        bundle_error(shown(graph_.ids), ": takes ", in_quotes(spec.name), ", which is no input; export the bundle again");
      }
      takes_.push_back(place);
    }
  }

  std::string name() const override { return engine_->name(); }
  const GraphSpec& spec() const override { return graph_; }
  RunSize largest_run() const override { return engine_->largest_run(); }
  Memory& memory() override { return engine_->memory(); }

  std::vector<Array> run(const std::vector<Array>& inputs) override {
    std::vector<Array> computed;
    if (ids_ != nullptr) {
      std::vector<Array> given;
      for (const std::size_t place : takes_) given.push_back(inputs[place]);
      computed = ids_->run(given);
    }
    std::vector<Array> all = inputs;
    for (const Use& use : uses_) {
      const bool is_input = use.place < inputs.size();
      all.push_back(rows(use, is_input ? inputs[use.place] : computed[use.place - inputs.size()]));
    }
    return engine_->run(all);
  }

 private:
  /// A look-up: of which table, from where, and where its ids are, among the inputs and then what is computed.
  struct Use {
    const TableSpec* table;
    std::shared_ptr<RowSource> source;
    std::size_t place;
  };

  static std::size_t index_of(const std::vector<TensorSpec>& specs, const std::string& name) {
    const auto found = std::find_if(specs.begin(), specs.end(), [&](const TensorSpec& s) { return s.name == name; });
    return static_cast<std::size_t>(found - specs.begin());
  }

  std::size_t place_of(const std::string& ids) const {
    const std::size_t place = index_of(graph_.inputs, ids);
    if (place < graph_.inputs.size()) return place;
    const std::vector<TensorSpec>& made = ids_->spec().outputs;
    const std::size_t at = index_of(made, ids);
    if (at == made.size() || kind_of(made[at].dtype) != Kind::integer) {
      bundle_error(shown(graph_.ids), ": gives no ids ", in_quotes(ids), "; export the bundle again");
    }
    return place + at;
  }

  static Array rows(const Use& use, const Array& ids) {
    const std::vector<std::int64_t> numbers = row_numbers(*use.table, ids);
    Array found = use.source->rows(*use.table, numbers);
    found.shape = ids.shape;
    if (found.shape.rank >= STCA_MAX_RANK) engine_error("ids of table ", in_quotes(use.table->name), " have too many axes");
    found.shape[found.shape.rank++] = use.table->width;
    return found;
  }

  std::shared_ptr<const Bundle> bundle_;  // where graph_ and the tables live
  const GraphSpec& graph_;
  std::unique_ptr<Engine> engine_, ids_;
  std::vector<Use> uses_;
  std::vector<std::size_t> takes_;  // of each input of `ids_`, its place among the graph's
};

}  // namespace

void check_table(const Folder& folder, const TableSpec& table) {
  const TableFile file(folder, table);
  if (table.bytes() <= checked_at_load) file.check();
}

std::map<std::string, std::shared_ptr<RowSource>> row_sources(
    const Bundle& bundle, const std::map<std::string, std::shared_ptr<RowSource>>& own) {
  std::map<std::string, std::shared_ptr<RowSource>> sources;
  std::string known;
  for (const TableSpec& table : bundle.manifest.tables) {
    const auto found = own.find(table.name);
    sources[table.name] =
        found != own.end() ? found->second : std::make_shared<TableFile>(*bundle.folder, table);
    known += (known.empty() ? "" : ", ") + table.name;
  }
  for (const auto& [name, source] : own) {
    if (sources.count(name) == 0) {
      fail(STCA_USAGE_ERROR, "tables: the bundle has no table ", in_quotes(name), " outside its graphs; it has ",
           known.empty() ? "none" : shown(known));
    }
  }
  return sources;
}

std::unique_ptr<Engine> with_tables(const std::shared_ptr<const Bundle>& bundle, const std::string& graph,
                                    std::unique_ptr<Engine> engine, std::unique_ptr<Engine> ids,
                                    const std::map<std::string, std::shared_ptr<RowSource>>& sources) {
  return std::make_unique<TableEngine>(bundle, graph, std::move(engine), std::move(ids), sources);
}

}  // namespace stca::core
