// The one exception of the core. Its text starts with its kind, so that a border can turn it into a code.
#pragma once

#include <stdexcept>
#include <string>

namespace gemma_cuda {

class Error : public std::runtime_error {
 public:
  static Error invalid_argument(const std::string& what) { return Error("invalid_argument", what); }
  static Error out_of_pages(const std::string& what) { return Error("out_of_pages", what); }
  static Error device(const std::string& what) { return Error("device", what); }

 private:
  Error(const char* kind, const std::string& what) : std::runtime_error(std::string(kind) + ": " + what) {}
};

}  // namespace gemma_cuda
