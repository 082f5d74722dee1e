// How fast the GPU's memory is, measured.
#pragma once

#include <cuda_runtime.h>

namespace gemma_cuda::cuda {

// Bytes read and written in a second by a copy between two large buffers on this device, the best of several. Throws
// Error::device where too little memory is free for buffers that the cache does not hold.
double copy_bandwidth(cudaStream_t stream);

}  // namespace gemma_cuda::cuda
