// The file of algorithms: what is written is read, nothing that is damaged is, and writers in several processes leave a
// whole file behind.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <thread>

#include "check.h"
#include "support/algorithm_cache.h"

using namespace gemma_cuda;
namespace fs = std::filesystem;

namespace {

// A folder for one test, gone after it.
struct Folder {
  fs::path path = [] {
    std::string name = (fs::temp_directory_path() / "gemma-cuda-XXXXXX").string();
    CHECK(mkdtemp(name.data()) != nullptr);
    return fs::path(name);
  }();
  ~Folder() { fs::remove_all(path); }
  fs::path file() const { return path / "deep" / "algorithms"; }
};

Algorithm numbered(uint64_t number) {
  Algorithm out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = number * 0x9e3779b97f4a7c15 + i;
  return out;
}

std::string key(uint64_t number) { return "Some GPU, sm_90; library 1; shape " + std::to_string(number); }

std::string read(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

void write(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

// How many of the algorithms 0 to count - 1 a fresh cache has; those must be right.
uint64_t found_in(const fs::path& file, uint64_t count) {
  const AlgorithmCache cache(file);
  uint64_t found = 0;
  for (uint64_t i = 0; i < count; ++i)
    if (const auto algorithm = cache.find(key(i))) {
      CHECK(*algorithm == numbered(i));
      ++found;
    }
  return found;
}

void write_numbered(const fs::path& file, uint64_t begin, uint64_t end) {
  AlgorithmCache cache(file);
  for (uint64_t i = begin; i < end; ++i) cache.keep(key(i), numbered(i));
  CHECK(cache.save());
}

void what_is_written_is_read() {
  const Folder folder;
  CHECK(found_in(folder.file(), 10) == 0);
  write_numbered(folder.file(), 0, 10);
  CHECK(found_in(folder.file(), 20) == 10);
  write_numbered(folder.file(), 10, 15);  // beside the ten
  CHECK(found_in(folder.file(), 20) == 15);
  CHECK(std::distance(fs::directory_iterator(folder.file().parent_path()), {}) == 1);  // nothing left lying about
}

void the_first_algorithm_of_a_key_stays() {
  AlgorithmCache cache(std::nullopt);
  CHECK(cache.keep("key", numbered(1)) == numbered(1));
  CHECK(cache.keep("key", numbered(2)) == numbered(1));
  cache.forget("key");
  CHECK(!cache.find("key"));
  CHECK(cache.keep("key", numbered(3)) == numbered(3));
  CHECK(cache.save());  // nowhere to
}

void damage_is_left_out() {
  const Folder folder;
  write_numbered(folder.file(), 0, 4);
  const std::string whole = read(folder.file());
  // Every byte changed: at most the line it is in is lost, or all where the first line is hit.
  const size_t header = whole.find('\n');
  for (size_t at = 0; at < whole.size(); ++at) {
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << test::below(8)));
    write(folder.file(), damaged);
    const uint64_t found = found_in(folder.file(), 4);
    CHECK(at <= header ? found == 0 : found >= 2 && found < 4);
  }
  // Cut anywhere: the whole lines before stay.
  for (size_t size = 0; size < whole.size(); ++size) {
    const std::string cut = whole.substr(0, size);
    write(folder.file(), cut);
    const auto lines = static_cast<uint64_t>(std::count(cut.begin(), cut.end(), '\n'));
    CHECK(found_in(folder.file(), 4) == (lines == 0 ? 0 : lines - 1));
  }
  write(folder.file(), "gemma-cuda algorithms 2" + whole.substr(header));
  CHECK(found_in(folder.file(), 4) == 0);
  write(folder.file(), std::string(64, '\0'));
  CHECK(found_in(folder.file(), 4) == 0);
  write_numbered(folder.file(), 0, 4);  // and is written anew
  CHECK(read(folder.file()) == whole);
}

void a_place_that_cannot_be_written_is_no_error() {
  const Folder folder;
  write(folder.path / "deep", "a file where the folder should be");
  AlgorithmCache cache(folder.file());
  cache.keep(key(1), numbered(1));
  CHECK(!cache.save());
  CHECK(cache.find(key(1)) == numbered(1));
  const AlgorithmCache of_a_folder(folder.path);
  CHECK(!of_a_folder.find(key(1)));
}

// Processes that write at the same time: at every moment the file is whole, and at the end it holds at least what the
// last one wrote.
void concurrent_writers_leave_a_whole_file() {
  constexpr uint64_t kWriters = 4, kRounds = 50;
  const Folder folder;
  write_numbered(folder.file(), 0, 1);
  std::vector<pid_t> children;
  for (uint64_t writer = 0; writer < kWriters; ++writer) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      for (uint64_t round = 1; round <= kRounds; ++round)
        write_numbered(folder.file(), 1 + writer * kRounds, 1 + writer * kRounds + round);
      _exit(0);
    }
    children.push_back(child);
  }
  for (int i = 0; i < 200; ++i) {
    const std::string text = read(folder.file());
    CHECK(text.starts_with("gemma-cuda algorithms 1\n") && text.ends_with('\n'));
    CHECK(found_in(folder.file(), 1) == 1);
  }
  for (pid_t child : children) {
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  const uint64_t found = found_in(folder.file(), 1 + kWriters * kRounds);
  CHECK(found > kRounds && found <= 1 + kWriters * kRounds);
}

void threads_agree_on_one_algorithm() {
  const Folder folder;
  AlgorithmCache cache(folder.file());
  std::vector<Algorithm> kept(4);
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < kept.size(); ++i)
    threads.emplace_back([&, i] {
      kept[i] = cache.keep("key", numbered(i));
      CHECK(cache.find("key") == kept[i] && cache.save());
    });
  for (std::thread& thread : threads) thread.join();
  for (const Algorithm& algorithm : kept) CHECK(algorithm == kept[0]);
  CHECK(AlgorithmCache(folder.file()).find("key") == kept[0]);
}

void the_folder_is_what_the_environment_says() {
  CHECK(cache_folder("/mine", "/xdg", "/user") == "/mine");
  CHECK(!cache_folder("off", "/xdg", "/user"));
  CHECK(cache_folder(nullptr, "/xdg", "/user") == "/xdg/gemma-cuda");
  CHECK(cache_folder("", "xdg", "/user") == "/user/.cache/gemma-cuda");
  CHECK(cache_folder("", "", "/user") == "/user/.cache/gemma-cuda");
  CHECK(!cache_folder(nullptr, nullptr, nullptr));
}

}  // namespace

int main() {
  what_is_written_is_read();
  the_first_algorithm_of_a_key_stays();
  damage_is_left_out();
  a_place_that_cannot_be_written_is_no_error();
  concurrent_writers_leave_a_whole_file();
  threads_agree_on_one_algorithm();
  the_folder_is_what_the_environment_says();
}
