#include "config/fields.h"

#include "core/error.h"

namespace gemma_cuda {

void Fields::fail(const std::string& what) { throw Error::invalid_argument(what); }

const Json* Fields::given(std::string_view name) const {
  const Json* found = object_->member(name);
  return found == nullptr || found->kind() == Json::Kind::null ? nullptr : found;
}

void Fields::wrong(std::string_view name, std::string_view wanted) const {
  constexpr size_t kMost = 60;  // bytes of the value that are shown
  std::string value = object_->member(name)->raw();
  if (value.size() > kMost) {
    size_t end = kMost;
    while (end > 0 && (value[end] & 0xC0) == 0x80) --end;  // no half character
    value = value.substr(0, end) + "…";
  }
  fail("`" + std::string(name) + "` is " + value + ", which is not " + std::string(wanted));
}

std::optional<Fields> Fields::object(std::string_view name) const {
  const Json* value = given(name);
  if (value == nullptr) return std::nullopt;
  if (value->kind() != Json::Kind::object) wrong(name, "an object");
  return Fields(*value);
}

std::optional<std::string> Fields::string(std::string_view name) const {
  const Json* value = given(name);
  if (value == nullptr) return std::nullopt;
  if (value->kind() != Json::Kind::string) wrong(name, "a string");
  return value->string();
}

std::optional<bool> Fields::boolean(std::string_view name) const {
  const Json* value = given(name);
  if (value == nullptr) return std::nullopt;
  if (value->kind() != Json::Kind::boolean) wrong(name, "true or false");
  return value->boolean();
}

std::optional<uint32_t> Fields::count(std::string_view name) const {
  const Json* value = given(name);
  if (value == nullptr) return std::nullopt;
  const std::optional<uint32_t> whole = value->whole();
  if (!whole) wrong(name, "a whole number from 0 to 4294967295");
  return whole;
}

uint32_t Fields::required_count(std::string_view name) const {
  const std::optional<uint32_t> value = count(name);
  if (!value) fail("`" + std::string(name) + "` is missing");
  return *value;
}

std::optional<double> Fields::positive(std::string_view name) const {
  const Json* value = given(name);
  if (value == nullptr) return std::nullopt;
  const std::optional<double> number = value->finite();
  if (!number) wrong(name, "a finite number");
  if (*number <= 0) wrong(name, "above 0");
  return number;
}

std::optional<std::vector<std::string>> Fields::strings(std::string_view name) const {
  const Json* value = given(name);
  if (value == nullptr) return std::nullopt;
  std::vector<std::string> out;
  if (value->kind() != Json::Kind::array) wrong(name, "a list of strings");
  for (const Json& item : value->array()) {
    if (item.kind() != Json::Kind::string) wrong(name, "a list of strings");
    out.push_back(item.string());
  }
  return out;
}

}  // namespace gemma_cuda
