// Runs every PTX wrapper, and the toolkit intrinsics that kernels use, on known input and compares with values worked
// out here from the PTX ISA's definitions. One source for two machines:
//
//   a GPU:         nvcc -std=c++17 -arch=sm_90a -Icsrc -Icsrc/cuda/device tests/simt/ptx_selftest.cu && ./a.out
//                  (sm_80 up to other architectures: the Hopper cases are left out)
//   the emulator:  tests/simt/test_selftest.py
//
// Prints one line a case; the exit status is the number of failures.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dynamic_smem.cuh>
#include <functional>
#include <launch_kernel.cuh>
#include <tensor_map.cuh>
#include <type_traits>
#include <vector>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/max.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

// Hopper's instructions: the kernels that use them are empty on other architectures, and their cases are not run.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_HOPPER
#endif

using namespace adasplash2;

namespace {

// ---- harness ----

int num_failures = 0;

void report(const char* name, bool is_correct) {
  std::printf("%s %s\n", is_correct ? "ok    " : "FAILED", name);
  if (!is_correct) ++num_failures;
}

// Memory of the device, copied in and out.
template <typename T>
class Buffer {
 public:
  explicit Buffer(const std::vector<T>& values) : size_(values.size()) {
    check_cuda(cudaMalloc(&data_, size_ * sizeof(T)), "cudaMalloc");
    check_cuda(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  std::vector<T> values() const {
    std::vector<T> values(size_);
    check_cuda(cudaDeviceSynchronize(), "kernel");
    check_cuda(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

template <typename T>
std::vector<T> made(size_t size, const std::function<T(int)>& value) {
  std::vector<T> values(size);
  for (size_t i = 0; i < size; ++i) values[i] = value(static_cast<int>(i));
  return values;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

constexpr uint32_t kAll = 0xffffffffu;

// Small whole numbers: sums of their products are exact in float.
int small(int seed) { return (seed * 7919 + 13) % 11 - 5; }

// ---- cp.async ----

__global__ void copy_kernel(const uint8_t* source, uint8_t* out) {
  uint8_t* smem = dynamic_smem();
  const int lane = threadIdx.x;
  const uint32_t base = ptx::shared_address(smem);
  // 32 copies of each size; the later ones are cut short and filled with zeros.
  ptx::cp_async_16(base + 16 * lane, source + 16 * lane, lane % 17);
  ptx::cp_async_commit();
  ptx::cp_async_8(base + 512 + 8 * lane, source + 512 + 8 * lane, lane % 9);
  ptx::cp_async_commit();
  ptx::cp_async_4(base + 768 + 4 * lane, source + 768 + 4 * lane, lane % 5);
  ptx::cp_async_commit();
  ptx::cp_async_wait<2>();  // the first group alone has to be there
  for (int i = 0; i < 16; ++i) out[16 * lane + i] = smem[16 * lane + i];
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 8; ++i) out[512 + 8 * lane + i] = smem[512 + 8 * lane + i];
  for (int i = 0; i < 4; ++i) out[768 + 4 * lane + i] = smem[768 + 4 * lane + i];
}

void test_cp_async() {
  const auto source = made<uint8_t>(896, [](int i) { return static_cast<uint8_t>(i % 251 + 1); });
  auto expected = source;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = lane % 17; i < 16; ++i) expected[16 * lane + i] = 0;
    for (int i = lane % 9; i < 8; ++i) expected[512 + 8 * lane + i] = 0;
    for (int i = lane % 5; i < 4; ++i) expected[768 + 4 * lane + i] = 0;
  }
  Buffer<uint8_t> g_source(source), out(std::vector<uint8_t>(896, 0xee));
  launch_kernel(copy_kernel, dim3(1), dim3(32), 896, nullptr, g_source.data(), out.data());
  report("cp_async_16, _8, _4, commit, wait", same_bits(out.values(), expected));
}

// ---- ldmatrix, stmatrix: four 8x8 matrices, element = 64 * matrix + 8 * row + column ----

uint16_t matrix_element(int matrix, int row, int column) {
  return static_cast<uint16_t>(64 * matrix + 8 * row + column);
}

// What register `matrix` of a lane holds.
uint32_t expected_fragment(int lane, int matrix, bool is_transposed) {
  const int group = lane / 4, quad = lane % 4;
  const uint32_t low =
      is_transposed ? matrix_element(matrix, 2 * quad, group) : matrix_element(matrix, group, 2 * quad);
  const uint32_t high =
      is_transposed ? matrix_element(matrix, 2 * quad + 1, group) : matrix_element(matrix, group, 2 * quad + 1);
  return low | high << 16;
}

__global__ void ldmatrix_kernel(uint32_t* out) {
  uint8_t* smem = dynamic_smem();
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) reinterpret_cast<uint16_t*>(smem)[i] = static_cast<uint16_t>(i);
  __syncwarp();
  const uint32_t row = ptx::shared_address(smem) + 16 * lane;
  uint32_t x4[4], x4_trans[4], x2[2], x2_trans[2];
  ptx::ldmatrix_x4(x4, row);
  ptx::ldmatrix_x4_trans(x4_trans, row);
  ptx::ldmatrix_x2(x2, row);
  ptx::ldmatrix_x2_trans(x2_trans, row);
  for (int i = 0; i < 4; ++i) {
    out[lane * 12 + i] = x4[i];
    out[lane * 12 + 4 + i] = x4_trans[i];
  }
  for (int i = 0; i < 2; ++i) {
    out[lane * 12 + 8 + i] = x2[i];
    out[lane * 12 + 10 + i] = x2_trans[i];
  }
}

void test_ldmatrix() {
  Buffer<uint32_t> out(std::vector<uint32_t>(32 * 12));
  launch_kernel(ldmatrix_kernel, dim3(1), dim3(32), 512, nullptr, out.data());
  const auto got = out.values();
  const auto matches = [&](int first, int count, bool is_transposed) {
    for (int i = 0; i < 32 * count; ++i) {
      const int lane = i / count, matrix = i % count;
      if (got[lane * 12 + first + matrix] != expected_fragment(lane, matrix, is_transposed)) return false;
    }
    return true;
  };
  report("ldmatrix_x4", matches(0, 4, false));
  report("ldmatrix_x4_trans", matches(4, 4, true));
  report("ldmatrix_x2", matches(8, 2, false));
  report("ldmatrix_x2_trans", matches(10, 2, true));
}

__global__ void stmatrix_kernel(const uint32_t* fragments, uint16_t* out, bool is_transposed) {
#ifdef HAS_HOPPER
  uint8_t* smem = dynamic_smem();
  const int lane = threadIdx.x;
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = fragments[4 * lane + i];
  const uint32_t row = ptx::shared_address(smem) + 16 * lane;
  if (is_transposed) {
    ptx::stmatrix_x4_trans(row, r);
  } else {
    ptx::stmatrix_x4(row, r);
  }
  __syncwarp();
  for (int i = lane; i < 256; i += 32) out[i] = reinterpret_cast<uint16_t*>(smem)[i];
#endif
}

void test_stmatrix() {
  for (const bool is_transposed : {false, true}) {
    Buffer<uint32_t> fragments(
        made<uint32_t>(128, [&](int i) { return expected_fragment(i / 4, i % 4, is_transposed); }));
    Buffer<uint16_t> out(std::vector<uint16_t>(256));
    launch_kernel(stmatrix_kernel, dim3(1), dim3(32), 512, nullptr, fragments.data(), out.data(), is_transposed);
    report(is_transposed ? "stmatrix_x4_trans" : "stmatrix_x4",
           same_bits(out.values(), made<uint16_t>(256, [](int i) { return static_cast<uint16_t>(i); })));
  }
}

// ---- mma.sync ----

// A is [16, K], B is [K, 8], both row-major; out = 1 + A B from fragments laid out by the PTX ISA's figures.
template <typename Element>
__global__ void mma_kernel(const float* a, const float* b, float* out) {
  const int lane = threadIdx.x, group = lane / 4, quad = lane % 4;
  float acc[4] = {1, 1, 1, 1};
  uint32_t fragment_a[4], fragment_b[2];
  if constexpr (std::is_same_v<Element, float>) {
    for (int i = 0; i < 4; ++i) fragment_a[i] = ptx::to_tf32(a[(group + i % 2 * 8) * 8 + quad + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) fragment_b[i] = ptx::to_tf32(b[(quad + i * 4) * 8 + group]);
    ptx::mma_m16n8k8_tf32(acc, fragment_a, fragment_b[0], fragment_b[1]);
  } else {
    for (int i = 0; i < 4; ++i) {
      const float* pair = &a[(group + i % 2 * 8) * 16 + 2 * quad + i / 2 * 8];
      fragment_a[i] = ptx::pack<Element>(pair[0], pair[1]);
    }
    for (int i = 0; i < 2; ++i) {
      const float* pair = &b[(2 * quad + i * 8) * 8 + group];
      fragment_b[i] = ptx::pack<Element>(pair[0], pair[8]);
    }
    ptx::mma_m16n8k16<Element>(acc, fragment_a, fragment_b[0], fragment_b[1]);
  }
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + 2 * quad + i % 2] = acc[i];
}

template <typename Element>
void test_mma(const char* name) {
  constexpr int kK = std::is_same_v<Element, float> ? 8 : 16;
  const auto a = made<float>(16 * kK, [](int i) { return static_cast<float>(small(i)); });
  const auto b = made<float>(kK * 8, [](int i) { return static_cast<float>(small(i + 1000)); });
  std::vector<float> expected(128, 1.0f);
  for (int i = 0; i < 128 * kK; ++i) {
    const int row = i / kK / 8, column = i / kK % 8, k = i % kK;
    expected[row * 8 + column] += a[row * kK + k] * b[k * 8 + column];
  }
  Buffer<float> g_a(a), g_b(b), out(std::vector<float>(128));
  launch_kernel(mma_kernel<Element>, dim3(1), dim3(32), 0, nullptr, g_a.data(), g_b.data(), out.data());
  report(name, same_bits(out.values(), expected));
}

// Not in the PTX ISA, but measured (README.md, "Rounding"): 1 + count * term, a case a row.
void test_mma_rounding() {
  struct Case {
    int count;
    float term, expected;
  };
  constexpr Case kCases[] = {
      {1, 0x1p-24f, 1.0f},  {4, 0x1p-25f, 1.0f + 0x1p-23f},  {8, 0x1p-25f, 1.0f + 0x1p-22f},  {16, 0x1p-26f, 1.0f},
      {1, -0x1p-26f, 1.0f}, {1, -0x1p-25f, 1.0f - 0x1p-24f}, {2, -0x1p-25f, 1.0f - 0x1p-24f},
  };
  std::vector<float> a(256), b(128, 1.0f), expected(128, 1.0f);
  int row = 0;
  for (const Case& test : kCases) {
    for (int k = 0; k < test.count; ++k) a[row * 16 + k] = test.term;
    for (int column = 0; column < 8; ++column) expected[row * 8 + column] = test.expected;
    ++row;
  }
  Buffer<float> g_a(a), g_b(b), out(std::vector<float>(128));
  launch_kernel(mma_kernel<__nv_bfloat16>, dim3(1), dim3(32), 0, nullptr, g_a.data(), g_b.data(), out.data());
  report("mma_m16n8k16_bf16 rounding", same_bits(out.values(), expected));
}

// ---- conversions ----

__global__ void convert_kernel(const float* in, int size, uint32_t* out) {
  if (threadIdx.x >= size) return;
  const float value = in[threadIdx.x];
  uint32_t* row = out + 7 * threadIdx.x;
  row[0] = ptx::pack_bf16(value, -2.0f);
  row[1] = ptx::pack_f16(-2.0f, value);
  row[2] = ptx::to_tf32(value);
  row[3] = __float_as_uint(__bfloat162float(__float2bfloat16(value)) + __half2float(__float2half(1.5f)));
  row[4] = ptx::pack_f16_relu(-2.0f, value);
  // The square of 1 + 2^-10 is 1 + 2^-9 + 2^-20, and 2^-11 is half a unit in the last place.
  const __half2 near_one = __floats2half2_rn(0x1.004p0f, -0x1.004p0f), small = __floats2half2_rn(0x1p-11f, 0.0f);
  const float2 fused = __half22float2(__hfma2(near_one, near_one, small));
  const float2 sum = __half22float2(__hadd2(near_one, small));
  row[5] = __float_as_uint(fused.x + fused.y);
  row[6] = __float_as_uint(sum.x + sum.y);
}

void test_conversions() {
  struct Case {
    float value;
    uint32_t bf16, f16, tf32;
  };
  const auto from_bits = [](uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  const std::vector<Case> cases = {
      {1.0f, 0x3f80, 0x3c00, 0x3f800000},
      {from_bits(0x3f808000), 0x3f80, 0x3c04, 0x3f808000},  // bf16 tie: to even, down
      {from_bits(0x3f818000), 0x3f82, 0x3c0c, 0x3f818000},  // bf16 tie: to even, up
      {from_bits(0x3f801000), 0x3f80, 0x3c00, 0x3f802000},  // half tie: to even, down; tf32 tie: away from zero
      {from_bits(0x3f803000), 0x3f80, 0x3c02, 0x3f804000},  // half tie: to even, up
      {from_bits(0xbf801000), 0xbf80, 0xbc00, 0xbf802000},
      {70000.0f, 0x4789, 0x7c00, 0x4788c000 & ~0x1fffu},  // beyond half
      {1.0e-6f, 0x3586, 0x0011, 0x35864000},              // a denormal half
      {INFINITY, 0x7f80, 0x7c00, 0x7f800000},
  };
  std::vector<float> in;
  for (const Case& each : cases) in.push_back(each.value);
  Buffer<float> g_in(in);
  Buffer<uint32_t> out(std::vector<uint32_t>(7 * cases.size()));
  launch_kernel(convert_kernel, dim3(1), dim3(32), 0, nullptr, g_in.data(), static_cast<int>(in.size()), out.data());
  const auto got = out.values();
  bool is_bf16 = true, is_f16 = true, is_relu = true, is_tf32 = true, is_intrinsic = true, is_half2 = true;
  for (size_t i = 0; i < cases.size(); ++i) {
    is_bf16 &= got[7 * i] == (cases[i].bf16 | 0xc000u << 16);
    is_f16 &= got[7 * i + 1] == (cases[i].f16 << 16 | 0xc000u);
    is_tf32 &= got[7 * i + 2] == cases[i].tf32;
    const float sum = from_bits(cases[i].bf16 << 16) + 1.5f;
    is_relu &= got[7 * i + 4] == (cases[i].f16 >= 0x8000 ? 0 : cases[i].f16 << 16);
    // The fused one rounds once, up from just above its tie.
    is_half2 &=
        from_bits(got[7 * i + 5]) == 0x1.00cp0f + 0x1.008p0f && from_bits(got[7 * i + 6]) == 0x1.008p0f - 0x1.004p0f;
    is_intrinsic &= std::memcmp(&sum, &got[7 * i + 3], sizeof sum) == 0;
  }
  report("pack_bf16", is_bf16);
  report("pack_f16", is_f16);
  report("pack_f16_relu", is_relu);
  report("to_tf32", is_tf32);
  report("bf16 and half intrinsics", is_intrinsic);
  report("half2 intrinsics", is_half2);
}

// ---- warp intrinsics ----

constexpr int kNumWarpResults = 20;

__global__ void warp_kernel(int* out) {
  const int lane = threadIdx.x, value = 100 + lane;
  int* row = out + kNumWarpResults * lane;
  row[0] = __shfl_sync(kAll, value, 5);
  row[1] = __shfl_sync(kAll, value, 3, 8);
  row[2] = __shfl_xor_sync(kAll, value, 9);
  row[3] = __shfl_down_sync(kAll, value, 3);
  row[4] = __shfl_up_sync(kAll, value, 3);
  row[5] = __shfl_down_sync(kAll, value, 3, 8);
  row[6] = static_cast<int>(__shfl_xor_sync(kAll, 0.5f * value, 1) * 2.0f);
  row[7] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  row[8] = __any_sync(kAll, lane == 31) + 2 * __any_sync(kAll, lane == 32);
  row[9] = __all_sync(kAll, lane >= 0) + 2 * __all_sync(kAll, lane > 0);
  row[10] = __reduce_add_sync(kAll, value);
  row[11] = __reduce_max_sync(kAll, -value);
  row[12] = __reduce_min_sync(kAll, -value);
  row[13] = static_cast<int>(__reduce_or_sync(kAll, 1u << lane));
  row[14] = static_cast<int>(__reduce_and_sync(kAll, static_cast<unsigned>(value)));
  row[15] = static_cast<int>(__reduce_xor_sync(kAll, static_cast<unsigned>(value)));
  // A subset of the lanes, inside a branch.
  row[16] = 0;
  if (lane % 2 == 0) row[16] = __shfl_xor_sync(0x55555555u, value, 2);
  row[17] = static_cast<int>(__reduce_max_sync(kAll, static_cast<unsigned>(-value)) >> 24);
  row[18] = static_cast<int>(__shfl_sync(kAll, static_cast<unsigned long long>(value) << 32, 7) >> 32);
  row[19] = static_cast<int>(__reduce_min_sync(kAll, static_cast<unsigned>(value)));
}

void test_warp() {
  Buffer<int> out(std::vector<int>(32 * kNumWarpResults));
  launch_kernel(warp_kernel, dim3(1), dim3(32), 0, nullptr, out.data());
  const auto got = out.values();
  bool is_shuffle = true, is_vote = true, is_reduction = true;
  for (int lane = 0; lane < 32; ++lane) {
    const int* row = &got[lane * kNumWarpResults];
    is_shuffle &= row[0] == 105 && row[1] == 100 + lane / 8 * 8 + 3 && row[2] == 100 + (lane ^ 9) &&
                  row[3] == 100 + (lane + 3 < 32 ? lane + 3 : lane) && row[4] == 100 + (lane >= 3 ? lane - 3 : lane) &&
                  row[5] == 100 + (lane % 8 + 3 < 8 ? lane + 3 : lane) && row[6] == 100 + (lane ^ 1) &&
                  row[16] == (lane % 2 == 0 ? 100 + (lane ^ 2) : 0) && row[18] == 107;
    is_vote &= row[7] == 0x49249249 && row[8] == 1 && row[9] == 1;
    int all_and = -1, all_xor = 0;
    for (int i = 100; i < 132; ++i) {
      all_and &= i;
      all_xor ^= i;
    }
    is_reduction &= row[10] == 32 * 100 + 31 * 16 && row[11] == -100 && row[12] == -131 && row[13] == -1 &&
                    row[14] == all_and && row[15] == all_xor && row[17] == 0xff && row[19] == 100;
  }
  report("shuffles", is_shuffle);
  report("votes", is_vote);
  report("reductions", is_reduction);
}

// ---- arithmetic ----

__global__ void arithmetic_kernel(float* out_float, int* out_int) {
  // 1 + 2^-24 and 1 - 2^-25 round up to nearest and must round down here; exact results stay.
  const float tiny = 5.9604644775390625e-8f;
  out_float[0] = __fmaf_rd(tiny, 1.0f, 1.0f);
  out_float[1] = __fmaf_rd(-tiny, 0.5f, 1.0f);
  out_float[2] = __fmaf_rd(3.0f, 0.5f, 0.25f);
  out_float[3] = __fmaf_rd(-1.0f, 1.0f, -tiny);
  out_float[4] = __fmaf_rn(tiny, 1.0f, 1.0f);
  out_float[6] = ptx::max_nan(-2.0f, -1.0f);
  out_float[7] = ptx::max_nan(1.0f, NAN);
  out_float[5] = __saturatef(1.5f) + __saturatef(-1.0f) + __saturatef(0.25f);
  out_int[0] = __vimax3_s32(-5, -7, -6);
  out_int[1] = __vimin3_s32(-5, -7, 6);
  out_int[2] = __float2int_rd(-1.5f);
  out_int[3] = __float2int_rn(2.5f);
  out_int[4] = __float2int_rz(-1.5f);
  out_int[5] = __float2int_ru(1.25f);
  out_int[6] = __float2int_rd(1e20f);
  out_int[7] = __popc(0xf0f0u) * 100 + __ffs(0x40) * 10 + __clz(1 << 30);
  out_int[8] = static_cast<int>(__umulhi(0x80000000u, 6));
  out_int[9] = __float_as_int(-0.0f);
}

void test_arithmetic() {
  Buffer<float> out_float(std::vector<float>(8));
  Buffer<int> out_int(std::vector<int>(10));
  launch_kernel(arithmetic_kernel, dim3(1), dim3(32), 0, nullptr, out_float.data(), out_int.data());
  auto got = out_float.values();
  report("max_nan", got[6] == -1.0f && std::isnan(got[7]));
  got.resize(6);
  const float below_one = std::nextafter(1.0f, 0.0f);
  report("__fmaf_rd and others", same_bits(got, {1.0f, below_one, 1.75f, std::nextafter(-1.0f, -2.0f), 1.0f, 1.25f}));
  report("__vimax3_s32 and others", same_bits(out_int.values(), {-5, -7, -2, 2, -1, 2, 0x7fffffff, 800 + 70 + 1, 3,
                                                                 static_cast<int>(0x80000000u)}));
}

// ---- atomics ----

__global__ void atomics_kernel(unsigned* g_total, float* g_sum, unsigned* out, float* out_float) {
  unsigned* s_word = reinterpret_cast<unsigned*>(dynamic_smem());
  int* s_signed = reinterpret_cast<int*>(s_word + 8);
  float* s_float = reinterpret_cast<float*>(s_word + 10);
  unsigned long long* s_long = reinterpret_cast<unsigned long long*>(s_word + 12);
  const unsigned thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < 8; ++i) s_word[i] = i == 2 || i == 4 ? 0xffffffffu : 0;
    s_signed[0] = s_signed[1] = 0;
    *s_float = 0.0f;
    *s_long = 0;
  }
  __syncthreads();
  atomicAdd(&s_word[0], thread);
  atomicMax(&s_word[1], thread * 3);
  atomicMin(&s_word[2], thread + 7);
  atomicOr(&s_word[3], 1u << thread % 32);
  atomicAnd(&s_word[4], ~(1u << thread % 16));
  atomicXor(&s_word[5], thread);
  if (thread == 33) atomicExch(&s_word[6], 77u);
  atomicCAS(&s_word[7], 0u, 5u);
  atomicMax(&s_signed[0], static_cast<int>(thread) - 40);
  atomicMin(&s_signed[1], static_cast<int>(thread) - 40);
  atomicAdd(s_float, 0.5f);
  atomicAdd(s_long, 1ull << 33);
  atomicAdd(g_total, 1u);
  atomicAdd(g_sum, 0.25f);
  __syncthreads();
  if (thread < 8) out[thread] = s_word[thread];
  if (thread < 2) out[8 + thread] = static_cast<unsigned>(s_signed[thread]);
  if (thread == 0) {
    *out_float = *s_float;
    out[10] = static_cast<unsigned>(*s_long >> 33);
  }
}

void test_atomics() {
  Buffer<unsigned> total({0}), out(std::vector<unsigned>(11));
  Buffer<float> sum({0}), out_float({0});
  launch_kernel(atomics_kernel, dim3(3), dim3(64), 64, nullptr, total.data(), sum.data(), out.data(), out_float.data());
  report("shared atomics", same_bits(out.values(), {2016, 189, 7, 0xffffffff, 0xffff0000, 0, 77, 5, 23,
                                                    static_cast<unsigned>(-40), 64}) &&
                               same_bits(out_float.values(), {32.0f}));
  report("global atomics", same_bits(total.values(), {192u}) && same_bits(sum.values(), {48.0f}));
}

// ---- named barriers: warps 0 and 1 hand values to warps 2 and 3 and back ----

__global__ void barrier_kernel(int* out) {
  int* s_value = reinterpret_cast<int*>(dynamic_smem());
  const int thread = threadIdx.x % 64;
  if (threadIdx.x < 64) {
    s_value[thread] = 3 * thread;
    ptx::barrier_arrive<1, 128>();
    ptx::barrier_sync<2, 128>();
    out[thread] = s_value[64 + thread];
  } else {
    ptx::barrier_sync<1, 128>();
    s_value[64 + thread] = s_value[63 - thread] + 1;
    ptx::barrier_sync<2, 128>();
  }
}

void test_barriers() {
  Buffer<int> out(std::vector<int>(64));
  launch_kernel(barrier_kernel, dim3(1), dim3(128), 512, nullptr, out.data());
  report("barrier_sync, barrier_arrive",
         same_bits(out.values(), made<int>(64, [](int i) { return 3 * (63 - i) + 1; })));
}

// ---- mbarriers, elect, setmaxnreg ----

__global__ void mbarrier_kernel(int* out) {
#ifdef HAS_HOPPER
  uint8_t* smem = dynamic_smem();
  int* s_value = reinterpret_cast<int*>(smem + 64);
  const uint32_t barrier = ptx::shared_address(smem);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 33);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) out[0] = ptx::mbarrier_test_wait(barrier, 1) + 2 * ptx::mbarrier_test_wait(barrier, 0);
  __syncthreads();
  if (warp == 0) {
    s_value[threadIdx.x] = 2 * threadIdx.x;
    ptx::mbarrier_arrive(barrier);
    if (ptx::elect_one()) ptx::mbarrier_arrive(barrier);
  } else {
    ptx::mbarrier_wait(barrier, 0);
    out[threadIdx.x] = s_value[63 - threadIdx.x] + 100 * ptx::mbarrier_test_wait(barrier, 0);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_inval(barrier);
    *reinterpret_cast<int*>(smem) = 4711;
    out[1] = *reinterpret_cast<int*>(smem);
  }
  const bool is_elected = ptx::elect_one();
  const uint32_t votes = __ballot_sync(kAll, is_elected);
  if (threadIdx.x == 0) out[2] = __popc(votes);
#endif
}

