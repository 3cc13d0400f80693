#include "scalar.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "rendezvous.h"

namespace simt {

void execute_setp_ne(const PtxCall& call) { call.set_u32(0, call.u32(1) != call.u32(2)); }
void execute_selp(const PtxCall& call) { call.set_u32(0, call.u32(3) != 0 ? call.u32(1) : call.u32(2)); }

// The first source operand ends in the upper half.
void execute_cvt_bf16x2(const PtxCall& call) {
  call.set_u32(0, static_cast<uint32_t>(float_to_bf16_bits(call.f32(1))) << 16 | float_to_bf16_bits(call.f32(2)));
}
void execute_cvt_f16x2(const PtxCall& call) {
  call.set_u32(0, static_cast<uint32_t>(float_to_half_bits(call.f32(1))) << 16 | float_to_half_bits(call.f32(2)));
}
void execute_cvt_f16x2_relu(const PtxCall& call) {
  const auto positive = [](float value) { return value < 0.0f ? 0.0f : value; };  // NaN stays
  call.set_u32(0, static_cast<uint32_t>(float_to_half_bits(positive(call.f32(1)))) << 16 |
                      float_to_half_bits(positive(call.f32(2))));
}

// 10 bits of mantissa; adding half a unit to the magnitude rounds ties away from zero, and into the exponent if it
// must.
void execute_cvt_tf32(const PtxCall& call) {
  const uint32_t bits = call.u32(1);
  const bool is_finite = (bits & 0x7f800000) != 0x7f800000;
  call.set_u32(0, is_finite ? (bits + 0x1000) & ~uint32_t{0x1fff} : std::isnan(call.f32(1)) ? 0x7fffffff : bits);
}

// The canonical NaN if either operand is one; +0 counts as above -0.
void execute_max_nan(const PtxCall& call) {
  const float a = call.f32(1), b = call.f32(2);
  if (std::isnan(a) || std::isnan(b)) return call.set_u32(0, 0x7fffffff);
  call.set_f32(0, a > b || (a == b && !std::signbit(a)) ? a : b);
}

// Which lane is elected is not defined, only that it is always the same: seeds differ in it.
void execute_elect(const PtxCall& call) {
  if (call.u32(1) != kFullWarp) fail("elect.sync at %s: only of whole warps", source_line(call.site).c_str());
  const auto nothing = [](LaneArguments, uint32_t) {};
  rendezvous(kFullWarp, call.instruction->opcode, nullptr, nothing, call.site, Aligned::kNo);
  const int elected = static_cast<int>(options.seed < 2 ? options.seed * 31 : options.seed % kWarpSize);
  call.set_u32(0, current->lane == elected);
}

// Registers are not modelled; that the warp executes it together is.
void execute_setmaxnreg(const PtxCall& call) {
  const auto nothing = [](LaneArguments, uint32_t) {};
  rendezvous(kFullWarp, call.instruction->opcode, nullptr, nothing, call.site, Aligned::kYes);
}

}  // namespace simt
