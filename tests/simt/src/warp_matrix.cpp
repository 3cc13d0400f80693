#include "warp_matrix.h"

#include <algorithm>

#include "counters.h"
#include "matrix.h"
#include "rendezvous.h"
#include "shadow.h"

namespace simt {

namespace {

const PtxCall& call_of(LaneArguments lanes, int lane) { return *static_cast<const PtxCall*>(lanes[lane]); }

void* as_argument(const PtxCall& call) { return const_cast<PtxCall*>(&call); }

// ---- mma.sync: operands are acc (4), a (4), b (2), acc again ----

constexpr int kAcc = 0, kA = 4, kB = 8, kAccIn = 10;

void load_accumulators(LaneArguments lanes, float (*c)[8]) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int group = lane / 4, quad = lane % 4;
    for (int i = 0; i < 4; ++i) c[group + 8 * (i / 2)][2 * quad + i % 2] = call_of(lanes, lane).f32(kAccIn + i);
  }
}

void store_accumulators(LaneArguments lanes, const float (*c)[8]) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int group = lane / 4, quad = lane % 4;
    for (int i = 0; i < 4; ++i) call_of(lanes, lane).set_f32(kAcc + i, c[group + 8 * (i / 2)][2 * quad + i % 2]);
  }
}

void multiply_k16(LaneArguments lanes, uint32_t) {
  ++counters.mma;
  const auto element = static_cast<MatrixElement>(call_of(lanes, 0).parameter());
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const PtxCall& call = call_of(lanes, lane);
    const int group = lane / 4, quad = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = call.u32(kA + i);
      float* target = &a[group + 8 * (i % 2)][2 * quad + 8 * (i / 2)];
      target[0] = element_value(element, static_cast<uint16_t>(pair));
      target[1] = element_value(element, static_cast<uint16_t>(pair >> 16));
    }
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = call.u32(kB + i);
      b[2 * quad + 8 * i][group] = element_value(element, static_cast<uint16_t>(pair));
      b[2 * quad + 8 * i + 1][group] = element_value(element, static_cast<uint16_t>(pair >> 16));
    }
  }
  load_accumulators(lanes, c);
  multiply_add<8>(&a[0][0], 16, b, c, 16, 8, 16);
  store_accumulators(lanes, c);
}

void multiply_k8_tf32(LaneArguments lanes, uint32_t) {
  ++counters.mma;
  const auto tf32 = [](uint32_t bits) { return __uint_as_float(bits & ~uint32_t{0x1fff}); };
  float a[16][8], b[8][8], c[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const PtxCall& call = call_of(lanes, lane);
    const int group = lane / 4, quad = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + 8 * (i % 2)][quad + 4 * (i / 2)] = tf32(call.u32(kA + i));
    for (int i = 0; i < 2; ++i) b[quad + 4 * i][group] = tf32(call.u32(kB + i));
  }
  load_accumulators(lanes, c);
  multiply_add<8>(&a[0][0], 8, b, c, 16, 8, 8);
  store_accumulators(lanes, c);
}

// ---- ldmatrix, stmatrix ----

constexpr uint32_t kRowBytes = 16;

// One matrix is a phase of 8 rows; rows on the same 16-byte group of banks, unless identical, take turns.
int wavefronts(const uint32_t (&rows)[8]) {
  int rows_in_group[8] = {};
  for (int i = 0; i < 8; ++i) {
    if (std::find(rows, rows + i, rows[i]) == rows + i) ++rows_in_group[rows[i] / kRowBytes % 8];
  }
  return *std::max_element(rows_in_group, rows_in_group + 8);
}

uint32_t checked_row(const PtxCall& call, int operand) {
  const uint32_t address = call.u32(operand);
  if (address % kRowBytes != 0) {
    fail("MISALIGNED row of %s at %s: shared offset %u is no multiple of 16", call.instruction->opcode,
         source_line(call.site).c_str(), address - kSharedWindow);
  }
  return address;
}

void load_matrices(LaneArguments lanes, uint32_t) {
  ++counters.ldmatrix;
  const int num_matrices = call_of(lanes, 0).parameter() % kTransposed;
  const bool is_transposed = call_of(lanes, 0).parameter() >= kTransposed;
  for (int matrix = 0; matrix < num_matrices; ++matrix) {
    uint16_t elements[8][8];
    uint32_t rows[8];
    for (int i = 0; i < 8; ++i) {
      const int lane = matrix * 8 + i;
      const PtxCall& call = call_of(lanes, lane);
      rows[i] = checked_row(call, num_matrices);
      const uint8_t* source = shared_pointer(rows[i], kRowBytes, call.site);
      record_read(block.thread(current->warp, lane), rows[i], kRowBytes, call.site);
      std::memcpy(elements[i], source, kRowBytes);
    }
    counters.ldmatrix_wavefronts += static_cast<uint64_t>(wavefronts(rows));
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int group = lane / 4, quad = lane % 4;
      const uint16_t low = is_transposed ? elements[2 * quad][group] : elements[group][2 * quad];
      const uint16_t high = is_transposed ? elements[2 * quad + 1][group] : elements[group][2 * quad + 1];
      call_of(lanes, lane).set_u32(matrix, low | static_cast<uint32_t>(high) << 16);
    }
  }
}

void store_matrices(LaneArguments lanes, uint32_t) {
  ++counters.stmatrix;
  const int num_matrices = call_of(lanes, 0).parameter() % kTransposed;
  const bool is_transposed = call_of(lanes, 0).parameter() >= kTransposed;
  for (int matrix = 0; matrix < num_matrices; ++matrix) {
    uint16_t elements[8][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int group = lane / 4, quad = lane % 4;
      const uint32_t pair = call_of(lanes, lane).u32(1 + matrix);
      for (int half = 0; half < 2; ++half) {
        const auto bits = static_cast<uint16_t>(pair >> 16 * half);
        (is_transposed ? elements[2 * quad + half][group] : elements[group][2 * quad + half]) = bits;
      }
    }
    uint32_t rows[8];
    for (int i = 0; i < 8; ++i) {
      const int lane = matrix * 8 + i;
      const PtxCall& call = call_of(lanes, lane);
      rows[i] = checked_row(call, 0);
      uint8_t* target = shared_pointer(rows[i], kRowBytes, call.site);
      record_write(block.thread(current->warp, lane), rows[i], kRowBytes, call.site);
      std::memcpy(target, elements[i], kRowBytes);
    }
    counters.stmatrix_wavefronts += static_cast<uint64_t>(wavefronts(rows));
  }
}

void meet(const PtxCall& call, WarpOperation operation) {
  rendezvous(kFullWarp, call.instruction->opcode, as_argument(call), operation, call.site, Aligned::kYes);
}

}  // namespace

void execute_mma_k16(const PtxCall& call) { meet(call, &multiply_k16); }
void execute_mma_k8_tf32(const PtxCall& call) { meet(call, &multiply_k8_tf32); }
void execute_ldmatrix(const PtxCall& call) { meet(call, &load_matrices); }
void execute_stmatrix(const PtxCall& call) { meet(call, &store_matrices); }

}  // namespace simt
