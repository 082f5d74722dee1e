// The one exception of the core. Its text starts with its kind, so that a border can turn it into a code.
#pragma once

#include <stdexcept>
#include <string>

namespace gemma_cuda {

class Error : public std::runtime_error {
 public:
  enum class Kind { invalid_argument, out_of_pages, device };

  static Error invalid_argument(const std::string& what) {
    return {Kind::invalid_argument, "invalid_argument: ", what};
  }
  static Error out_of_pages(const std::string& what) { return {Kind::out_of_pages, "out_of_pages: ", what}; }
  static Error device(const std::string& what) { return {Kind::device, "device: ", what}; }

  Kind kind() const { return kind_; }
  // The text without its kind.
  const char* message() const { return what() + prefix_; }

 private:
  Error(Kind kind, const std::string& prefix, const std::string& what)
      : std::runtime_error(prefix + what), kind_(kind), prefix_(prefix.size()) {}

  Kind kind_;
  size_t prefix_;
};

}  // namespace gemma_cuda
