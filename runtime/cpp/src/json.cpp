#include "json.hpp"

#include <algorithm>
#include <charconv>

namespace stca::core {
namespace {

constexpr int max_depth = 64;

bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// Bytes of the UTF-8 character that `text` starts with; 0 when it is malformed, overlong, a surrogate or too large.
std::size_t utf8_length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  const std::size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || text.size() < length) return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  const unsigned char second = byte(1);
  if ((first == 0xE0 && second < 0xA0) || (first == 0xED && second > 0x9F) || (first == 0xF0 && second < 0x90) ||
      (first == 0xF4 && second > 0x8F)) {
    return 0;
  }
  return length;
}

/// Of a number that is too large or too small: whether it is the latter.
bool tiny(std::string_view number) {
  if (number.find_first_of("eE") == std::string_view::npos) return number[number[0] == '-' ? 1 : 0] == '0';
  return number.find("e-") != std::string_view::npos || number.find("E-") != std::string_view::npos;
}

void append_utf8(std::string& out, unsigned code) {
  const auto tail = [&](int shift) { out += static_cast<char>(0x80 | ((code >> shift) & 0x3F)); };
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | (code >> 6));
    tail(0);
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | (code >> 12));
    tail(6), tail(0);
  } else {
    out += static_cast<char>(0xF0 | (code >> 18));
    tail(12), tail(6), tail(0);
  }
}

}  // namespace

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json document() {
    Json result = value(0);
    space();
    if (at_ != text_.size()) error("something follows the value");
    return result;
  }

 private:
  [[noreturn]] void error(const char* what) const {
    throw JsonError(std::string(what) + " at byte " + std::to_string(at_));
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(char c) {
    if (at_ < text_.size() && text_[at_] == c) {
      ++at_;
      return true;
    }
    return false;
  }

  void space() {
    while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != std::string_view::npos) ++at_;
  }

  bool word(std::string_view w) {
    if (text_.substr(at_, w.size()) != w) return false;
    at_ += w.size();
    return true;
  }

  Json value(int depth) {
    if (depth > max_depth) error("nested too deeply");
    space();
    Json result;
    if (take('{')) {
      result.value_ = object(depth);
    } else if (take('[')) {
      result.value_ = list(depth);
    } else if (take('"')) {
      result.value_ = string();
    } else if (word("true")) {
      result.value_ = true;
    } else if (word("false")) {
      result.value_ = false;
    } else if (word("null")) {
      result.value_ = nullptr;
    } else if (peek() == '-' || is_digit(peek())) {
      number(result);
    } else {
      error("expected a value");
    }
    return result;
  }

  Json::Object object(int depth) {
    Json::Object members;
    space();
    if (take('}')) return members;
    do {
      space();
      if (!take('"')) error("expected a name");
      std::string name = string();
      space();
      if (!take(':')) error("expected ':'");
      Json item = value(depth + 1);
      members.push_back({std::move(name), std::move(item)});
      space();
    } while (take(','));
    if (!take('}')) error("expected ',' or '}'");
    std::vector<std::string_view> names;
    for (const Json::Member& m : members) names.emplace_back(m.name);
    std::sort(names.begin(), names.end());
    if (std::adjacent_find(names.begin(), names.end()) != names.end())
      error("a name comes twice in the object that ends");
    return members;
  }

  Json::List list(int depth) {
    Json::List items;
    space();
    if (take(']')) return items;
    do {
      items.push_back(value(depth + 1));
      space();
    } while (take(','));
    if (!take(']')) error("expected ',' or ']'");
    return items;
  }

  std::string string() {
    std::string out;
    while (true) {
      if (at_ >= text_.size()) error("a string does not end");
      if (take('"')) return out;
      if (take('\\')) {
        escape(out);
        continue;
      }
      if (static_cast<unsigned char>(text_[at_]) < 0x20) error("a control character in a string");
      const std::size_t length = utf8_length(text_.substr(at_));
      if (length == 0) error("not UTF-8");
      out += text_.substr(at_, length);
      at_ += length;
    }
  }

  void escape(std::string& out) {
    static constexpr std::string_view letters = "\"\\/bfnrt", values = "\"\\/\b\f\n\r\t";
    const char c = peek();
    if (const std::size_t i = letters.find(c); i != std::string_view::npos) {
      ++at_;
      out += values[i];
      return;
    }
    if (!take('u')) error("an unknown escape");
    unsigned code = hex4();
    if (code >= 0xDC00 && code < 0xE000) error("half a surrogate pair");
    if (code >= 0xD800 && code < 0xDC00) {
      if (!word("\\u")) error("half a surrogate pair");
      const unsigned low = hex4();
      if (low < 0xDC00 || low >= 0xE000) error("half a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(out, code);
  }

  unsigned hex4() {
    unsigned code = 0;
    const std::string_view digits = text_.substr(at_, 4);
    const auto [end, status] = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (digits.size() != 4 || status != std::errc() || end != digits.data() + 4) error("expected four hex digits");
    at_ += 4;
    return code;
  }

  void digits() {
    if (!is_digit(peek())) error("expected a digit");
    while (is_digit(peek())) ++at_;
  }

  void number(Json& result) {
    const std::size_t begin = at_;
    bool whole = true;
    take('-');
    if (!take('0')) digits();
    if (take('.')) {
      whole = false;
      digits();
    }
    if (take('e') || take('E')) {
      whole = false;
      if (!take('+')) take('-');
      digits();
    }
    const char* const first = text_.data() + begin;
    const char* const last = text_.data() + at_;
    std::int64_t integer = 0;
    if (whole && std::from_chars(first, last, integer).ec == std::errc()) {
      result.value_ = integer;
      return;
    }
    double real = 0;
    // Out of range is either end. What is too small reads as 0; what is too large would be an infinity.
    if (std::from_chars(first, last, real).ec == std::errc::result_out_of_range && !tiny({first, at_ - begin})) {
      error("a number is too large");
    }
    result.value_ = real;
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonReader(text).document(); }

bool Json::number(double& out) const {
  if (const auto* i = integer()) {
    out = static_cast<double>(*i);
    return true;
  }
  const auto* real = std::get_if<double>(&value_);
  if (real != nullptr) out = *real;
  return real != nullptr;
}

const Json* Json::find(std::string_view name) const {
  if (const Object* members = object()) {
    for (const Member& m : *members) {
      if (m.name == name) return &m.value;
    }
  }
  return nullptr;
}

}  // namespace stca::core
