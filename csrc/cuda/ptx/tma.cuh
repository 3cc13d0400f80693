// Tensor memory accelerator: boxes of a tensor between global and shared memory, 2 to 5 dimensions (sm_90).
// PTX ISA: "Data Movement and Conversion Instructions: Tensor copy" (cp.async.bulk.tensor, cp.reduce.async.bulk.tensor)
// and "Bulk copy" (cp.async.bulk.commit_group, .wait_group).
//
// One thread issues. Coordinates are in elements, innermost dimension first; what lies outside the tensor is read as
// zero and never written. The shared address is 128-byte aligned (1024 with the 128-byte swizzle).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <ptx_macro.cuh>
#include <tensor_map.cuh>

namespace adasplash2::ptx {

static __device__ __forceinline__ void tma_prefetch_descriptor(const TensorMap* map) {
  PTX_MEMORY("prefetch.tensormap [%0];", (), (PTX_IN_L(map)));
}

// Loads complete on `mbarrier`, which counts the bytes of the whole box.
static __device__ __forceinline__ void tma_load(uint32_t destination, const TensorMap* map, uint32_t mbarrier, int c0,
                                                int c1) {
  PTX_MEMORY("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];",
             (), (PTX_IN_R(destination), PTX_IN_L(map), PTX_IN_R(mbarrier), PTX_IN_R(c0), PTX_IN_R(c1)));
}

static __device__ __forceinline__ void tma_load(uint32_t destination, const TensorMap* map, uint32_t mbarrier, int c0,
                                                int c1, int c2) {
  PTX_MEMORY(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];", (),
      (PTX_IN_R(destination), PTX_IN_L(map), PTX_IN_R(mbarrier), PTX_IN_R(c0), PTX_IN_R(c1), PTX_IN_R(c2)));
}

static __device__ __forceinline__ void tma_load(uint32_t destination, const TensorMap* map, uint32_t mbarrier, int c0,
                                                int c1, int c2, int c3) {
  PTX_MEMORY(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];",
      (),
      (PTX_IN_R(destination), PTX_IN_L(map), PTX_IN_R(mbarrier), PTX_IN_R(c0), PTX_IN_R(c1), PTX_IN_R(c2),
       PTX_IN_R(c3)));
}

static __device__ __forceinline__ void tma_load(uint32_t destination, const TensorMap* map, uint32_t mbarrier, int c0,
                                                int c1, int c2, int c3, int c4) {
  PTX_MEMORY(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];",
      (),
      (PTX_IN_R(destination), PTX_IN_L(map), PTX_IN_R(mbarrier), PTX_IN_R(c0), PTX_IN_R(c1), PTX_IN_R(c2), PTX_IN_R(c3),
       PTX_IN_R(c4)));
}

static __device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t source, int c0, int c1) {
  PTX_MEMORY("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];", (),
             (PTX_IN_L(map), PTX_IN_R(source), PTX_IN_R(c0), PTX_IN_R(c1)));
}

static __device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t source, int c0, int c1, int c2) {
  PTX_MEMORY("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];", (),
             (PTX_IN_L(map), PTX_IN_R(source), PTX_IN_R(c0), PTX_IN_R(c1), PTX_IN_R(c2)));
}

static __device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t source, int c0, int c1, int c2,
                                                 int c3) {
  PTX_MEMORY("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];", (),
             (PTX_IN_L(map), PTX_IN_R(source), PTX_IN_R(c0), PTX_IN_R(c1), PTX_IN_R(c2), PTX_IN_R(c3)));
}

static __device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t source, int c0, int c1, int c2, int c3,
                                                 int c4) {
  PTX_MEMORY("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];", (),
             (PTX_IN_L(map), PTX_IN_R(source), PTX_IN_R(c0), PTX_IN_R(c1), PTX_IN_R(c2), PTX_IN_R(c3), PTX_IN_R(c4)));
}

// Adds the box to global memory, element by element, each addition atomic.
static __device__ __forceinline__ void tma_reduce_add(const TensorMap* map, uint32_t source, int c0, int c1) {
  PTX_MEMORY("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];", (),
             (PTX_IN_L(map), PTX_IN_R(source), PTX_IN_R(c0), PTX_IN_R(c1)));
}

static __device__ __forceinline__ void tma_reduce_add(const TensorMap* map, uint32_t source, int c0, int c1, int c2) {
  PTX_MEMORY("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4}], [%1];", (),
             (PTX_IN_L(map), PTX_IN_R(source), PTX_IN_R(c0), PTX_IN_R(c1), PTX_IN_R(c2)));
}

static __device__ __forceinline__ void tma_reduce_add(const TensorMap* map, uint32_t source, int c0, int c1, int c2,
                                                      int c3) {
  PTX_MEMORY("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4, %5}], [%1];", (),
             (PTX_IN_L(map), PTX_IN_R(source), PTX_IN_R(c0), PTX_IN_R(c1), PTX_IN_R(c2), PTX_IN_R(c3)));
}

// Closes the group of all stores and reductions that this thread issued since the last commit.
static __device__ __forceinline__ void tma_store_commit() { PTX_MEMORY("cp.async.bulk.commit_group;", (), ()); }

// Waits until at most kPending of the newest groups are still reading shared memory: it may then be written again.
template <int kPending>
static __device__ __forceinline__ void tma_store_wait_read() {
  PTX_MEMORY("cp.async.bulk.wait_group.read %0;", (), (PTX_IN_N(kPending)));
}

// Waits until at most kPending of the newest groups are incomplete: their global writes are visible to this thread.
template <int kPending>
static __device__ __forceinline__ void tma_store_wait() {
  PTX_MEMORY("cp.async.bulk.wait_group %0;", (), (PTX_IN_N(kPending)));
}

}  // namespace adasplash2::ptx
