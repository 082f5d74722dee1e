// JSON, as far as a configuration needs it: values that remember how they were written.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gemma_cuda {

class Json {
 public:
  enum class Kind : uint8_t { null, boolean, number, string, array, object };

  // Throws Error::invalid_argument saying at which byte the text stops being JSON. Values nest up to 64 deep.
  static Json parse(std::string_view text);

  Kind kind() const { return kind_; }
  // The value as it was written.
  const std::string& raw() const { return raw_; }

  bool boolean() const { return raw_ == "true"; }
  const std::string& string() const { return string_; }
  const std::vector<Json>& array() const { return array_; }
  // The last member of this name; null if there is none.
  const Json* member(std::string_view name) const;
  // Nothing where the number is none of these.
  std::optional<uint32_t> whole() const;
  std::optional<double> finite() const;

 private:
  friend class JsonReader;
  Kind kind_ = Kind::null;
  std::string raw_, string_;
  std::vector<Json> array_;
  std::vector<std::pair<std::string, Json>> members_;
};

}  // namespace gemma_cuda
