#include "padding.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "error.hpp"
#include "visit.hpp"

namespace stca::core {
namespace {

const TensorSpec* find(const std::vector<TensorSpec>& specs, const std::string& name) {
  const auto found = std::find_if(specs.begin(), specs.end(), [&](const TensorSpec& s) { return s.name == name; });
  return found == specs.end() ? nullptr : &*found;
}

/// Whether a value can be one of a type; of a float, integers that it has without a doubt.
bool holds_value(DType dtype, std::int64_t value) {
  if (kind_of(dtype) == Kind::boolean) return value == 0 || value == 1;
  if (kind_of(dtype) == Kind::floating) return -(1 << 15) <= value && value <= (1 << 15);
  bool holds = false;
  visit_integer(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr auto most = static_cast<std::uint64_t>(std::numeric_limits<T>::max());
    holds = value < 0 ? static_cast<std::int64_t>(std::numeric_limits<T>::min()) <= value
                      : static_cast<std::uint64_t>(value) <= most;
  });
  return holds;
}

[[noreturn]] void malformed(const std::string& name, const char* why) {
  bundle_error("manifest.json is malformed (padding: '", shown(name), "' ", why, "); export the bundle again");
}

Shape shape_of(const TensorSpec& spec) {
  Shape shape;
  for (const Axis& axis : spec.shape) shape[shape.rank++] = axis.symbol.empty() ? axis.size : 1;
  return shape;
}

/// An array of one value.
NewArray filled(DType dtype, const Shape& shape, std::int64_t value) {
  NewArray made = make_array(Memory::host(), dtype, shape);
  const std::size_t count = shape.elements();
  if (kind_of(dtype) == Kind::boolean) {
    std::memset(made.data, value != 0 ? 1 : 0, count);
  } else if (kind_of(dtype) == Kind::integer) {
    visit_integer(dtype, [&](auto type) {
      using T = decltype(type);
      std::fill_n(reinterpret_cast<T*>(made.data), count, static_cast<T>(value));
    });
  } else {
    visit_floating(dtype, [&](auto type) {
      using T = decltype(type);
      std::fill_n(reinterpret_cast<T*>(made.data), count, from_double<T>(static_cast<double>(value)));
    });
  }
  return made;
}

/// Bytes of one event's entry, in an array whose axis before that of the events is 1.
std::size_t entry_bytes(const Array& array, int axis) {
  std::size_t bytes = item_bytes(array.dtype);
  for (int i = axis + 1; i < array.shape.rank; ++i) bytes *= static_cast<std::size_t>(array.shape[i]);
  return bytes;
}

/// Whether the entry at a place is the padding of an integer input, and nothing else.
bool holds(const Array& array, int axis, std::int64_t place, std::int64_t value) {
  const std::size_t entry = entry_bytes(array, axis) / item_bytes(array.dtype);
  for (std::size_t i = 0; i < entry; ++i) {
    if (integer_at(array, static_cast<std::size_t>(place) * entry + i) != value) return false;
  }
  return true;
}

}  // namespace

void check_padding(const Manifest& manifest) {
  const std::vector<TensorSpec>& inputs = manifest.graph("request").inputs;
  for (const Padding& padding : manifest.padding) {
    if (std::all_of(padding.inputs.begin(), padding.inputs.end(), [](const EventInput& e) { return e.event; })) {
      malformed(padding.lengths, "counts a history that has no inputs but masks");
    }
    const Axis* first = nullptr;
    for (const EventInput& event : padding.inputs) {
      const TensorSpec* spec = find(inputs, event.name);
      if (spec == nullptr || spec->scope != STCA_USER) malformed(event.name, "is no user input of the request graph");
      const auto axis = static_cast<std::size_t>(event.axis);
      if (event.axis > 1 || axis >= spec->shape.size()) malformed(event.name, "has no such axis");
      const Axis& size = spec->shape[axis];
      if (first != nullptr && (size.size != first->size || size.symbol != first->symbol)) {
        malformed(event.name, "has another size than the history's other inputs");
      }
      first = &size;
      for (const std::int64_t value : {event.value, event.event.value_or(event.value)}) {
        if (holds_value(spec->dtype, value)) continue;
        const std::string why = std::string("is ") + dtype_name(spec->dtype) + ", which does not hold ";
        malformed(event.name, (why + std::to_string(value)).c_str());
      }
    }
    if (padding.lengths.empty()) continue;
    const TensorSpec* lengths = find(inputs, padding.lengths);
    if (lengths == nullptr || lengths->scope != STCA_USER || kind_of(lengths->dtype) != Kind::integer) {
      malformed(padding.lengths, "is no integer user input of the request graph");
    }
  }
}