__global__ void __launch_bounds__(256, 1) setmaxnreg_kernel(int* out) {
#ifdef HAS_HOPPER
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_decrease<40>();
  } else {
    ptx::setmaxnreg_increase<232>();
  }
  out[threadIdx.x] = threadIdx.x;
#endif
}

void test_mbarriers() {
  Buffer<int> out(std::vector<int>(64));
  launch_kernel(mbarrier_kernel, dim3(1), dim3(64), 256, nullptr, out.data());
  const auto got = out.values();
  bool is_handed_over = true;
  for (int i = 32; i < 64; ++i) is_handed_over &= got[i] == 2 * (63 - i) + 100;
  report("mbarrier_init, _arrive, _test_wait, _wait", got[0] == 1 && is_handed_over);
  report("mbarrier_inval", got[1] == 4711);
  report("elect_one", got[2] == 1);
  Buffer<int> ids(std::vector<int>(256));
  launch_kernel(setmaxnreg_kernel, dim3(1), dim3(256), 0, nullptr, ids.data());
  report("setmaxnreg", same_bits(ids.values(), made<int>(256, [](int i) { return i; })));
}

// ---- TMA ----

struct Corner {
  int c[5];
};

template <int kRank>
__global__ void __launch_bounds__(128)
    tma_kernel(const __grid_constant__ TensorMap source, const __grid_constant__ TensorMap target, Corner from,
               Corner to, int bytes, bool adds, uint8_t* raw) {
#ifdef HAS_HOPPER
  uint8_t* smem = dynamic_smem();
  const uint32_t tile = ptx::shared_address(smem);
  const uint32_t barrier = tile + bytes;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::tma_prefetch_descriptor(&source);
    // The bytes in two announcements, the second with the arrival.
    ptx::mbarrier_expect_tx(barrier, bytes / 2);
    if constexpr (kRank == 2) ptx::tma_load(tile, &source, barrier, from.c[0], from.c[1]);
    if constexpr (kRank == 3) ptx::tma_load(tile, &source, barrier, from.c[0], from.c[1], from.c[2]);
    if constexpr (kRank == 4) ptx::tma_load(tile, &source, barrier, from.c[0], from.c[1], from.c[2], from.c[3]);
    if constexpr (kRank == 5) {
      ptx::tma_load(tile, &source, barrier, from.c[0], from.c[1], from.c[2], from.c[3], from.c[4]);
    }
    ptx::mbarrier_arrive_expect_tx(barrier, bytes - bytes / 2);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < bytes; i += 128) raw[i] = smem[i];
  // Through the generic proxy and back: the store must see it.
  for (int i = threadIdx.x; i < bytes; i += 128) smem[i] = raw[i];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (adds) {
      if constexpr (kRank == 2) ptx::tma_reduce_add(&target, tile, to.c[0], to.c[1]);
      if constexpr (kRank == 3) ptx::tma_reduce_add(&target, tile, to.c[0], to.c[1], to.c[2]);
      if constexpr (kRank == 4) ptx::tma_reduce_add(&target, tile, to.c[0], to.c[1], to.c[2], to.c[3]);
    } else {
      if constexpr (kRank == 2) ptx::tma_store(&target, tile, to.c[0], to.c[1]);
      if constexpr (kRank == 3) ptx::tma_store(&target, tile, to.c[0], to.c[1], to.c[2]);
      if constexpr (kRank == 4) ptx::tma_store(&target, tile, to.c[0], to.c[1], to.c[2], to.c[3]);
      if constexpr (kRank == 5) ptx::tma_store(&target, tile, to.c[0], to.c[1], to.c[2], to.c[3], to.c[4]);
    }
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
    ptx::tma_store_wait<0>();
  }
