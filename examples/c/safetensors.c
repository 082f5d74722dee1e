#include "safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

char *read_file(const char *folder, const char *name, size_t *size) {
  char path[4096];
  FILE *file;
  char *bytes = NULL;
  long length = -1;
  if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path) return NULL;
  file = fopen(path, "rb");
  if (file == NULL) return NULL;
  if (fseek(file, 0, SEEK_END) == 0) length = ftell(file);
  if (length >= 0 && fseek(file, 0, SEEK_SET) == 0) bytes = malloc((size_t)length + 1);
  if (bytes != NULL && fread(bytes, 1, (size_t)length, file) != (size_t)length) {
    free(bytes);
    bytes = NULL;
  }
  fclose(file);
  if (bytes == NULL) return NULL;
  bytes[length] = '\0';
  *size = (size_t)length;
  return bytes;
}

int tensor_file_open(tensor_file *file, const char *folder, const char *name) {
  uint64_t length = 0;
  int i;
  memset(file, 0, sizeof *file);
  file->bytes = read_file(folder, name, &file->size);
  if (file->bytes == NULL || file->size < 8) return 0;
  for (i = 7; i >= 0; --i) length = length << 8 | (unsigned char)file->bytes[i];
  if (length > file->size - 8 || (file->header = malloc((size_t)length + 1)) == NULL) return 0;
  memcpy(file->header, file->bytes + 8, (size_t)length);
  file->header[length] = '\0';
  file->data = (const unsigned char *)file->bytes + 8 + length;
  file->data_size = file->size - 8 - (size_t)length;
  return 1;
}

void tensor_file_close(tensor_file *file) {
  free(file->bytes);
  free(file->header);
  memset(file, 0, sizeof *file);
}

/* Numbers of a list such as [3,4], at most `most`; -1 where it is none. */
static int numbers(const char *text, uint64_t *out, int most) {
  int count = 0;
  char *end;
  if (*text != '[') return -1;
  for (++text; *text != ']'; text = *end == ',' ? end + 1 : end) {
    if (count == most || *text < '0' || *text > '9') return -1;
    out[count++] = strtoull(text, &end, 10);
    if (*end != ',' && *end != ']') return -1;
  }
  return count;
}

/* What stands behind "key": in an object that begins at `object`. */
static const char *member(const char *object, const char *key) {
  char quoted[32];
  const char *end = strchr(object, '}'), *found;
  snprintf(quoted, sizeof quoted, "\"%s\":", key);
  found = strstr(object, quoted);
  return found == NULL || end == NULL || found > end ? NULL : found + strlen(quoted);
}

int tensor_file_find(const tensor_file *file, const char *name, tensor *found) {
  char quoted[512];
  const char *object, *dtype, *shape, *offsets;
  uint64_t range[2];
  int rank;
  if (snprintf(quoted, sizeof quoted, "\"%s\":{", name) >= (int)sizeof quoted) return 0;
  if ((object = strstr(file->header, quoted)) == NULL) return 0;
  object += strlen(quoted);
  dtype = member(object, "dtype");
  shape = member(object, "shape");
  offsets = member(object, "data_offsets");
  if (dtype == NULL || shape == NULL || offsets == NULL) return 0;
  rank = numbers(shape, found->shape, 4);
  if (rank < 0 || numbers(offsets, range, 2) != 2 || range[0] > range[1] || range[1] > file->data_size) return 0;
  found->rank = (uint32_t)rank;
  found->dtype = strncmp(dtype, "\"BF16\"", 6) == 0  ? GEMMA_CUDA_BF16
                 : strncmp(dtype, "\"F32\"", 5) == 0 ? GEMMA_CUDA_F32
                 : strncmp(dtype, "\"F16\"", 5) == 0 ? GEMMA_CUDA_F16
                                                     : NO_DTYPE;
  found->data = file->data + range[0];
  found->bytes = (size_t)(range[1] - range[0]);
  return 1;
}
