/* As much of the safetensors format as an example needs: a file in memory, and tensors by name. */
#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "gemma_cuda.h"

typedef struct {
  char *bytes; /* the whole file, and a zero byte */
  size_t size;
  char *header; /* its JSON, ended by a zero byte */
  const unsigned char *data;
  size_t data_size;
} tensor_file;

typedef struct {
  gemma_cuda_dtype dtype; /* of F32, BF16 and F16; else NO_DTYPE */
  uint64_t shape[4];
  uint32_t rank;
  const void *data;
  size_t bytes;
} tensor;
#define NO_DTYPE UINT32_MAX

/* The whole file and a zero byte behind it, to be given to free(); NULL where it cannot be read. */
char *read_file(const char *folder, const char *name, size_t *size);

/* 0 where the file cannot be read or is no safetensors file. */
int tensor_file_open(tensor_file *file, const char *folder, const char *name);
void tensor_file_close(tensor_file *file);
/* 0 where there is no such tensor, or none that this reads. */
int tensor_file_find(const tensor_file *file, const char *name, tensor *found);

#endif