#endif
}

// A tensor of kRank dimensions, sizes 40 x 5 x 4 x 3 x 2 (innermost first), and boxes of it.
template <typename Element, int kRank>
void test_tma(const char* name, TensorMapElement type, int swizzle_bytes, bool adds) {
  const uint64_t all_sizes[5] = {40, 5, 4, 3, 2};
  const uint32_t inner = swizzle_bytes == 0 ? 32 / sizeof(Element) : swizzle_bytes / sizeof(Element);
  const uint32_t all_boxes[5] = {inner, 8, 2, 1, 2};
  TensorMapShape shape{type, nullptr, kRank, {}, {}, {}, swizzle_bytes};
  uint64_t elements = 1;
  int box_elements = 1;
  for (int i = 0; i < kRank; ++i) {
    shape.size[i] = all_sizes[i];
    shape.stride_bytes[i] = elements * sizeof(Element);
    shape.box[i] = all_boxes[i];
    elements *= all_sizes[i];
    box_elements *= static_cast<int>(all_boxes[i]);
  }
  // Reaches over the end of the innermost dimension and before the start of the second.
  const Corner from{{16, -2, 1, 2, 0}}, to{{8, 1, 2, 0, 1}};
  const int bytes = box_elements * static_cast<int>(sizeof(Element));

  const auto source = made<Element>(elements, [](int i) { return Element(static_cast<float>(small(i))); });
  auto expected = made<Element>(elements, [](int i) { return Element(static_cast<float>(small(3 * i + 1))); });
  Buffer<Element> g_source(source), g_target(expected);
  const std::vector<uint8_t> zeros(bytes);
  Buffer<uint8_t> raw(zeros);

  // Index of the element at a box's position, or -1 outside the tensor.
  const auto element_at = [&](const Corner& corner, int position) {
    int64_t index = 0, stride = 1;
    for (int i = 0; i < kRank; ++i) {
      const int64_t c = corner.c[i] + position % static_cast<int>(all_boxes[i]);
      position /= static_cast<int>(all_boxes[i]);
      if (c < 0 || c >= static_cast<int64_t>(all_sizes[i])) return int64_t{-1};
      index += c * stride;
      stride *= static_cast<int64_t>(all_sizes[i]);
    }
    return index;
  };
  std::vector<uint8_t> expected_raw(bytes);
  for (int position = 0; position < box_elements; ++position) {
    const int64_t taken = element_at(from, position), put = element_at(to, position);
    const Element value = taken < 0 ? Element(0.0f) : source[taken];
    if (put >= 0) {
      expected[put] = adds ? Element(static_cast<float>(expected[put]) + static_cast<float>(value)) : value;
    }
    // In shared memory: rows of `inner` elements; chunks of 16 bytes permuted within 8 rows (128), 8 (64) or 8 (32).
    const int row = position / static_cast<int>(inner);
    const int in_row = position % static_cast<int>(inner) * static_cast<int>(sizeof(Element));
    int chunk = in_row / 16;
    if (swizzle_bytes == 128) chunk ^= row % 8;
    if (swizzle_bytes == 64) chunk ^= row / 2 % 4;
    if (swizzle_bytes == 32) chunk ^= row / 4 % 2;
    const int offset = row * static_cast<int>(inner * sizeof(Element)) + chunk * 16 + in_row % 16;
    std::memcpy(&expected_raw[offset], &value, sizeof value);
  }

  shape.base = g_source.data();
  const TensorMap source_map = make_tensor_map(shape);
  shape.base = g_target.data();
  const TensorMap target_map = make_tensor_map(shape);
  launch_kernel(tma_kernel<kRank>, dim3(1), dim3(128), bytes + 16, nullptr, source_map, target_map, from, to, bytes,
                adds, raw.data());
  report(name, same_bits(raw.values(), expected_raw) && same_bits(g_target.values(), expected));
}

