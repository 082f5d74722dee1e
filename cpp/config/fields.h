// Typed reading of a JSON object's members, with errors that name member and value.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "config/json.h"

namespace gemma_cuda {

// A member that is absent or null reads as nothing, unless said otherwise. Everything throws Error::invalid_argument
// where a member is something else than asked for. The object outlives this.
class Fields {
 public:
  explicit Fields(const Json& object) : object_(&object) {}

  [[noreturn]] static void fail(const std::string& what);

  // Whether the member is there, be it null.
  bool has(std::string_view name) const { return object_->member(name) != nullptr; }

  std::optional<Fields> object(std::string_view name) const;
  std::optional<std::string> string(std::string_view name) const;
  std::optional<bool> boolean(std::string_view name) const;
  std::optional<uint32_t> count(std::string_view name) const;
  uint32_t required_count(std::string_view name) const;
  std::optional<double> positive(std::string_view name) const;
  std::optional<std::vector<std::string>> strings(std::string_view name) const;

 private:
  const Json* given(std::string_view name) const;
  [[noreturn]] void wrong(std::string_view name, std::string_view wanted) const;

  const Json* object_;
};

}  // namespace gemma_cuda
