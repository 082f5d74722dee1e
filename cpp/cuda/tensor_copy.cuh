// Tensor copies of sm_90 (tensor_map.h): one thread asks for a box of a matrix, the copy engine brings it to shared
// memory, where a barrier counts its bytes, or takes it from there. To be used only where __CUDA_ARCH_FEAT_SM90_ALL is
// defined.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/barrier.cuh"
#include "cuda/cache_policy.cuh"
#include "cuda/tensor_map.h"

namespace gemma_cuda::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Starts the copy of a box whose first element is at (row, column); the barrier counts its bytes.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, uint32_t row, uint32_t column, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, uint32_t row, uint32_t column, Barrier& barrier,
                                uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier)), "l"(policy)
      : "memory");
}
// To the same place of both blocks of a cluster, whose barriers count it each.
__device__ inline void copy_box_to_both(uint32_t to, const CUtensorMap& map, uint32_t row, uint32_t column,
                                        Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier)), "h"(uint16_t{3})
      : "memory");
}

// The same by a map of run_map(); `row` is a multiple of kRunRows.
__device__ inline void copy_runs(uint32_t to, const CUtensorMap& map, uint32_t row, uint32_t column, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %3, %3, %4}], [%5];" ::"r"(to),
      "l"(&map), "r"(column), "r"(0), "r"(row / kRunRows), "r"(shared_address(&barrier))
      : "memory");
}
__device__ inline void copy_runs_to_both(uint32_t to, const CUtensorMap& map, uint32_t row, uint32_t column,
                                         Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %3, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(&map), "r"(column), "r"(0), "r"(row / kRunRows), "r"(shared_address(&barrier)), "h"(uint16_t{3})
      : "memory");
}

// The same by a map of pair_map(); `row` counts those of both halves, and is a multiple of twice kPairRows.
__device__ inline void copy_pairs(uint32_t to, const CUtensorMap& map, uint32_t row, uint32_t column, Barrier& barrier,
                                  uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(&map), "r"(column), "r"(0), "r"(row / (2 * kPairRows)), "r"(shared_address(&barrier)), "l"(policy)
      : "memory");
}

// Of consecutive bytes, a multiple of 16 at multiples of 16.
__device__ inline void copy_row(const void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

__device__ inline void copy_row(uint32_t to, const void* from, uint32_t bytes, Barrier& barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(shared_address(&barrier)), "l"(policy)
      : "memory");
}

__device__ inline void store_box(const CUtensorMap& map, uint32_t row, uint32_t column, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
}
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until what this thread stored has been read from shared memory.
__device__ inline void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

#endif

}  // namespace gemma_cuda::cuda