// ---- wgmma ----

#ifdef HAS_HOPPER

// A tile [num_mn, kTileK] in shared memory, in one of the layouts that a descriptor can name.
//   swizzled:   rows of S = 128, 64 or 32 bytes along the major index (a longer major index is cut into pieces of S
//   bytes, one
//               after the other), in them 16-byte chunks at chunk ^ row % 8, row / 2 % 4, row / 4 % 2
//   no swizzle: core matrices of 8 rows of 16 bytes, one after the other; those of the same 8 mn follow each other
constexpr int kTileK = 64;

template <ptx::Swizzle kSwizzle, ptx::Major kMajor>
struct TileLayout {
  static constexpr int kSpan = kSwizzle == ptx::Swizzle::kNone ? 16 : 256 >> static_cast<int>(kSwizzle);  // S
  static constexpr int kPiece = kSpan / 2;                                                                // elements

  static __device__ __forceinline__ int offset(int mn, int k, int num_mn) {
    const int along = kMajor == ptx::Major::kK ? k : mn, across = kMajor == ptx::Major::kK ? mn : k;
    if constexpr (kSwizzle == ptx::Swizzle::kNone) {
      return mn / 8 * kTileK * 16 + k / 8 * 128 + across % 8 * 16 + along % 8 * 2;
    }
    const int piece_bytes = (kMajor == ptx::Major::kK ? num_mn : kTileK) * kSpan;
    const int chunk = along % kPiece / 8 ^ across % 8 / (128 / kSpan);
    return along / kPiece * piece_bytes + across * kSpan + chunk * 16 + along % 8 * 2;
  }

