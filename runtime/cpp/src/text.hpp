// Others' text in our messages: quoted, cut and on one line, the same as in Python.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace stca::core {

/// Text of a client's as Python's `repr` writes it, cut to 70 characters. What Unicode has not assigned passes.
std::string in_quotes(std::string_view text);
std::string in_quotes(const char* text);

/// The first `most` characters of valid UTF-8.
std::string_view head(std::string_view text, std::size_t most);

/// `; did you mean 'hist'?` of the nearest of the names, by the rule of Python's `stca.near`; empty where none is near.
std::string did_you_mean(std::string_view name, const std::vector<std::string>& known);

/// A message without what would end or overwrite its line, its middle left out beyond 900 characters.
std::string one_line(std::string_view text);

/// A number in the fewest digits that give it back, as Python writes it: 70000.0, 1e+300, -inf.
std::string number_text(double value);
/// The same, of the fewest digits that give a float back.
std::string number_text(float value);

}  // namespace stca::core
