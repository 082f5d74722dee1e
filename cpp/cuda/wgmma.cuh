// Warpgroup products of sm_90a (wgmma): 64 rows by N columns by 16, a warpgroup of 128 threads together, run while the
// threads go on. Operands lie in shared memory in blocks of 64 columns, 128 bytes a row, whose 16-byte chunks are at
// chunk ^ (row % 8); a block begins at a multiple of 1024 bytes. Results have the fragments of mma.cuh, each warp 16 of
// the rows. To be used only where __CUDA_ARCH_FEAT_SM90_ALL is defined.
#pragma once

#include <cstdint>

namespace gemma_cuda::cuda {

// Where an operand is: its first byte, and the bytes from eight rows to the next eight, and, where the product runs
// along the rows (values), from one block of columns to the next.
__device__ inline uint64_t operand(uint32_t address, uint32_t block_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = 1024;
  return kSwizzle128 | kEightRows >> 4 << 32 | uint64_t{block_bytes >> 4} << 16 | (address & 0x3ffff) >> 4;
}

// Before the first product, and whenever registers of one were touched.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N of the committed groups are under way.
template <int N>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving accesses of a product's registers over this point.
template <int N>
__device__ inline void pin(float (&d)[N][4]) {
#pragma unroll
  for (auto& fragment : d)
#pragma unroll
    for (float& x : fragment) asm volatile("" : "+f"(x)::"memory");
}

// Makes what ordinary instructions and cp.async wrote to shared memory visible to the tensor cores.
__device__ inline void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int Registers>
__device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// multiply_columns: d (+)= a b^T, both along their columns in shared memory. multiply_rows: d += a b, a in registers,
// b's rows being the inner dimension. `keep` false: d is overwritten.
#define GEMMA_CUDA_FRAGMENT(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])

__device__ inline void multiply_columns(float (&d)[1][4], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{.reg .pred keep; setp.ne.b32 keep, %6, 0; "
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3}, "
      "%4, %5, keep, 1, 1, 0, 0;}"
      : GEMMA_CUDA_FRAGMENT(d[0])
      : "l"(a), "l"(b), "r"(int{keep}));
}
__device__ inline void multiply_columns(float (&d)[2][4], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{.reg .pred keep; setp.ne.b32 keep, %10, 0; "
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7}, "
      "%8, %9, keep, 1, 1, 0, 0;}"
      : GEMMA_CUDA_FRAGMENT(d[0]), GEMMA_CUDA_FRAGMENT(d[1])
      : "l"(a), "l"(b), "r"(int{keep}));
}
__device__ inline void multiply_columns(float (&d)[4][4], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{.reg .pred keep; setp.ne.b32 keep, %18, 0; "
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, keep, 1, 1, 0, 0;}"
      : GEMMA_CUDA_FRAGMENT(d[0]), GEMMA_CUDA_FRAGMENT(d[1]), GEMMA_CUDA_FRAGMENT(d[2]), GEMMA_CUDA_FRAGMENT(d[3])
      : "l"(a), "l"(b), "r"(int{keep}));
}
__device__ inline void multiply_columns(float (&d)[8][4], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{.reg .pred keep; setp.ne.b32 keep, %34, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, keep, 1, 1, 0, 0;}"
      : GEMMA_CUDA_FRAGMENT(d[0]), GEMMA_CUDA_FRAGMENT(d[1]), GEMMA_CUDA_FRAGMENT(d[2]), GEMMA_CUDA_FRAGMENT(d[3]),
        GEMMA_CUDA_FRAGMENT(d[4]), GEMMA_CUDA_FRAGMENT(d[5]), GEMMA_CUDA_FRAGMENT(d[6]), GEMMA_CUDA_FRAGMENT(d[7])
      : "l"(a), "l"(b), "r"(int{keep}));
}
__device__ inline void multiply_columns(float (&d)[10][4], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{.reg .pred keep; setp.ne.b32 keep, %42, 0; "
      "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39}, "
      "%40, %41, keep, 1, 1, 0, 0;}"
      : GEMMA_CUDA_FRAGMENT(d[0]), GEMMA_CUDA_FRAGMENT(d[1]), GEMMA_CUDA_FRAGMENT(d[2]), GEMMA_CUDA_FRAGMENT(d[3]),
        GEMMA_CUDA_FRAGMENT(d[4]), GEMMA_CUDA_FRAGMENT(d[5]), GEMMA_CUDA_FRAGMENT(d[6]), GEMMA_CUDA_FRAGMENT(d[7]),
        GEMMA_CUDA_FRAGMENT(d[8]), GEMMA_CUDA_FRAGMENT(d[9])
      : "l"(a), "l"(b), "r"(int{keep}));
}
__device__ inline void multiply_columns(float (&d)[16][4], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{.reg .pred keep; setp.ne.b32 keep, %66, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, keep, 1, 1, 0, 0;}"
      : GEMMA_CUDA_FRAGMENT(d[0]), GEMMA_CUDA_FRAGMENT(d[1]), GEMMA_CUDA_FRAGMENT(d[2]), GEMMA_CUDA_FRAGMENT(d[3]),
        GEMMA_CUDA_FRAGMENT(d[4]), GEMMA_CUDA_FRAGMENT(d[5]), GEMMA_CUDA_FRAGMENT(d[6]), GEMMA_CUDA_FRAGMENT(d[7]),
        GEMMA_CUDA_FRAGMENT(d[8]), GEMMA_CUDA_FRAGMENT(d[9]), GEMMA_CUDA_FRAGMENT(d[10]), GEMMA_CUDA_FRAGMENT(d[11]),
        GEMMA_CUDA_FRAGMENT(d[12]), GEMMA_CUDA_FRAGMENT(d[13]), GEMMA_CUDA_FRAGMENT(d[14]), GEMMA_CUDA_FRAGMENT(d[15])
      : "l"(a), "l"(b), "r"(int{keep}));
}
__device__ inline void multiply_rows(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b, bool keep) {
  asm volatile(
      "{.reg .pred keep; setp.ne.b32 keep, %69, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, keep, 1, 1, 1;}"
      : GEMMA_CUDA_FRAGMENT(d[0]), GEMMA_CUDA_FRAGMENT(d[1]), GEMMA_CUDA_FRAGMENT(d[2]), GEMMA_CUDA_FRAGMENT(d[3]),
        GEMMA_CUDA_FRAGMENT(d[4]), GEMMA_CUDA_FRAGMENT(d[5]), GEMMA_CUDA_FRAGMENT(d[6]), GEMMA_CUDA_FRAGMENT(d[7]),
        GEMMA_CUDA_FRAGMENT(d[8]), GEMMA_CUDA_FRAGMENT(d[9]), GEMMA_CUDA_FRAGMENT(d[10]), GEMMA_CUDA_FRAGMENT(d[11]),
        GEMMA_CUDA_FRAGMENT(d[12]), GEMMA_CUDA_FRAGMENT(d[13]), GEMMA_CUDA_FRAGMENT(d[14]), GEMMA_CUDA_FRAGMENT(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
__device__ inline void multiply_rows(float (&d)[32][4], const uint32_t (&a)[4], uint64_t b, bool keep) {
  asm volatile(
      "{.reg .pred keep; setp.ne.b32 keep, %133, 0; "
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, "
      "%72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, "
      "%88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, "
      "%104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, "
      "%120, %121, %122, %123, %124, %125, %126, %127}, "
      "{%128, %129, %130, %131}, %132, keep, 1, 1, 1;}"
      : GEMMA_CUDA_FRAGMENT(d[0]), GEMMA_CUDA_FRAGMENT(d[1]), GEMMA_CUDA_FRAGMENT(d[2]), GEMMA_CUDA_FRAGMENT(d[3]),
        GEMMA_CUDA_FRAGMENT(d[4]), GEMMA_CUDA_FRAGMENT(d[5]), GEMMA_CUDA_FRAGMENT(d[6]), GEMMA_CUDA_FRAGMENT(d[7]),
        GEMMA_CUDA_FRAGMENT(d[8]), GEMMA_CUDA_FRAGMENT(d[9]), GEMMA_CUDA_FRAGMENT(d[10]), GEMMA_CUDA_FRAGMENT(d[11]),
        GEMMA_CUDA_FRAGMENT(d[12]), GEMMA_CUDA_FRAGMENT(d[13]), GEMMA_CUDA_FRAGMENT(d[14]), GEMMA_CUDA_FRAGMENT(d[15]),
        GEMMA_CUDA_FRAGMENT(d[16]), GEMMA_CUDA_FRAGMENT(d[17]), GEMMA_CUDA_FRAGMENT(d[18]), GEMMA_CUDA_FRAGMENT(d[19]),
        GEMMA_CUDA_FRAGMENT(d[20]), GEMMA_CUDA_FRAGMENT(d[21]), GEMMA_CUDA_FRAGMENT(d[22]), GEMMA_CUDA_FRAGMENT(d[23]),
        GEMMA_CUDA_FRAGMENT(d[24]), GEMMA_CUDA_FRAGMENT(d[25]), GEMMA_CUDA_FRAGMENT(d[26]), GEMMA_CUDA_FRAGMENT(d[27]),
        GEMMA_CUDA_FRAGMENT(d[28]), GEMMA_CUDA_FRAGMENT(d[29]), GEMMA_CUDA_FRAGMENT(d[30]), GEMMA_CUDA_FRAGMENT(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}

#undef GEMMA_CUDA_FRAGMENT

}  // namespace gemma_cuda::cuda