  // Of the part that starts at k, a multiple of 16.
  static __device__ __forceinline__ uint64_t descriptor(uint32_t tile, int k, int num_mn) {
    if constexpr (kSwizzle == ptx::Swizzle::kNone) {
      return ptx::wgmma_descriptor(tile + k / 8 * 128, 128, kTileK * 16, kSwizzle);
    } else if constexpr (kMajor == ptx::Major::kK) {
      return ptx::wgmma_descriptor(tile + k / kPiece * num_mn * kSpan + k % kPiece * 2, 16, 8 * kSpan, kSwizzle);
    } else {
      const uint64_t whole = ptx::wgmma_descriptor(tile, kTileK * kSpan, 8 * kSpan, kSwizzle);
      return ptx::wgmma_descriptor_at(whole, k * kSpan);
    }
  }

  template <typename Element>
  static __device__ __forceinline__ void fill(uint8_t* tile, const float* values, int num_mn) {
    for (int i = threadIdx.x; i < num_mn * kTileK; i += 128) {
      *reinterpret_cast<Element*>(tile + offset(i / kTileK, i % kTileK, num_mn)) = Element(values[i]);
    }
  }
};

#endif

// a [64, 64] and b [N, 64] are indexed [mn][k]; out = 2 a b^T by two passes, the first of which ignores what acc held.
template <typename Element, int kN, ptx::Major kMajorA, ptx::Major kMajorB, bool kFromRegisters, ptx::Swizzle kSwizzle>
__global__ void __launch_bounds__(128) wgmma_kernel(const float* a, const float* b, float* out) {
#ifdef HAS_HOPPER
  using TileA = TileLayout<kSwizzle, kMajorA>;
  using TileB = TileLayout<kSwizzle, kMajorB>;
  constexpr int kK = kTileK;
  uint8_t* smem = dynamic_smem();
  uint8_t* tile_b = smem + 64 * kK * 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  TileA::template fill<Element>(smem, a, 64);
  TileB::template fill<Element>(tile_b, b, kN);
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t s_a = ptx::shared_address(smem), s_b = ptx::shared_address(tile_b);
  uint32_t registers[kK / 16][4];
  for (int k = 0; k < kK / 16; ++k) {
    for (int i = 0; i < 4; ++i) {
      const float* pair = &a[(warp * 16 + group + i % 2 * 8) * kK + k * 16 + 2 * quad + i / 2 * 8];
      registers[k][i] = ptx::pack<Element>(pair[0], pair[1]);
    }
  }
  float acc[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) acc[i] = 1000.0f;
  ptx::wgmma_pin(acc);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 2 * kK / 16; ++step) {
    const int k = step % (kK / 16);
    const uint64_t descriptor_b = TileB::descriptor(s_b, k * 16, kN);
    if constexpr (kFromRegisters) {
      ptx::wgmma_rs<Element, kMajorB>(acc, registers[k], descriptor_b, step != 0);
    } else {
      ptx::wgmma_ss<Element, kMajorA, kMajorB>(acc, TileA::descriptor(s_a, k * 16, 64), descriptor_b, step != 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const int row = warp * 16 + group + i / 2 % 2 * 8;
    out[row * kN + i / 4 * 8 + 2 * quad + i % 2] = acc[i];
  }
#endif
}

template <typename Element, int kN, ptx::Major kMajorA, ptx::Major kMajorB, bool kFromRegisters,
          ptx::Swizzle kSwizzle = ptx::Swizzle::k128>
void test_wgmma(const char* name) {
  const auto a = made<float>(64 * 64, [](int i) { return static_cast<float>(small(i)); });
  const auto b = made<float>(kN * 64, [](int i) { return static_cast<float>(small(i + 17)); });
  std::vector<float> expected(64 * kN);
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < kN; ++column) {
      for (int k = 0; k < 64; ++k) expected[row * kN + column] += 2 * a[row * 64 + k] * b[column * 64 + k];
    }
  }
  Buffer<float> g_a(a), g_b(b), out(std::vector<float>(64 * kN));
  launch_kernel(wgmma_kernel<Element, kN, kMajorA, kMajorB, kFromRegisters, kSwizzle>, dim3(1), dim3(128),
                (64 + kN) * 128, nullptr, g_a.data(), g_b.data(), out.data());
  report(name, same_bits(out.values(), expected));
}

