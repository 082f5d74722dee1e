// Algorithms that a library was found fastest with, kept in a file, so that they are searched once a machine and not
// once a process, and so that all processes compute with the same ones: the same bits.
//
// The file is text. The first line is "gemma-cuda algorithms 1"; each other one is
//
//     <64 bytes of the algorithm as 128 hexadecimal digits> <checksum of the rest, 16 digits> <key>
//
// with the key, which says what the algorithm is for, up to the end of the line. A line that is not so, or whose
// checksum is wrong, is left out; a file with another first line counts as empty.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

namespace gemma_cuda {

// Opaque: what a library calls an algorithm.
using Algorithm = std::array<uint64_t, 8>;

// Used by any number of threads. Nothing here fails: a file that cannot be read is empty, and one that cannot be
// written is not.
class AlgorithmCache {
 public:
  // Reads the file. Without one it keeps algorithms as long as the process lives.
  explicit AlgorithmCache(std::optional<std::filesystem::path> file);

  std::optional<Algorithm> find(const std::string& key) const;
  // Returns the one that is kept for the key from now on: this one, or what another thread kept before.
  Algorithm keep(const std::string& key, const Algorithm& algorithm);
  // It turned out to be of no use.
  void forget(const std::string& key);

  // Writes the file if there is something new, together with what other processes have put there since. It is replaced
  // as a whole. Returns whether it is as new as this.
  bool save();

  // The one of this process, in cache_folder().
  static AlgorithmCache& shared();

 private:
  using Entries = std::map<std::string, Algorithm>;
  static Entries parse(std::string_view text);
  static std::string format(const Entries& entries);
  Entries read() const;

  const std::optional<std::filesystem::path> file_;
  mutable std::mutex mutex_;
  Entries entries_;
  bool changed_ = false;
};

// The folder for what can be found out again, from the environment's GEMMA_CUDA_CACHE (a folder, or "off"),
// XDG_CACHE_HOME and HOME, each null or empty where it is not set. None if it is off or no folder is named.
std::optional<std::filesystem::path> cache_folder(const char* own, const char* xdg, const char* home);

}  // namespace gemma_cuda
