#include "config/json.h"

#include <charconv>
#include <cmath>
#include <cstdlib>

#include "core/error.h"

namespace gemma_cuda {

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json all() {
    Json value = read(0);
    skip_space();
    if (at_ != text_.size()) fail("something follows the value");
    return value;
  }

 private:
  static constexpr int kDeepest = 64;

  [[noreturn]] void fail(const std::string& what) const {
    throw Error::invalid_argument("not valid JSON: " + what + " at byte " + std::to_string(at_));
  }
  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }
  char next() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool take(char c) {
    if (next() != c || at_ == text_.size()) return false;
    ++at_;
    return true;
  }
  void want(char c) {
    if (!take(c)) fail(std::string("there is no '") + c + "'");
  }

  Json read(int depth) {
    if (depth > kDeepest) fail("values nest more than " + std::to_string(kDeepest) + " deep");
    skip_space();
    Json value;
    const size_t begin = at_;
    switch (next()) {
      case '{': read_object(value, depth); break;
      case '[': read_array(value, depth); break;
      case '"':
        value.kind_ = Json::Kind::string;
        value.string_ = read_string();
        break;
      case 't': read_word(value, "true", Json::Kind::boolean); break;
      case 'f': read_word(value, "false", Json::Kind::boolean); break;
      case 'n': read_word(value, "null", Json::Kind::null); break;
      default: read_number(value);
    }
    value.raw_ = std::string(text_.substr(begin, at_ - begin));
    return value;
  }

  void read_word(Json& value, std::string_view word, Json::Kind kind) {
    if (text_.substr(at_, word.size()) != word) fail("there is no value");
    at_ += word.size();
    value.kind_ = kind;
  }

  void read_array(Json& value, int depth) {
    value.kind_ = Json::Kind::array;
    want('[');
    skip_space();
    if (take(']')) return;
    do value.array_.push_back(read(depth + 1));
    while (skip_space(), take(','));
    want(']');
  }

  void read_object(Json& value, int depth) {
    value.kind_ = Json::Kind::object;
    want('{');
    skip_space();
    if (take('}')) return;
    do {
      skip_space();
      std::string name = read_string();
      skip_space();
      want(':');
      value.members_.emplace_back(std::move(name), read(depth + 1));
      skip_space();
    } while (take(','));
    want('}');
  }

  void read_digits() {
    if (next() < '0' || next() > '9') fail("there is no value");
    while (next() >= '0' && next() <= '9') ++at_;
  }
  void read_number(Json& value) {
    value.kind_ = Json::Kind::number;
    take('-');
    if (!take('0')) read_digits();
    if (take('.')) read_digits();
    if (take('e') || take('E')) {
      if (!take('+')) take('-');
      read_digits();
    }
  }

  uint32_t read_hex() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const size_t digit = std::string_view("0123456789abcdef").find(static_cast<char>(next() | 0x20));
      if (digit == std::string_view::npos || (next() < 'A' && next() > '9')) fail("\\u wants four hexadecimal digits");
      code = code << 4 | static_cast<uint32_t>(digit);
    }
    return code;
  }
  static void put_utf8(std::string& out, uint32_t code) {
    if (code < 0x80) {
      out += static_cast<char>(code);
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    out += static_cast<char>((0xFF00 >> (more + 1) & 0xFF) | code >> 6 * more);
    for (int i = more - 1; i >= 0; --i) out += static_cast<char>(0x80 | (code >> 6 * i & 0x3F));
  }
  uint32_t read_code() {
    const uint32_t high = read_hex();
    if (high < 0xD800 || high > 0xDFFF) return high;
    if (high > 0xDBFF || !take('\\') || !take('u')) fail("half a surrogate pair");
    const uint32_t low = read_hex();
    if (low < 0xDC00 || low > 0xDFFF) fail("half a surrogate pair");
    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
  }
  std::string read_string() {
    constexpr std::string_view kEscapes = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    std::string out;
    want('"');
    while (!take('"')) {
      if (at_ == text_.size() || static_cast<unsigned char>(next()) < 0x20) fail("a string does not end");
      if (!take('\\')) {
        out += text_[at_++];
        continue;
      }
      if (take('u')) {
        put_utf8(out, read_code());
        continue;
      }
      const size_t which = at_ < text_.size() ? kEscapes.find(next()) : std::string_view::npos;
      if (which == std::string_view::npos) fail("there is no such escape");
      out += kMeanings[which];
      ++at_;
    }
    return out;
  }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonReader(text).all(); }

const Json* Json::member(std::string_view name) const {
  for (auto found = members_.rbegin(); found != members_.rend(); ++found)
    if (found->first == name) return &found->second;
  return nullptr;
}

std::optional<uint32_t> Json::whole() const {
  uint32_t value = 0;
  const char* const end = raw_.data() + raw_.size();
  const auto [stop, error] = std::from_chars(raw_.data(), end, value);
  if (kind_ != Kind::number || error != std::errc() || stop != end) return std::nullopt;
  return value;
}

std::optional<double> Json::finite() const {
  double value = 0;
  const char* const end = raw_.data() + raw_.size();
  const auto [stop, error] = std::from_chars(raw_.data(), end, value);
  if (kind_ != Kind::number || error != std::errc() || stop != end || !std::isfinite(value)) return std::nullopt;
  return value;
}

}  // namespace gemma_cuda