void test_hopper() {
  using ptx::Major;
  using ptx::Swizzle;
  test_stmatrix();
  test_mbarriers();
  test_tma<__nv_bfloat16, 2>("tma 2D, bf16, no swizzle", TensorMapElement::kBFloat16, 0, false);
  test_tma<__nv_bfloat16, 3>("tma 3D, bf16, swizzle 128", TensorMapElement::kBFloat16, 128, false);
  test_tma<__half, 4>("tma 4D, fp16, swizzle 64", TensorMapElement::kFloat16, 64, false);
  test_tma<float, 5>("tma 5D, float, swizzle 32", TensorMapElement::kFloat32, 32, false);
  test_tma<float, 2>("tma_reduce_add 2D, float, swizzle 128", TensorMapElement::kFloat32, 128, true);
  test_tma<__nv_bfloat16, 3>("tma_reduce_add 3D, bf16, swizzle 64", TensorMapElement::kBFloat16, 64, true);
  test_tma<__half, 4>("tma_reduce_add 4D, fp16, no swizzle", TensorMapElement::kFloat16, 0, true);
  test_wgmma<__nv_bfloat16, 64, Major::kK, Major::kK, false>("wgmma_ss n64, bf16, A K, B K");
  test_wgmma<__half, 96, Major::kMn, Major::kK, false>("wgmma_ss n96, fp16, A M, B K");
  test_wgmma<__half, 128, Major::kK, Major::kMn, false>("wgmma_ss n128, fp16, A K, B N");
  test_wgmma<__nv_bfloat16, 192, Major::kMn, Major::kMn, false>("wgmma_ss n192, bf16, A M, B N");
  test_wgmma<__nv_bfloat16, 256, Major::kK, Major::kK, false>("wgmma_ss n256, bf16, A K, B K");
  test_wgmma<__nv_bfloat16, 64, Major::kK, Major::kMn, false, Swizzle::k64>("wgmma_ss n64, bf16, A K, B N, swizzle 64");
  test_wgmma<__half, 96, Major::kMn, Major::kK, false, Swizzle::k64>("wgmma_ss n96, fp16, A M, B K, swizzle 64");
  test_wgmma<__half, 64, Major::kMn, Major::kMn, false, Swizzle::k32>("wgmma_ss n64, fp16, A M, B N, swizzle 32");
  test_wgmma<__nv_bfloat16, 96, Major::kK, Major::kK, false, Swizzle::k32>("wgmma_ss n96, bf16, A K, B K, swizzle 32");
  test_wgmma<__nv_bfloat16, 128, Major::kK, Major::kMn, false, Swizzle::kNone>("wgmma_ss n128, bf16, A K, B N, none");
  test_wgmma<__half, 64, Major::kMn, Major::kK, false, Swizzle::kNone>("wgmma_ss n64, fp16, A M, B K, none");
  test_wgmma<__nv_bfloat16, 64, Major::kK, Major::kMn, true>("wgmma_rs n64, bf16, B N");
  test_wgmma<__half, 96, Major::kK, Major::kK, true>("wgmma_rs n96, fp16, B K");
  test_wgmma<__nv_bfloat16, 128, Major::kK, Major::kK, true>("wgmma_rs n128, bf16, B K");
  test_wgmma<__half, 192, Major::kK, Major::kMn, true>("wgmma_rs n192, fp16, B N");
  test_wgmma<__nv_bfloat16, 256, Major::kK, Major::kMn, true>("wgmma_rs n256, bf16, B N");
}

bool has_hopper() {
  int device = 0, major = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
#ifdef __CUDA_ARCH_LIST__
  bool is_compiled = false;
  for (const int arch : {__CUDA_ARCH_LIST__}) is_compiled |= arch == 900;
#else
  const bool is_compiled = true;
#endif
  return major == 9 && is_compiled;
}

}  // namespace

int main() {
  test_cp_async();
  test_ldmatrix();
  test_mma<__nv_bfloat16>("mma_m16n8k16_bf16");
  test_mma<__half>("mma_m16n8k16_f16");
  test_mma<float>("mma_m16n8k8_tf32");
  test_conversions();
  test_warp();
  test_arithmetic();
  test_atomics();
  test_barriers();
  if (has_hopper()) {
    test_mma_rounding();
    test_hopper();
  } else {
    std::printf("       the Hopper cases need an sm_90 device and code for sm_90a\n");
  }
  std::printf("%d failures\n", num_failures);
  return num_failures;
}
