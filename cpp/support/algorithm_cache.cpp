#include "support/algorithm_cache.h"

#include <unistd.h>

#include <atomic>
#include <charconv>
#include <cstdlib>
#include <fstream>
#include <iterator>

namespace gemma_cuda {
namespace {

constexpr std::string_view kHeader = "gemma-cuda algorithms 1";
constexpr size_t kWordDigits = 16, kAlgorithmDigits = 8 * kWordDigits;
constexpr uintmax_t kMostBytes = uintmax_t{4} << 20;  // a larger file is not ours

void append_hex(std::string& text, uint64_t word) {
  char digits[kWordDigits];
  const size_t length = static_cast<size_t>(std::to_chars(digits, digits + kWordDigits, word, 16).ptr - digits);
  text.append(kWordDigits - length, '0').append(digits, length);
}

std::optional<uint64_t> parse_hex(std::string_view digits) {
  uint64_t word = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), word, 16);
  return error == std::errc() && end == digits.data() + digits.size() ? std::optional(word) : std::nullopt;
}

// FNV-1a, as it is written.
std::string checksum(std::string_view algorithm, std::string_view key) {
  uint64_t hash = 0xcbf29ce484222325;
  for (std::string_view part : {algorithm, key})
    for (unsigned char byte : part) hash = (hash ^ byte) * 0x100000001b3;
  std::string text;
  append_hex(text, hash);
  return text;
}

// Takes the text up to the separator off its front; nothing if there is no separator.
std::optional<std::string_view> take(std::string_view& text, char separator) {
  const size_t end = text.find(separator);
  if (end == std::string_view::npos) return std::nullopt;
  const std::string_view front = text.substr(0, end);
  text.remove_prefix(end + 1);
  return front;
}

std::optional<std::pair<std::string, Algorithm>> parse_line(std::string_view line) {
  const auto digits = take(line, ' '), sum = take(line, ' ');
  if (!digits || !sum || digits->size() != kAlgorithmDigits || *sum != checksum(*digits, line)) return {};
  Algorithm algorithm;
  for (size_t i = 0; i < algorithm.size(); ++i) {
    const std::optional<uint64_t> word = parse_hex(digits->substr(i * kWordDigits, kWordDigits));
    if (!word) return {};
    algorithm[i] = *word;
  }
  return std::pair(std::string(line), algorithm);
}

// Whole or not at all: a file beside it takes its place once it is complete.
bool replace_file(const std::filesystem::path& file, const std::string& text) {
  static std::atomic<uint32_t> serial{0};
  std::error_code error;
  std::filesystem::create_directories(file.parent_path(), error);
  std::filesystem::path fresh = file;
  for (uint32_t number : {static_cast<uint32_t>(getpid()), ++serial}) (fresh += ".") += std::to_string(number);
  std::ofstream out(fresh, std::ios::binary);
  out << text;
  out.close();
  if (out) std::filesystem::rename(fresh, file, error);
  if (!out || error) {
    std::filesystem::remove(fresh, error);
    return false;
  }
  return true;
}

}  // namespace

AlgorithmCache::AlgorithmCache(std::optional<std::filesystem::path> file) : file_(std::move(file)), entries_(read()) {}

std::optional<Algorithm> AlgorithmCache::find(const std::string& key) const {
  const std::lock_guard lock(mutex_);
  const auto found = entries_.find(key);
  return found == entries_.end() ? std::nullopt : std::optional(found->second);
}

Algorithm AlgorithmCache::keep(const std::string& key, const Algorithm& algorithm) {
  const std::lock_guard lock(mutex_);
  const auto [entry, fresh] = entries_.try_emplace(key, algorithm);
  changed_ |= fresh;
  return entry->second;
}

void AlgorithmCache::forget(const std::string& key) {
  const std::lock_guard lock(mutex_);
  entries_.erase(key);
}

bool AlgorithmCache::save() {
  const std::lock_guard lock(mutex_);
  if (!file_ || !changed_) return true;
  Entries all = entries_;
  all.merge(read());
  changed_ = !replace_file(*file_, format(all));
  return !changed_;
}

AlgorithmCache& AlgorithmCache::shared() {
  static AlgorithmCache cache = [] {
    const auto folder =
        cache_folder(std::getenv("GEMMA_CUDA_CACHE"), std::getenv("XDG_CACHE_HOME"), std::getenv("HOME"));
    return AlgorithmCache(folder ? std::optional(*folder / "algorithms") : std::nullopt);
  }();
  return cache;
}

AlgorithmCache::Entries AlgorithmCache::parse(std::string_view text) {
  Entries entries;
  if (take(text, '\n') != kHeader) return entries;
  while (const std::optional<std::string_view> line = take(text, '\n'))
    if (auto entry = parse_line(*line)) entries.insert(*std::move(entry));
  return entries;
}

std::string AlgorithmCache::format(const Entries& entries) {
  std::string text(kHeader);
  text += '\n';
  for (const auto& [key, algorithm] : entries) {
    std::string digits;
    for (uint64_t word : algorithm) append_hex(digits, word);
    text += digits + ' ' + checksum(digits, key) + ' ' + key + '\n';
  }
  return text;
}

AlgorithmCache::Entries AlgorithmCache::read() const {
  std::error_code error;
  if (!file_ || !std::filesystem::is_regular_file(*file_, error) || error) return {};
  if (std::filesystem::file_size(*file_, error) > kMostBytes || error) return {};
  std::ifstream in(*file_, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  return parse(text);
}

std::optional<std::filesystem::path> cache_folder(const char* own, const char* xdg, const char* home) {
  const auto given = [](const char* value) { return value != nullptr && *value != '\0'; };
  if (given(own)) return std::string_view(own) == "off" ? std::nullopt : std::optional<std::filesystem::path>(own);
  // By the XDG rules a relative path there counts for nothing.
  if (given(xdg) && *xdg == '/') return std::filesystem::path(xdg) / "gemma-cuda";
  if (given(home)) return std::filesystem::path(home) / ".cache" / "gemma-cuda";
  return std::nullopt;
}

}  // namespace gemma_cuda
