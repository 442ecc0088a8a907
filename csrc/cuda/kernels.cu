// The kernels. Built by nvcc alone, for the devices that build_cuda.py names.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#if CUDART_VERSION < 12040
#error "metafast's kernels need CUDA 12.4 or later, for __maxnreg__; METAFAST_CUDA=0 builds without them"
#endif

#define METAFAST_NAMESPACE metafast::cuda
#include "launch.h"
#include "sum.cuh"
#include "inner_loop.cuh"

using metafast::BlockJob;
using metafast::cuda::ways;

template <class Cluster>
__device__ void inner_loop(const BlockJob<float>& job) {
  extern __shared__ float4 memory[];
  const int threads = static_cast<int>(blockDim.x);
  float* const base = reinterpret_cast<float*>(memory);
  metafast::cuda::InnerLoopRun<float, Cluster, false>(job, Cluster{}, threads, base, blockIdx.x).run(gridDim.x);
}

template <class Cluster>
__device__ __forceinline__ void rule_loop(const BlockJob<float>& job) {
  extern __shared__ float4 memory[];
  const int threads = static_cast<int>(blockDim.x);
  float* const base = reinterpret_cast<float*>(memory);
  metafast::cuda::InnerLoopRun<float, Cluster, true>(job, Cluster{}, threads, base, blockIdx.x).run(gridDim.x);
}

// Registers of a thread: six blocks of 64 threads, or one of the largest, have them on a processor.
extern "C" __global__ void __maxnreg__(168) metafast_inner_loop(const __grid_constant__ BlockJob<float> job) {
  inner_loop<metafast::cuda::SingleBlock>(job);
}

extern "C" __global__ void __launch_bounds__(metafast::max_threads, 1)
    metafast_inner_loop_cluster(const __grid_constant__ BlockJob<float> job) {
#if __CUDA_ARCH__ >= 900
  inner_loop<metafast::cuda::BlockCluster>(job);
#else
  __trap();  // nothing before has clusters, and no launch of them
#endif
}

// The same under a rule.
extern "C" __global__ void __maxnreg__(168) metafast_rule_loop(const __grid_constant__ BlockJob<float> job) {
  rule_loop<metafast::cuda::SingleBlock>(job);
}

extern "C" __global__ void __launch_bounds__(metafast::max_threads, 1)
    metafast_rule_loop_cluster(const __grid_constant__ BlockJob<float> job) {
#if __CUDA_ARCH__ >= 900
  rule_loop<metafast::cuda::BlockCluster>(job);
#else
  __trap();
#endif
}

extern "C" __global__ void __launch_bounds__(32 * ways)
    metafast_sum_blocks(const __grid_constant__ metafast::Sum<float> sum) {
  __shared__ float parts[ways][32];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x, row = blockIdx.y;
  parts[threadIdx.y][threadIdx.x] = column < sum.width ? metafast::cuda::sum_way(sum, row, column, threadIdx.y) : 0;
  __syncthreads();
  if (threadIdx.y > 0 || column >= sum.width) return;
  float total = 0;
  for (int way = 0; way < ways; ++way) total += parts[way][threadIdx.x];
  sum.out[row * sum.width + column] = total * sum.scale;
}

namespace metafast {

namespace {

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or it would be taken for the next launch's
  throw std::runtime_error("CUDA: " + what + ": " + cudaGetErrorString(error));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before), "asking for the current device");
    changed = before != device;
    if (changed) check(cudaSetDevice(device), "choosing device " + std::to_string(device));
  }
  ~DeviceGuard() {
    if (changed) cudaSetDevice(before);
  }

 private:
  int before = 0;
  bool changed = false;
};

cudaStream_t stream(Queue queue) { return reinterpret_cast<cudaStream_t>(queue.stream); }

}  // namespace

void cuda_upload(void* to, const void* from, int64_t bytes, Queue queue) {
  const DeviceGuard guard(queue.device);
  const std::string what =
      "copying " + std::to_string(bytes) + " bytes of tables to device " + std::to_string(queue.device);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream(queue)), what);
  check(cudaStreamSynchronize(stream(queue)), what);  // later calls may come on other streams
}

void cuda_run(const BlockJob<float>& job, const BlockShape& shape, Queue queue) {
  const DeviceGuard guard(queue.device);
  const bool by_rule = takes_a_rule(job);
  const auto alone = by_rule ? metafast_rule_loop : metafast_inner_loop;
  const auto together = by_rule ? metafast_rule_loop_cluster : metafast_inner_loop_cluster;
  const auto kernel = shape.cluster > 1 ? together : alone;
  const std::string name = by_rule ? "metafast_rule_loop" : "metafast_inner_loop";
  const std::string what = name + (shape.cluster > 1 ? "_cluster of " : " of ") + std::to_string(job.tasks) +
                           " tasks, " + std::to_string(job.steps) + " steps, " + std::to_string(job.support.n) + " + " +
                           std::to_string(job.query.n) + " samples, in " + std::to_string(shape.blocks) + " blocks, " +
                           std::to_string(shape.cluster) + " a task, of " + std::to_string(shape.threads) +
                           " threads and " + std::to_string(shape.bytes) + " bytes on device " +
                           std::to_string(queue.device);
  const auto set = [&](cudaFuncAttribute attribute, int value) {
    check(cudaFuncSetAttribute(kernel, attribute, value), what);
  };
  // The most that there is, not this job's: another thread may be between its setting and its launch.
  int max_shared = 0;
  check(cudaDeviceGetAttribute(&max_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device), what);
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared);
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);  // for blocks side by side
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(shape.blocks);
  launch.blockDim = dim3(shape.threads);
  launch.dynamicSmemBytes = shape.bytes;
  launch.stream = stream(queue);
  launch.attrs = &attribute;
  launch.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&launch, kernel, job), what);
}

void cuda_sum(const Sum<float>& sum, Queue queue) {
  const DeviceGuard guard(queue.device);
  const dim3 blocks(static_cast<unsigned>((sum.width + 31) / 32), static_cast<unsigned>(sum.rows));
  metafast_sum_blocks<<<blocks, dim3(32, cuda::ways), 0, stream(queue)>>>(sum);
  check(cudaGetLastError(), "metafast_sum_blocks of " + std::to_string(sum.count) + " parts, " +
                                std::to_string(sum.rows) + " x " + std::to_string(sum.width) + " on device " +
                                std::to_string(queue.device));
}

}  // namespace metafast
