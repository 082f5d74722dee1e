// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a random number is a pure
// function of a key and a counter, so a sampled token depends on its request's seed and step and on nothing else.
#pragma once

#include <array>
#include <cstdint>

namespace gemma_cuda {

using Philox = std::array<uint32_t, 4>;

constexpr Philox philox(uint64_t key, Philox counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ k0, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return counter;
}

// Element `index` of a random tensor: even over +-sqrt(3), so of deviation 1.
constexpr float random_element(uint64_t seed, uint64_t index) {
  const uint64_t block = index / 4;
  const Philox bits = philox(seed, {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 1});
  return (static_cast<float>(bits[index % 4] >> 8) * 0x1p-23f - 1) * 1.7320508f;
}

}  // namespace gemma_cuda