Array repeated(const Array& value, std::int64_t count) {
  Shape shape{count};
  for (int i = 0; i < value.shape.rank; ++i) shape[shape.rank++] = value.shape[i];
  NewArray made = make_array(Memory::host(), value.dtype, shape);
  for (std::int64_t i = 0; i < count && value.bytes() > 0; ++i) {
    std::memcpy(made.data + static_cast<std::size_t>(i) * value.bytes(), value.data, value.bytes());
  }
  return made.array;
}

History::History(const Padding& padding, const std::vector<TensorSpec>& inputs, std::int64_t least,
                 std::optional<std::int64_t> window, bool truncate)
    : padding_(padding), least_(least), limit_(window), truncate_(truncate) {
  specs_.reserve(padding_.inputs.size() + 1);  // entries point into it
  for (const EventInput& event : padding_.inputs) {
    const TensorSpec* spec = find(inputs, event.name);
    const TensorSpec& own = specs_.emplace_back(*spec);
    entries_.push_back({static_cast<std::size_t>(spec - inputs.data()), &own, &event});
  }
  const Axis& axis = specs_[0].shape[static_cast<std::size_t>(padding_.inputs[0].axis)];
  if (axis.symbol.empty()) {
    size_ = axis.size;
    limit_ = std::min(limit_.value_or(size_), size_);
  }
  if (!padding_.lengths.empty()) {
    const TensorSpec* spec = find(inputs, padding_.lengths);
    lengths_ = static_cast<std::size_t>(spec - inputs.data());
    least_ = std::max(least_, specs_.emplace_back(*spec).low.value_or(0));
  }
}

std::vector<std::size_t> History::inputs() const {
  std::vector<std::size_t> indices;
  for (const Entry& entry : entries_) indices.push_back(entry.index);
  if (lengths_) indices.push_back(*lengths_);
  return indices;
}

void History::complete(Sent& sent) const {
  for (const Entry& entry : entries_) {
    std::optional<Array>& events = sent[entry.index];
    if (events) {
      events = with_all_axes(entry, *events);
    } else if (!entry.event->event) {
      return;  // whoever looks for it says that it is missing
    }
  }
  const std::int64_t count = this->count(sent);
  const auto first =
      std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return sent[e.index].has_value(); });
  const std::int64_t kept = this->kept(count, first->spec->name);
  const bool full = this->full(sent, count);
  for (const Entry& entry : entries_) {
    std::optional<Array>& events = sent[entry.index];
    if (!events) {
      Shape shape = shape_of(*entry.spec);
      shape[entry.event->axis] = count;
      events = filled(entry.spec->dtype, shape, *entry.event->event).array;
    }
    events = padded(entry, *events, count, kept);
  }
  if (lengths_) sent[*lengths_] = length(sent[*lengths_], kept, count, full);
}

Array History::with_all_axes(const Entry& entry, Array raw) const {
  const int rank = static_cast<int>(entry.spec->shape.size()), axis = entry.event->axis;
  const Shape sent_as = raw.shape;
  if (raw.shape.elements() == 0 && raw.shape.rank < rank) {  // an empty list does not say what its entries would be
    raw.shape = shape_of(*entry.spec);
    raw.shape[axis] = 0;
    return raw;
  }
  if (axis == 1 && raw.shape.rank == rank - 1) {
    Shape shape{1};
    for (int i = 0; i < raw.shape.rank; ++i) shape[shape.rank++] = raw.shape[i];
    raw.shape = shape;
  }
  bool fits = raw.shape.rank == rank && (axis == 0 || raw.shape[0] == 1);
  for (int i = axis + 1; fits && i < rank; ++i) {
    const Axis& size = entry.spec->shape[static_cast<std::size_t>(i)];
    fits = !size.symbol.empty() || raw.shape[i] == size.size;
  }
  if (!fits) {
    std::string expected = "[events";
    for (std::size_t i = static_cast<std::size_t>(axis) + 1; i < entry.spec->shape.size(); ++i) {
      const Axis& size = entry.spec->shape[i];
      expected += ", " + (size.symbol.empty() ? std::to_string(size.size) : size.symbol);
    }
    request_error(entry.spec->name, ": has shape ", sent_as.text(), ", expected ", expected, "]");
  }
  return raw;
}

