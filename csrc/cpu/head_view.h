// One (batch, head) of a problem: pointers, the keys each row may see, the units of its scores.
#pragma once

#include "cpu/simd.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {

constexpr int kPanelCols = 64;  // keys that are packed, scanned and masked together

inline int64_t panels_of(int64_t num_keys) { return (num_keys + kPanelCols - 1) / kPanelCols; }

// The scan works on u = <query_factor * q, k> + bias_factor * bias, so that z = (alpha - 1) * score = unit * u.
// query_factor is a power of two times the sign of scale (exact in every dtype) and 1 <= unit < 2, so thresholds on u
// stay in range whatever scale is; scale = 0 makes every product zero and leaves the bias.
template <class Real>
struct Units {
  Real query_factor, unit, bias_factor;

  Units(double alpha, double scale) {
    const double factor = (alpha - 1) * scale;
    int exponent = 0;
    const double mantissa = std::frexp(std::fabs(factor), &exponent);  // in [1/2, 1)
    const double magnitude = factor == 0 ? 0 : std::ldexp(1.0, exponent - 1);
    query_factor = static_cast<Real>(std::copysign(magnitude, factor));
    unit = static_cast<Real>(factor == 0 ? 1.0 : 2 * mantissa);
    bias_factor = static_cast<Real>((alpha - 1) / (factor == 0 ? 1.0 : 2 * mantissa));
  }
};

inline double head_alpha(const AttentionProblem& problem, int64_t batch, int64_t head) {
  if (problem.alpha_heads == nullptr) return problem.alpha;
  return problem.alpha_heads[batch * problem.alpha_stride_batch + head * problem.alpha_stride_head];
}

template <class Element>
const Element* row_pointer(const Rows& rows, int64_t batch, int64_t head, int64_t row = 0) {
  return static_cast<const Element*>(rows.data) + batch * rows.stride_batch + head * rows.stride_head +
         row * rows.stride_row;
}

template <class Element>
Element* mutable_row_pointer(const Rows& rows, int64_t batch, int64_t head, int64_t row = 0) {
  return const_cast<Element*>(row_pointer<Element>(rows, batch, head, row));
}

// The keys of a sequence that take part: key_lengths applied.
inline int64_t length_of(const AttentionProblem& problem, int64_t batch) {
  if (problem.key_lengths == nullptr) return problem.num_keys;
  return std::clamp<int64_t>(problem.key_lengths[batch], 0, problem.num_keys);
}

template <class Element>
struct HeadView {
  const AttentionProblem& problem;
  int64_t batch, head, kv_head;
  double alpha;
  Units<Accumulator<Element>> units;
  int64_t num_keys;  // that take part

  HeadView(const AttentionProblem& p, int64_t batch_index, int64_t head_index)
      : problem(p),
        batch(batch_index),
        head(head_index),
        kv_head(head_index / (p.num_heads / p.num_kv_heads)),
        alpha(head_alpha(p, batch_index, head_index)),
        units(alpha, p.scale),
        num_keys(length_of(p, batch_index)) {}

  int64_t index() const { return batch * problem.num_heads + head; }
  const Element* query(int64_t row) const { return row_pointer<Element>(problem.query, batch, head, row); }
  const Element* key(int64_t row) const { return row_pointer<Element>(problem.key, batch, kv_head, row); }
  const Element* value(int64_t row) const { return row_pointer<Element>(problem.value, batch, kv_head, row); }

  // Keys 0 .. key_end(row) - 1 may take part (attn_mask aside).
  int64_t key_end(int64_t row) const {
    if (problem.key_lengths != nullptr && problem.num_queries == problem.num_keys && row >= num_keys) return 0;
    if (!problem.is_causal) return num_keys;
    return std::clamp<int64_t>(row + problem.num_keys - problem.num_queries + 1, 0, num_keys);
  }
};

// One row of attn_mask over one panel.
template <class Real>
struct MaskPanel {
  uint64_t allowed;  // bit per key
  bool has_bias;
  alignas(64) Real bias[kPanelCols];  // in units of u, where has_bias
};

// Bit per key of the first `count` keys of a panel (count may be anything).
inline uint64_t allowed_keys(int64_t count) {
  return count >= kPanelCols ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1;
}

template <class Real, class MaskElement>
ADASPLASH2_INLINE void load_bias(const MaskElement* mask, int64_t stride_col, int count, Real factor, Real* bias) {
  for (int j = 0; j < count; ++j) bias[j] = factor * static_cast<Real>(load_one(mask + j * stride_col));
}

template <class Element>
void load_mask_panel(const HeadView<Element>& view, int64_t row, int64_t first_key, int64_t key_end,
                     MaskPanel<Accumulator<Element>>& panel) {
  const int count = static_cast<int>(std::clamp<int64_t>(key_end - first_key, 0, kPanelCols));
  panel.allowed = allowed_keys(count);
  panel.has_bias = false;
  const Mask& mask = view.problem.mask;
  if (mask.data == nullptr || count == 0) return;
  const int64_t offset = view.batch * mask.stride_batch + view.head * mask.stride_head + row * mask.stride_row +
                         first_key * mask.stride_col;
  if (mask.dtype == DataType::kBool) {
    const uint8_t* flags = static_cast<const uint8_t*>(mask.data) + offset;
    uint64_t allowed = 0;
    for (int j = 0; j < count; ++j) allowed |= uint64_t{flags[j * mask.stride_col] != 0} << j;
    panel.allowed = allowed;
    return;
  }
  panel.has_bias = true;
  for (int j = count; j < kPanelCols; ++j) panel.bias[j] = 0;
  load_bias(static_cast<const Element*>(mask.data) + offset, mask.stride_col, count, view.units.bias_factor,
            panel.bias);
}

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
