#include "text.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <locale>
#include <sstream>
#include <utility>

namespace stca::core {
namespace {

constexpr std::uint32_t no_code = 0xFFFFFFFF;

/// One character of UTF-8, or one byte that begins none.
struct Character {
  std::string_view bytes;
  std::uint32_t code = no_code;
};

Character first_of(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<std::uint32_t>(static_cast<unsigned char>(text[i])); };
  const std::uint32_t lead = byte(0);
  if (lead < 0x80) return {text.substr(0, 1), lead};
  const std::size_t size = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || text.size() < size) return {text.substr(0, 1)};
  std::uint32_t code = lead & (0xFFu >> (size + 1));
  for (std::size_t i = 1; i < size; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return {text.substr(0, 1)};
    code = code << 6 | (byte(i) & 0x3F);
  }
  constexpr std::uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
  if (code < least[size] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) return {text.substr(0, 1)};
  return {text.substr(0, size), code};
}

/// Spaces that are no plain one, controls, marks of direction and width, codes of private use.
bool printable(std::uint32_t code) {
  struct Range {
    std::uint32_t first, last;
  };
  constexpr Range hidden[] = {{0, 0x1F},          {0x7F, 0xA0},       {0xAD, 0xAD},        {0x600, 0x605},
                              {0x61C, 0x61C},     {0x1680, 0x1680},   {0x180E, 0x180E},    {0x2000, 0x200F},
                              {0x2028, 0x202F},   {0x205F, 0x206F},   {0x3000, 0x3000},    {0xD800, 0xF8FF},
                              {0xFEFF, 0xFEFF},   {0xFFF0, 0xFFFB},   {0xE0000, 0xE00FF},  {0xF0000, no_code}};
  return std::none_of(std::begin(hidden), std::end(hidden),
                      [&](const Range& range) { return code >= range.first && code <= range.last; });
}

bool space(std::uint32_t code) {
  return (code >= 9 && code <= 13) || (code >= 0x1C && code <= 0x20) || code == 0x85 || code == 0xA0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 || code == 0x202F ||
         code == 0x205F || code == 0x3000;
}

void hexadecimal(std::string& to, const char* prefix, std::uint32_t value, int digits) {
  to += prefix;
  for (int i = digits - 1; i >= 0; --i) to += "0123456789abcdef"[value >> (4 * i) & 15];
}

void escaped(std::string& to, const Character& c) {
  const std::uint32_t code = c.code == no_code ? static_cast<unsigned char>(c.bytes[0]) : c.code;
  switch (code) {
    case '\n': to += "\\n"; return;
    case '\r': to += "\\r"; return;
    case '\t': to += "\\t"; return;
    default: break;
  }
  if (code < 0x100) return hexadecimal(to, "\\x", code, 2);
  code < 0x10000 ? hexadecimal(to, "\\u", code, 4) : hexadecimal(to, "\\U", code, 8);
}

/// The last `most` characters of valid UTF-8.
std::string_view tail(std::string_view text, std::size_t most) {
  std::size_t begin = text.size();
  while (begin > 0 && most > 0) {
    if ((static_cast<unsigned char>(text[--begin]) & 0xC0) != 0x80) --most;
  }
  return text.substr(begin);
}

std::string python_text(double value, int most_digits, bool (*same)(const std::string&, double)) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  const double size = std::fabs(value);
  const bool fixed = size == 0 || (size >= 1e-4 && size < 1e16);
  std::string text;
  for (int digits = 1; digits <= most_digits; ++digits) {
    std::ostringstream out;
    out.imbue(std::locale::classic());
    out.precision(digits - 1);
    out << std::scientific << value;
    text = out.str();
    if (!same(text, value)) continue;
    if (!fixed) return text;
    const int exponent = std::atoi(text.c_str() + text.find('e') + 1);
    std::ostringstream plain;
    plain.imbue(std::locale::classic());
    plain.precision(std::max(1, digits - 1 - exponent));
    plain << std::fixed << value;
    return plain.str();
  }
  return text;
}

template <class T>
bool reads_back(const std::string& text, double value) {
  std::istringstream in(text);
  in.imbue(std::locale::classic());
  T read{};
  return in >> read && static_cast<double>(read) == value;
}

/// The first 60 characters, without capitals.
std::string lowered(std::string_view text) {
  std::string made(text.substr(0, 60));
  for (char& c : made) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return made;
}

/// Letters to change, leave out or put in to make one of the other (Levenshtein's distance).
std::size_t distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j < row.size(); ++j) row[j] = j;
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t before = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t changed = before + (a[i] == b[j] ? 0 : 1);
      before = row[j + 1];
      row[j + 1] = std::min({before + 1, row[j] + 1, changed});
    }
  }
  return row[b.size()];
}

}  // namespace

std::string_view head(std::string_view text, std::size_t most) {
  std::size_t end = 0;
  while (end < text.size() && most-- > 0) end += first_of(text.substr(end)).bytes.size();
  return text.substr(0, end);
}

std::string in_quotes(std::string_view text) {
  text = head(text, 60);
  const char quote = text.find('\'') != text.npos && text.find('"') == text.npos ? '"' : '\'';
  std::string line(1, quote);
  std::size_t characters = 2;
  std::string cut;  // the first 69 characters, once there are more
  while (!text.empty()) {
    const Character c = first_of(text);
    text.remove_prefix(c.bytes.size());
    std::string next;
    if (c.code == static_cast<unsigned char>(quote) || c.code == '\\') {
      (next += '\\') += static_cast<char>(c.code);
    } else if (c.code == no_code || !printable(c.code)) {
      escaped(next, c);
    } else {
      next = c.bytes;
    }
    line += next;
    characters += next.size() > 1 && next[0] == '\\' ? next.size() : 1;
  }
  line += quote;
  return characters <= 70 ? line : std::string(head(line, 69)) + "…";
}

std::string in_quotes(const char* text) { return text == nullptr ? "None" : in_quotes(std::string_view(text)); }

std::string one_line(std::string_view text) {
  std::string line;
  std::size_t characters = 0;
  bool clean = true;
  for (std::string_view rest = text; clean && !rest.empty();) {
    const Character c = first_of(rest);
    clean = c.code != no_code && printable(c.code);
    rest.remove_prefix(c.bytes.size());
    ++characters;
  }
  if (clean) {
    line = text;
  } else {
    characters = 0;
    bool between = false;
    while (!text.empty()) {
      const Character c = first_of(text);
      text.remove_prefix(c.bytes.size());
      if (c.code != no_code && space(c.code)) {
        between = !line.empty();
        continue;
      }
      if (std::exchange(between, false)) line += ' ', ++characters;
      const std::size_t before = line.size();
      if (c.code == no_code || !printable(c.code)) {
        escaped(line, c);
        characters += line.size() - before;
      } else {
        line += c.bytes;
        ++characters;
      }
    }
  }
  if (characters <= 900) return line;
  return std::string(head(line, 440)) + " … " + std::string(tail(line, 440));
}

std::string number_text(double value) { return python_text(value, 17, reads_back<double>); }
std::string number_text(float value) { return python_text(static_cast<double>(value), 9, reads_back<float>); }

std::string did_you_mean(std::string_view name, const std::vector<std::string>& known) {
  const std::string asked = lowered(name);
  std::size_t least = std::max<std::size_t>(1, asked.size() / 3) + 1;
  const std::string* found = nullptr;
  for (const std::string& one : known) {
    const std::size_t far = distance(asked, lowered(one));
    if (far < least) least = far, found = &one;
  }
  return found == nullptr ? "" : "; did you mean " + in_quotes(*found) + "?";
}

}  // namespace stca::core