std::int64_t History::count(const Sent& sent) const {
  const Entry* first = nullptr;
  std::int64_t count = 0;
  for (const Entry& entry : entries_) {
    if (!sent[entry.index]) continue;
    const std::int64_t n = sent[entry.index]->shape[entry.event->axis];
    if (first == nullptr) {
      first = &entry, count = n;
    } else if (n != count) {
      request_error(entry.spec->name, ": has ", n, " events, ", first->spec->name, " has ", count,
                    "; send all of each event");
    }
  }
  return count;
}

std::int64_t History::kept(std::int64_t count, const std::string& name) const {
  if (count < least_) request_error(name, ": has ", count, " events, the model needs at least ", least_);
  if (limit_ && count > *limit_) {
    if (!truncate_) {
      request_error(name, ": has ", count, " events, the limit is ", *limit_,
                    "; send the most recent ones, or load the session with truncate=True");
    }
    count = *limit_;
  }
  if (size_ >= 0 && padding_.side == Side::none && count != size_) {
    request_error(name, ": has ", count, " events, the model takes exactly ", size_,
                  "; export it with --pad left or --pad right to serve shorter histories");
  }
  return count;
}

/// Whether the history comes padded by whoever sends it: then its lengths are theirs to say.
bool History::full(const Sent& sent, std::int64_t count) const {
  if (!lengths_ || (size_ >= 0 && size_ != count) || count < 1) return false;
  if (sent[*lengths_] || padding_.side == Side::none) return true;
  const std::int64_t place = padding_.side == Side::left ? 0 : count - 1;
  const Entry* ids = nullptr;
  for (const Entry& entry : entries_) {
    const std::optional<Array>& events = sent[entry.index];
    if (!events || kind_of(events->dtype) != Kind::integer) continue;
    if (!holds(*events, entry.event->axis, place, entry.event->value)) return true;
    if (ids == nullptr) ids = &entry;
  }
  if (ids != nullptr) {
    request_error(padding_.lengths, ": is missing, and ", ids->spec->name,
                  " comes with padding; send both, or the events alone");
  }
  return true;
}

Array History::padded(const Entry& entry, const Array& events, std::int64_t count, std::int64_t kept) const {
  const std::int64_t places = size_ >= 0 ? size_ : kept;
  if (places == count) return events;
  Shape shape = events.shape;
  shape[entry.event->axis] = places;
  NewArray made = filled(events.dtype, shape, entry.event->value);
  const std::size_t bytes = entry_bytes(events, entry.event->axis);
  if (kept > 0 && bytes > 0) {
    const std::int64_t begin = padding_.side == Side::left ? places - kept : 0;
    std::memcpy(made.data + static_cast<std::size_t>(begin) * bytes,
                static_cast<const std::byte*>(events.data) + static_cast<std::size_t>(count - kept) * bytes,
                static_cast<std::size_t>(kept) * bytes);
  }
  return made.array;
}

/// The lengths input: made of the events, or as sent when it tells of as many.
Array History::length(const std::optional<Array>& sent, std::int64_t kept, std::int64_t count, bool full) const {
  const TensorSpec& spec = specs_.back();
  const Shape shape = shape_of(spec);
  if (sent) {
    if (sent->shape.elements() != 1) return *sent;  // refused for its shape, like any other input
    const std::int64_t said = integer_at(*sent, 0);
    if (full && said <= count && count == kept) {
      Array made = *sent;
      made.shape = shape;
      return made;
    }
    if (said != count) {
      request_error(spec.name, ": says ", said, ", but the request has ", count, " events; leave it out");
    }
  }
  return filled(spec.dtype, shape, kept).array;
}

}  // namespace stca::core
