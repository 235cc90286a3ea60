/* The functions of the CUDA runtime that are used, on a GPU of SM 90 that is not there: what TensorRT's own library
 * then says can be seen without one. Host memory stands in for the GPU's. */
#include <stdlib.h>
#include <string.h>

typedef int error;
typedef void* handle;

const char* cudaGetErrorName(error e) { return (void)e, "cudaErrorOfTheTest"; }
error cudaGetLastError(void) { return 0; }
error cudaGetDevice(int* device) { return *device = 0, 0; }
error cudaSetDevice(int device) { return device; }
error cudaDeviceGetAttribute(int* value, int attribute, int device) { return *value = attribute == 75 ? 9 : 0, device; }
error cudaDeviceGetDefaultMemPool(handle* pool, int device) { return *pool = NULL, device; }
error cudaMemPoolSetAttribute(handle pool, int attribute, void* value) {
  return (void)pool, (void)attribute, value == NULL;
}
error cudaMemPoolTrimTo(handle pool, size_t least) { return (void)pool, least != 0; }
error cudaStreamCreateWithFlags(handle* stream, unsigned flags) { return (void)flags, *stream = malloc(1), 0; }
error cudaStreamDestroy(handle stream) { return free(stream), 0; }
error cudaStreamSynchronize(handle stream) { return stream == NULL; }
error cudaStreamBeginCapture(handle stream, int mode) { return (void)stream, (void)mode, 1; }
error cudaStreamEndCapture(handle stream, handle* graph) { return (void)stream, *graph = NULL, 1; }
error cudaGraphInstantiateWithFlags(handle* made, handle graph, unsigned long long flags) {
  return (void)graph, (void)flags, *made = NULL, 1;
}
error cudaGraphDestroy(handle graph) { return graph != NULL; }
error cudaGraphExecDestroy(handle graph) { return graph != NULL; }
error cudaGraphLaunch(handle graph, handle stream) { return (void)graph, (void)stream, 1; }
error cudaMallocAsync(void** memory, size_t bytes, handle stream) { return (void)stream, *memory = malloc(bytes), 0; }
error cudaFreeAsync(void* memory, handle stream) { return (void)stream, free(memory), 0; }
error cudaHostAlloc(void** memory, size_t bytes, unsigned flags) { return (void)flags, *memory = malloc(bytes), 0; }
error cudaFreeHost(void* memory) { return free(memory), 0; }
error cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, handle stream) {
  return (void)kind, (void)stream, memcpy(to, from, bytes), 0;
}
error cudaMemsetAsync(void* memory, int value, size_t bytes, handle stream) {
  return (void)stream, memset(memory, value, bytes), 0;
}
