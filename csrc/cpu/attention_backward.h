// Backward pass: with w = p^(2 - alpha), dP = dO V^T, delta_i = sum_j w_ij dP_ij / sum_j w_ij and dS = w (dP - delta):
//
//   dQ = sigma dS K,   dK = sigma dS^T Q,   dV = P^T dO,   d mask = dS,   d alpha: gradient_by_alpha() below
//
// Row blocks whose support was saved (support_layout.h) touch the support and nothing else, in two steps:
//   rows   a chunk of row blocks gathers rows of V and K: p, dS and dQ
//   keys   a range of keys whose dK and dV fit the cache goes through all rows and adds what each has in the range
// The chunks are taken in waves that bound the memory of p and dS. Row blocks that were not saved are recomputed in
// strips (dense.h) and accumulate dK and dV in float, a fixed number of parts per kv head, added up in order. So every
// sum has one order: results are the same bits for any number of threads.
#pragma once

#include "cpu/attention_forward.h"
#include "cpu/scatter.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {

// Of p and dS of a wave: enough entries to keep the threads busy, so few that they stay in the last level cache.
constexpr int64_t kWaveBytesPerThread = int64_t{16} << 20, kMostWaveBytes = int64_t{64} << 20;
constexpr int64_t kScatteredVectors = 16;  // with AVX-512 half of the registers; otherwise they are read again from L1
constexpr int64_t kDenseParts = 16;        // tasks of the strips, at least, if the problem has as many row blocks

// One row: weights and gradients on its support, or on a whole strip row (where prob 0 means outside).
template <class Real, Exponent kExponent>
struct RowGradient {
  const Power<Real, kExponent>& power;
  double alpha;

  // gap -> prob in place, dP -> dS in place; both are read up to the next whole vector. gap is 0 past the end.
  void operator()(Real* gap, Real* grad_prob, int64_t size) const {
    Vector<Real> weight_sum = {}, weighted = {};
    const Vector<Real> zero = {};
    for (int64_t j = 0; j < size; j += kLanes<Real>) {
      const Vector<Real> g = load(gap + j), weight = power.weight(g);
      weight_sum += weight;
      weighted += g > zero ? weight * load(grad_prob + j) : zero;  // outside the support dP may be anything, NaN too
    }
    const Real total = reduce_add<Real>(weight_sum);
    const Real delta = total > 0 ? reduce_add<Real>(weighted) / total : Real(0);
    for (int64_t j = 0; j < size; j += kLanes<Real>) {
      const Vector<Real> g = load(gap + j);
      store(grad_prob + j, g > zero ? power.weight(g) * (load(grad_prob + j) - delta) : zero);
      store(gap + j, power.prob(g));
    }
  }

  // sum_j dP_j dp_j / dalpha (Correia et al. 2019), with h = -p log p and pt = w / sum w:
  //   dp/dalpha = (p - pt) / (alpha - 1)^2 + (h - pt sum h) / (alpha - 1)
  double gradient_by_alpha(const Real* gap, const Real* grad_prob, int64_t size) const {
    const double b = 1 / (alpha - 1);
    double weight_sum = 0, entropy = 0, prob_dot = 0, weight_dot = 0, entropy_dot = 0;
    for (int64_t j = 0; j < size; ++j) {
      if (!(gap[j] > 0)) continue;
      const double g = gap[j], log_g = std::log(g), weight = std::exp((b - 1) * log_g), prob = weight * g;
      const double h = prob > 0 ? -prob * b * log_g : 0;
      weight_sum += weight;
      entropy += h;
      prob_dot += prob * grad_prob[j];
      weight_dot += weight * grad_prob[j];
      entropy_dot += h * grad_prob[j];
    }
    if (!(weight_sum > 0)) return 0;
    const double delta = weight_dot / weight_sum;
    return (prob_dot - delta) * b * b + (entropy_dot - delta * entropy) * b;
  }
};

// Everything the steps share.
template <class Element>
struct BackwardContext {
  using Real = Accumulator<Element>;
  const AttentionBackward& params;
  const SupportLayout layout;
  const int64_t group_heads;    // query heads per kv head
  const int64_t num_kv;         // B * Hkv
  const int64_t blocks_per_kv;  // row blocks of a kv head: (query head in the group, block), in this order
  Buffer<double> alpha_rows;    // (B, H, Nq), where the gradient by alpha is wanted

  explicit BackwardContext(const AttentionBackward& p)
      : params(p),
        layout(p),
        group_heads(p.num_heads / p.num_kv_heads),
        num_kv(p.batch * p.num_kv_heads),
        blocks_per_kv(group_heads * layout.blocks_per_head) {
    if (p.grad_alpha != nullptr) alpha_rows.reserve(layout.num_rows);
  }

  HeadView<Element> view(int64_t kv, int64_t block_of_kv) const {
    return {params, kv / params.num_kv_heads,
            kv % params.num_kv_heads * group_heads + block_of_kv / layout.blocks_per_head};
  }
  int64_t row_index(const HeadView<Element>& view, int64_t row) const {
    return view.index() * params.num_queries + row;
  }
  // Null if the block was not saved.
  const char* saved_block(int64_t kv, int64_t block_of_kv) const {
    return layout.saved_block(
        params.support, view(kv, block_of_kv).index() * layout.blocks_per_head + block_of_kv % layout.blocks_per_head);
  }
  const Real* origin(int64_t row_index) const {
    return reinterpret_cast<const Real*>(static_cast<const char*>(params.support) + layout.origin_offset(row_index));
  }
  // Adding a constant to a row's scores changes nothing: a mask that is one number a row has the gradient zero.
  bool wants_mask() const { return params.grad_mask != nullptr && params.mask.stride_col != 0; }
  Real* grad_mask_row(const HeadView<Element>& view, int64_t row) const {
    return static_cast<Real*>(params.grad_mask) + view.batch * params.mask.stride_batch +
           view.head * params.mask.stride_head + row * params.mask.stride_row;
  }
  bool wants_keys() const { return params.grad_key.data != nullptr || params.grad_value.data != nullptr; }
  // Do elements of the mask's gradient belong to several rows or heads?
  bool shares_mask() const {
    const Mask& mask = params.mask;
    return wants_mask() &&
           ((mask.stride_row == 0 && params.num_queries > 1) || (mask.stride_head == 0 && params.num_heads > 1) ||
            (mask.stride_batch == 0 && params.batch > 1));
  }
  bool has_key_step() const { return wants_keys() || (wants_mask() && params.mask.stride_row == 0); }

  void write_grad_query(const HeadView<Element>& view, int64_t row, const Real* sum) const {
    Element* to = mutable_row_pointer<Element>(params.grad_query, view.batch, view.head, row);
    const Real tau_shifted = origin(row_index(view, row))[1];
    const Real factor = tau_shifted == tau_shifted ? static_cast<Real>(params.scale) : tau_shifted;  // NaN row: NaN
    for (int64_t d = 0; d < params.head_dim; d += kLanes<Real>) store(to + d, load(sum + d) * factor);
  }
};

// dK and dV of the first keys of one kv head before they are final, in the accumulation type.
template <class Real>
struct KeyGradients {
  Buffer<Real> data;
  int64_t num_keys = 0, key_dim = 0, value_dim = 0;

  void set_zero(int64_t keys, const AttentionProblem& problem) {
    num_keys = keys;
    key_dim = problem.head_dim;
    value_dim = problem.value_head_dim;
    std::fill_n(data.reserve(size()), size(), Real(0));
  }
  void add(const KeyGradients& other) {
    for (int64_t i = 0; i < size(); ++i) data[i] += other.data[i];
  }
  // Strips are accumulated by groups of keys: room for one past the last key.
  int64_t size() const { return (num_keys + kTileRows) * (key_dim + value_dim); }
  Real* key(int64_t index) { return data.data() + index * key_dim; }
  Real* value(int64_t index) { return data.data() + (num_keys + kTileRows) * key_dim + index * value_dim; }
};

// ---- strips: row blocks that were not saved
// ---------------------------------------------------------------------------

template <class Element>
class StripGradientWorker {
  using Real = Accumulator<Element>;

 public:
  StripGradientWorker(BackwardContext<Element>& context, PackedPanels<Element>& keys, PackedPanels<Element>& values)
      : context_(context), params_(context.params), keys_(keys), values_(values) {
    query_groups_.reserve(kRowBlock * params_.head_dim);
    grad_out_groups_.reserve(kRowBlock * params_.value_head_dim);
    query_rows_.reserve(kRowBlock * params_.head_dim);
    grad_out_rows_.reserve(kRowBlock * params_.value_head_dim);
    sums_.reserve(kRowBlock * params_.head_dim);
  }

  // Adds a block's dK and dV to gradients.
  void operator()(int64_t kv, int64_t block_of_kv, KeyGradients<Real>& gradients) {
    const HeadView<Element> view = context_.view(kv, block_of_kv);
    with_power(view.alpha, [&](auto exponent) { run<exponent>(view, kv, block_of_kv, gradients); });
  }

 private:
  template <Exponent kExponent>
  void run(const HeadView<Element>& view, int64_t kv, int64_t block_of_kv, KeyGradients<Real>& gradients) {
    const RowBlock block(view, block_of_kv % context_.layout.blocks_per_head);
    const Power<Real, kExponent> power(view.alpha);
    const int64_t num_cols = block.num_panels * kPanelCols, key_dim = params_.head_dim,
                  value_dim = params_.value_head_dim;
    const Element* grad_out = row_pointer<Element>(params_.grad_out, view.batch, view.head, block.first_row);
    pack_groups(view.query(block.first_row), params_.query.stride_row, block.num_rows, key_dim, view.units.query_factor,
                query_groups_.data());
    pack_groups(grad_out, params_.grad_out.stride_row, block.num_rows, value_dim, Real(1), grad_out_groups_.data());
    const Real *keys = keys_.head(kv, block.num_panels), *values = values_.head(kv, block.num_panels);
    strip_.reserve(block.num_panels);
    grad_strip_.reserve(block.num_panels);
    for (int64_t first = 0; first < block.num_rows; first += strip_.rows) {
      const int64_t last = std::min(block.num_rows, first + strip_.rows);
      score_strip(view, block, first, query_groups_.data(), keys, strip_);
      for (int64_t panel = 0; panel < block.num_panels; ++panel) {
        for (int64_t row = first; row < last; row += kTileRows) {
          multiply_to(grad_out_groups_.data() + row / kTileRows * value_dim * kTileRows,
                      values + panel * values_.panel_size(), value_dim,
                      grad_strip_.row(row - first) + panel * kPanelCols, grad_strip_.stride);
        }
      }
      for (int64_t row = first; row < last; ++row) {
        differentiate_row(view, block.first_row + row, row - first, num_cols, power, gradients);
      }
      if (params_.grad_query.data != nullptr) sum_keys(view, block, first, last, num_cols);
      if (context_.wants_keys()) {
        const int64_t cols_end = (num_cols + kTileRows - 1) / kTileRows * kTileRows;
        const MatrixView<Real> queries{query_rows_.data(), key_dim}, grad_outs{grad_out_rows_.data(), value_dim};
        for (int64_t col = 0; col < cols_end; col += kTileRows) {
          accumulate_tile(grad_strip_.row(0) + col, 1, grad_strip_.stride, queries, last - first, key_dim,
                          gradients.key(col), key_dim);
          accumulate_tile(strip_.row(0) + col, 1, strip_.stride, grad_outs, last - first, value_dim,
                          gradients.value(col), value_dim);
        }
      }
    }
  }

  // Scores -> probabilities and dP -> dS in the two strips, and the row's operands of dK and dV.
  template <Exponent kExponent>
  void differentiate_row(const HeadView<Element>& view, int64_t row, int64_t strip_row, int64_t num_cols,
                         const Power<Real, kExponent>& power, KeyGradients<Real>& gradients) {
    const RowGradient<Real, kExponent> gradient{power, view.alpha};
    Real *score = strip_.row(strip_row), *grad = grad_strip_.row(strip_row);
    const int64_t row_index = context_.row_index(view, row);
    const Real score_max = context_.origin(row_index)[0], tau_shifted = context_.origin(row_index)[1];
    const bool has_support = std::isfinite(tau_shifted);
    for (int64_t j = 0; j < num_cols; j += kLanes<Real>) {
      const Vector<Real> gap = ((load(score + j) - score_max) - tau_shifted) * view.units.unit;
      store(score + j, has_support ? max<Real>(gap, Vector<Real>{}) : Vector<Real>{});
    }
    if (params_.grad_alpha != nullptr)
      context_.alpha_rows[row_index] = gradient.gradient_by_alpha(score, grad, num_cols);
    gradient(score, grad, num_cols);
    fill_row(score + num_cols, kStripPadding, Real(0));  // read by the last group of columns
    fill_row(grad + num_cols, kStripPadding, Real(0));
    if (context_.wants_mask()) {
      Real* grad_mask = context_.grad_mask_row(view, row);
      const int64_t count = std::min(num_cols, params_.num_keys);
      for (int64_t j = 0; j < count; ++j) grad_mask[j * params_.mask.stride_col] += grad[j];
    }
    // What is not finite must reach the keys of the row's support only, and 0 * NaN is NaN: a row without support
    // counts as zero, and a gradient that is not finite is added by itself.
    const int64_t key_dim = params_.head_dim, value_dim = params_.value_head_dim;
    const MatrixView<Element> grad_out{row_pointer<Element>(params_.grad_out, view.batch, view.head, row), 0};
    Real* grad_out_row = grad_out_rows_.data() + strip_row * value_dim;
    if (has_support) convert_row(view.query(row), key_dim, query_rows_.data() + strip_row * key_dim);
    else fill_row(query_rows_.data() + strip_row * key_dim, key_dim, Real(0));
    if (has_support && all_finite(grad_out, 1, value_dim)) return convert_row(grad_out.row(0), value_dim, grad_out_row);
    fill_row(grad_out_row, value_dim, Real(0));
    for (int64_t col = 0; col < num_cols; ++col) {
      if (!(score[col] > 0)) continue;
      Real* sum = gradients.value(col);
      for (int64_t d = 0; d < value_dim; d += kLanes<Real>)
        store(sum + d, load(sum + d) + load(grad_out.row(0) + d) * score[col]);
    }
  }

  void sum_keys(const HeadView<Element>& view, const RowBlock& block, int64_t first, int64_t last, int64_t num_cols) {
    const int64_t dim = params_.head_dim;
    const int64_t num_padded = (last - first + kTileRows - 1) / kTileRows * kTileRows;
    std::fill_n(sums_.data(), num_padded * dim, Real(0));
    for (int64_t first_key = 0; first_key < num_cols; first_key += kPanelCols) {
      const MatrixView<Element> keys{view.key(first_key), params_.key.stride_row};
      const int64_t count = std::min<int64_t>(kPanelCols, params_.num_keys - first_key);
      const bool are_finite = all_finite(keys, count, dim);
      for (int64_t row = first; row < last; row += kTileRows) {
        accumulate_rows(grad_strip_.row(row - first) + first_key, grad_strip_.stride, keys, count, dim,
                        sums_.data() + (row - first) * dim, are_finite);
      }
    }
    for (int64_t row = first; row < last; ++row) {
      context_.write_grad_query(view, block.first_row + row, sums_.data() + (row - first) * dim);
    }
  }

  BackwardContext<Element>& context_;
  const AttentionBackward& params_;
  PackedPanels<Element>&keys_, &values_;
  Buffer<Real> query_groups_, grad_out_groups_;  // packed for the scores and for dP
  Buffer<Real> query_rows_, grad_out_rows_;      // of a strip, for dK and dV
  Buffer<Real> sums_;                            // dQ of a strip
  Strip<Real> strip_, grad_strip_;               // score -> gap -> prob, and dP -> dS
};

// The row blocks of a kv head that were not saved, and how many keys they see.
struct StripHead {
  int64_t kv, num_keys = 0;
  std::vector<int64_t> blocks;
};

template <class Element>
std::vector<StripHead> find_strips(const BackwardContext<Element>& context) {
  std::vector<StripHead> heads;
  for (int64_t kv = 0; kv < context.num_kv; ++kv) {
    StripHead head{kv};
    for (int64_t block = 0; block < context.blocks_per_kv; ++block) {
      if (context.saved_block(kv, block) != nullptr) continue;
      const RowBlock rows(context.view(kv, block), block % context.layout.blocks_per_head);
      head.blocks.push_back(block);
      head.num_keys = std::max(head.num_keys, rows.num_panels * kPanelCols);
    }
    if (!head.blocks.empty()) heads.push_back(std::move(head));
  }
  return heads;
}

// dK and dV of every row block that was not saved are added to gradients (by kv head).
template <class Element>
void differentiate_strips(BackwardContext<Element>& context, const std::vector<StripHead>& heads,
                          std::vector<KeyGradients<Accumulator<Element>>>& gradients, const Parallel& parallel) {
  using Real = Accumulator<Element>;
  const AttentionBackward& params = context.params;
  PackedPanels<Element> keys(params, params.key, params.head_dim), values(params, params.value, params.value_head_dim);
  // Of each head, consecutive blocks make a part; the first adds to the head's gradients, the others are added up after
  // it. How many there are follows from the shapes alone, so sums have one order.
  const int64_t num_parts =
      std::clamp<int64_t>((kDenseParts + context.num_kv - 1) / context.num_kv, 1, context.blocks_per_kv);
  const int64_t head_bytes =
      num_parts * params.num_keys * (params.head_dim + params.value_head_dim) * static_cast<int64_t>(sizeof(Real));
  const int64_t at_once = std::clamp<int64_t>(kMostWaveBytes / head_bytes, 1, heads.size());
  std::vector<KeyGradients<Real>> others(at_once * (num_parts - 1));
  Parallel for_blocks = parallel;
  if (context.shares_mask()) for_blocks.num_threads = 1;  // elements of the mask's gradient are added to in order
  for (int64_t done = 0; done < static_cast<int64_t>(heads.size()); done += at_once) {
    const int64_t count = std::min<int64_t>(at_once, heads.size() - done);
    run_tasks(for_blocks, count * num_parts, [&] {
      return [&, worker = StripGradientWorker<Element>(context, keys, values)](int64_t task) mutable {
        const StripHead& head = heads[done + task / num_parts];
        const int64_t part = task % num_parts, num_blocks = head.blocks.size();
        auto& sums = part == 0 ? gradients[head.kv] : others[task / num_parts * (num_parts - 1) + part - 1];
        if (part > 0) sums.set_zero(gradients[head.kv].num_keys, params);
        for (int64_t i = num_blocks * part / num_parts; i < num_blocks * (part + 1) / num_parts; ++i) {
          worker(head.kv, head.blocks[i], sums);
        }
      };
    });
    if (num_parts == 1) continue;
    run_tasks(parallel, count, [&] {
      return [&](int64_t i) {
        for (int64_t part = 1; part < num_parts; ++part) {
          gradients[heads[done + i].kv].add(others[i * (num_parts - 1) + part - 1]);
        }
      };
    });
  }
}

// ---- lists: row blocks that were saved
// --------------------------------------------------------------------------------

// Consecutive row blocks of one query head, whose rows gather together. Counted are the blocks that were saved.
struct Chunk {
  int64_t kv, first_block, last_block;  // blocks of the kv head, [first, last)
  int64_t num_rows, num_entries;  // with room after each row's entries: products are written a vector past the end
  int64_t wave_row, wave_entry;   // where they begin in SupportGradients
};

// What the row step leaves for the key step: one wave of chunks.
template <class Real>
struct SupportGradients {
  Buffer<Real> prob, grad_score;  // rows one after the other, each in the order of its saved columns
  Buffer<int32_t> range_end;      // [range][row]: where the row's entries of a range of keys end; ranges from the last
  int64_t num_rows = 0, num_ranges = 0, keys_per_range = 0;

  // The keys of a range, so few that their sums stay in the L2 cache and there is enough to do for every thread.
  void set_ranges(const AttentionProblem& problem, int64_t num_kv) {
    constexpr int64_t kSumBytes = 512 << 10, kLeastTasks = 16, kLeastPanels = 4;
    const int64_t key_bytes = (problem.head_dim + problem.value_head_dim) * static_cast<int64_t>(sizeof(Real));
    const int64_t num_panels = panels_of(problem.num_keys);
    const int64_t fitting = kSumBytes / (key_bytes * kPanelCols), shared = num_panels * num_kv / kLeastTasks;
    keys_per_range = std::max(std::min(fitting, shared), kLeastPanels) * kPanelCols;
    num_ranges = (problem.num_keys + keys_per_range - 1) / keys_per_range;
  }
  int64_t row_bytes() const { return num_ranges * static_cast<int64_t>(sizeof(int32_t)); }
  int32_t* range_ends(int64_t range) { return range_end.data() + range * num_rows; }
};

// function(row of the query head, its columns and gaps) for every row of a chunk whose block was saved, in order.
template <class Element, class Function>
ADASPLASH2_INLINE void for_saved_rows(const BackwardContext<Element>& context, const Chunk& chunk, Function function) {
  using Real = Accumulator<Element>;
  const SupportLayout& layout = context.layout;
  const int64_t first_index = context.row_index(context.view(chunk.kv, chunk.first_block), 0);
  for (int64_t block = chunk.first_block; block < chunk.last_block; ++block) {
    const char* saved = context.saved_block(chunk.kv, block);
    if (saved == nullptr) continue;
    const int64_t first_row = block % layout.blocks_per_head * kRowBlock;
    for (int64_t row = first_row; row < std::min(context.params.num_queries, first_row + kRowBlock); ++row) {
      const int64_t size = context.params.support_size[first_index + row];
      function(row, EntryList<const Real>{reinterpret_cast<const int32_t*>(saved + size * layout.real_bytes),
                                          reinterpret_cast<const Real*>(saved), size});
      saved += size * layout.entry_bytes();
    }
  }
}

template <class Element>
class RowStepWorker {
  using Real = Accumulator<Element>;

 public:
  RowStepWorker(BackwardContext<Element>& context, SupportGradients<Real>& wave)
      : context_(context), params_(context.params), wave_(wave) {
    grad_out_.reserve(kGatherRows * params_.value_head_dim);
    grad_query_.reserve(kGatherRows * params_.head_dim);
  }

  void operator()(const Chunk& chunk) {
    const HeadView<Element> view = context_.view(chunk.kv, chunk.first_block);
    num_rows_ = 0;
    int64_t entry = chunk.wave_entry;
    for_saved_rows(context_, chunk, [&](int64_t row, const EntryList<const Real>& list) {
      const Element* grad_out = row_pointer<Element>(params_.grad_out, view.batch, view.head, row);
      convert_row(grad_out, params_.value_head_dim, grad_out_.data() + num_rows_ * params_.value_head_dim);
      row_[num_rows_] = row;
      gap_[num_rows_] = list.value;
      lists_[num_rows_] = {list.column, wave_.grad_score.data() + entry, list.size};
      prob_[num_rows_++] = wave_.prob.data() + entry;
      entry += list.size + kLanes<Real>;
    });
    differentiate_probs(view);
    with_power(view.alpha, [&](auto exponent) {
      const Power<Real, exponent> power(view.alpha);
      differentiate_rows(view, RowGradient<Real, exponent>{power, view.alpha});
    });
    if (params_.grad_query.data != nullptr) sum_keys(view);
    if (context_.has_key_step()) split_by_ranges(chunk);
  }

 private:
  // dP on the support; what a range of keys writes past its end is overwritten by the next one.
  void differentiate_probs(const HeadView<Element>& view) {
    const int64_t dim = params_.value_head_dim;
    const MatrixView<Element> values{view.value(0), params_.value.stride_row};
    for_key_ranges(lists_, num_rows_, params_.num_keys, values, dim,
                   [&](int64_t i, const int32_t* column, Real* grad_prob, int64_t count, bool is_cached) {
                     gather_dot(grad_out_.data() + i * dim, values, dim, column, count, is_cached, grad_prob);
                   });
  }

  // gap -> prob and dP -> dS.
  template <class Gradient>
  void differentiate_rows(const HeadView<Element>& view, const Gradient& gradient) {
    for (int64_t i = 0; i < num_rows_; ++i) {
      const auto& [column, grad, size] = lists_[i];
      std::memcpy(prob_[i], gap_[i], size * sizeof(Real));
      fill_row(prob_[i] + size, kLanes<Real>, Real(0));
      if (params_.grad_alpha != nullptr) {
        context_.alpha_rows[context_.row_index(view, row_[i])] = gradient.gradient_by_alpha(prob_[i], grad, size);
      }
      gradient(prob_[i], grad, size);
      if (context_.wants_mask() && params_.mask.stride_row != 0) {
        Real* grad_mask = context_.grad_mask_row(view, row_[i]);
        for (int64_t j = 0; j < size; ++j) grad_mask[column[j] * params_.mask.stride_col] += grad[j];
      }
    }
  }

  void sum_keys(const HeadView<Element>& view) {
    const int64_t dim = params_.head_dim;
    const MatrixView<Element> keys{view.key(0), params_.key.stride_row};
    std::fill_n(grad_query_.data(), num_rows_ * dim, Real(0));
    for_key_ranges(lists_, num_rows_, params_.num_keys, keys, dim,
                   [&](int64_t i, const int32_t* column, const Real* grad_score, int64_t count, bool is_cached) {
                     gather_sum(keys, dim, column, grad_score, count, is_cached, grad_query_.data() + i * dim);
                   });
    for (int64_t i = 0; i < num_rows_; ++i) context_.write_grad_query(view, row_[i], grad_query_.data() + i * dim);
  }

  void split_by_ranges(const Chunk& chunk) {
    for (int64_t i = 0; i < num_rows_; ++i) {
      const int32_t *column = lists_[i].column, *end = column + lists_[i].size, *from = column;
      for (int64_t range = wave_.num_ranges - 1; range >= 0; --range) {
        from = range == 0 ? end : keys_from(from, end, range * wave_.keys_per_range);
        wave_.range_ends(range)[chunk.wave_row + i] = static_cast<int32_t>(from - column);
      }
    }
  }

  BackwardContext<Element>& context_;
  const AttentionBackward& params_;
  SupportGradients<Real>& wave_;
  // The chunk's rows: which, what was saved of them, and what goes to the wave.
  int64_t num_rows_ = 0;
  int64_t row_[kGatherRows];
  const Real* gap_[kGatherRows];
  EntryList<Real> lists_[kGatherRows];  // columns, and dP which becomes dS
  Real* prob_[kGatherRows];
  Buffer<Real> grad_out_, grad_query_;  // [kGatherRows, Dv], [kGatherRows, D]
};

// The chunks [first, last) that one kv head has in a wave.
struct WavePart {
  int64_t kv, first_chunk, last_chunk;
  bool is_first, is_last;  // wave with chunks of this kv head
};

template <class Element>
class KeyStepWorker {
  using Real = Accumulator<Element>;

 public:
  KeyStepWorker(BackwardContext<Element>& context, const std::vector<Chunk>& chunks,
                std::vector<KeyGradients<Real>>& gradients, SupportGradients<Real>& wave)
      : context_(context),
        params_(context.params),
        chunks_(chunks),
        gradients_(gradients),
        wave_(wave),
        group_(params_.head_dim, params_.value_head_dim) {}

  // dK and dV of a range of keys: what every row adds, row after row.
  void operator()(const WavePart& part, int64_t range) {
    const int64_t first_key = range * wave_.keys_per_range;
    const int64_t num_keys = std::min(params_.num_keys - first_key, wave_.keys_per_range);
    const int64_t key_dim = params_.head_dim, value_dim = params_.value_head_dim;
    KeyGradients<Real>& kept = gradients_[part.kv];
    const bool is_kept = first_key < kept.num_keys;
    if (!is_kept) sums_.set_zero(num_keys, params_);
    Real* key_sums = is_kept ? kept.key(first_key) : sums_.key(0);
    Real* value_sums = is_kept ? kept.value(first_key) : sums_.value(0);
    for (int64_t index = part.first_chunk; index < part.last_chunk; ++index) {
      add_chunk(chunks_[index], range, key_sums - first_key * key_dim, value_sums - first_key * value_dim);
    }
    if (!part.is_last) return;
    const auto write = [&](const Rows& grad, int64_t dim, const Real* from, Real factor) {
      if (grad.data == nullptr) return;
      for (int64_t key = first_key; key < first_key + num_keys; ++key, from += dim) {
        Element* to =
            mutable_row_pointer<Element>(grad, part.kv / params_.num_kv_heads, part.kv % params_.num_kv_heads, key);
        for (int64_t d = 0; d < dim; d += kLanes<Real>) store(to + d, load(from + d) * factor);
      }
    };
    write(params_.grad_key, key_dim, key_sums, static_cast<Real>(params_.scale));
    write(params_.grad_value, value_dim, value_sums, Real(1));
  }

 private:
  // key_sums and value_sums are those of key 0.
  void add_chunk(const Chunk& chunk, int64_t range, Real* key_sums, Real* value_sums) {
    constexpr int64_t kRowsOfKey = 2;  // of a group, on average, for which it pays to go by keys
    const HeadView<Element> view = context_.view(chunk.kv, chunk.first_block);
    const int64_t range_begin = range * wave_.keys_per_range;
    int64_t num_entries = 0, num_panels = 0, i = chunk.wave_row, entry = chunk.wave_entry;
    num_segments_ = 0;
    for_saved_rows(context_, chunk, [&](int64_t row, const EntryList<const Real>& list) {
      const int64_t begin = range + 1 == wave_.num_ranges ? 0 : wave_.range_ends(range + 1)[i];
      const int64_t size = wave_.range_ends(range)[i] - begin;
      if (size > 0) {
        Segment<Real>& segment = segments_[num_segments_++];
        segment = {row, size, list.column + begin, wave_.prob.data() + entry + begin,
                   wave_.grad_score.data() + entry + begin};
        segment.prefetch();
        num_panels = std::max(num_panels, (*segment.column - range_begin) / kPanelCols + 1);
      }
      num_entries += size;
      ++i;
      entry += list.size + kLanes<Real>;
    });
    if (num_entries == 0) return;
    if (context_.wants_mask() && params_.mask.stride_row == 0) add_grad_mask(context_.grad_mask_row(view, 0));
    if (params_.grad_key.data == nullptr) key_sums = nullptr;
    if (params_.grad_value.data == nullptr) value_sums = nullptr;
    if (num_entries * group_.most_rows >= kRowsOfKey * num_segments_ * num_panels * kPanelCols) {
      add_by_keys(view, range_begin, num_panels, key_sums, value_sums);
    } else {
      add_by_rows(view, range_begin, num_entries, key_sums, value_sums);
    }
  }

  const Element* query(const HeadView<Element>& view, const Segment<Real>& segment) const {
    return view.query(segment.row);
  }
  const Element* grad_out(const HeadView<Element>& view, const Segment<Real>& segment) const {
    return row_pointer<Element>(params_.grad_out, view.batch, view.head, segment.row);
  }

  void add_grad_mask(Real* grad_mask) {
    for (int64_t s = 0; s < num_segments_; ++s) {
      const Segment<Real>& segment = segments_[s];
      for (int64_t j = 0; j < segment.size; ++j)
        grad_mask[segment.column[j] * params_.mask.stride_col] += segment.grad_score[j];
    }
  }

  void add_by_keys(const HeadView<Element>& view, int64_t range_begin, int64_t num_panels, Real* key_sums,
                   Real* value_sums) {
    for (int64_t first = 0; first < num_segments_; first += group_.most_rows) {
      group_.set(
          segments_ + first, std::min(num_segments_ - first, group_.most_rows),
          [&](const auto& segment) { return query(view, segment); },
          [&](const auto& segment) { return grad_out(view, segment); });
      for (int64_t panel = num_panels - 1; panel >= 0; --panel) {
        const int64_t first_key = range_begin + panel * kPanelCols;
        group_.add_panel(first_key, key_sums == nullptr ? nullptr : key_sums + first_key * params_.head_dim,
                         value_sums == nullptr ? nullptr : value_sums + first_key * params_.value_head_dim);
      }
    }
  }

  // A few keys at a time, whose sums stay in the L1 cache.
  void add_by_rows(const HeadView<Element>& view, int64_t range_begin, int64_t num_entries, Real* key_sums,
                   Real* value_sums) {
    constexpr int64_t kEntriesAtOnce = 4;  // of a row, on average: what it costs to load a row once more
    const int64_t key_dim = params_.head_dim, value_dim = params_.value_head_dim;
    const int64_t panels = kEntriesAtOnce * num_segments_ * wave_.keys_per_range / num_entries / kPanelCols + 1;
    // Of a query and of a grad_out, where both are added and fit the registers together.
    const bool adds_both = key_sums != nullptr && value_sums != nullptr && key_dim == value_dim &&
                           2 * key_dim <= kScatteredVectors * kLanes<Real>;
    const int64_t num_vectors = adds_both ? key_dim / kLanes<Real> : 0;
    for (int64_t last_key = range_begin + wave_.keys_per_range; last_key > range_begin;) {
      const int64_t first_key = std::max(range_begin, last_key - panels * kPanelCols);
      for (int64_t s = 0; s < num_segments_; ++s) {
        Segment<Real>& segment = segments_[s];
        const Element *query_row = query(view, segment), *grad_out_row = grad_out(view, segment);
        int64_t count = 0;
        const auto add_both = [&](auto vectors) {
          count = scatter_two_sums<vectors>(query_row, grad_out_row, segment.column, segment.grad_score, segment.prob,
                                            segment.size, first_key, key_sums, value_sums);
        };
        if (num_vectors == 1) {
          add_both(std::integral_constant<int, 1>());
        } else if (num_vectors == 2) {
          add_both(std::integral_constant<int, 2>());
        } else if (num_vectors == 4) {
          add_both(std::integral_constant<int, 4>());
        } else if (num_vectors == 8) {
          add_both(std::integral_constant<int, 8>());
        } else {
          while (count < segment.size && segment.column[count] >= first_key) ++count;
          if (key_sums != nullptr) scatter_sum(query_row, key_dim, segment.column, segment.grad_score, count, key_sums);
          if (value_sums != nullptr)
            scatter_sum(grad_out_row, value_dim, segment.column, segment.prob, count, value_sums);
        }
        segment.drop(count);
      }
      last_key = first_key;
    }
  }

  BackwardContext<Element>& context_;
  const AttentionBackward& params_;
  const std::vector<Chunk>& chunks_;
  std::vector<KeyGradients<Real>>& gradients_;
  SupportGradients<Real>& wave_;
  KeyGradients<Real> sums_;  // of a range, where the head's are not kept
  Segment<Real> segments_[kGatherRows];
  int64_t num_segments_ = 0;
  RowGroup<Element> group_;
};

template <class Element>
class ListGradients {
  using Real = Accumulator<Element>;

 public:
  ListGradients(BackwardContext<Element>& context, const std::vector<Chunk>& chunks,
                std::vector<KeyGradients<Real>>& gradients, const Parallel& parallel)
      : context_(context), chunks_(chunks), gradients_(gradients), parallel_(parallel) {
    wave_.set_ranges(context.params, context.num_kv);
  }

  int64_t row_bytes() const { return wave_.row_bytes(); }
  int64_t keys_per_range() const { return wave_.keys_per_range; }

  void operator()(const std::vector<WavePart>& parts) {
    const int64_t first_chunk = parts.front().first_chunk, last_chunk = parts.back().last_chunk;
    const Chunk& last = chunks_[last_chunk - 1];
    wave_.num_rows = last.wave_row + last.num_rows;
    wave_.prob.reserve(last.wave_entry + last.num_entries);
    wave_.grad_score.reserve(last.wave_entry + last.num_entries);
    wave_.range_end.reserve(wave_.num_rows * wave_.num_ranges);
    const int64_t num_tasks = wave_.num_rows == 0 ? 0 : last_chunk - first_chunk;
    run_tasks(parallel_, num_tasks, [&] {
      return [&, worker = RowStepWorker<Element>(context_, wave_)](int64_t task) mutable {
        worker(chunks_[first_chunk + task]);
      };
    });
    if (!context_.has_key_step()) return;
    run_tasks(parallel_, parts.size() * wave_.num_ranges, [&] {
      return [&, worker = KeyStepWorker<Element>(context_, chunks_, gradients_, wave_)](int64_t task) mutable {
        worker(parts[task / wave_.num_ranges], task % wave_.num_ranges);
      };
    });
  }

 private:
  BackwardContext<Element>& context_;
  const std::vector<Chunk>& chunks_;
  std::vector<KeyGradients<Real>>& gradients_;
  const Parallel& parallel_;
  SupportGradients<Real> wave_;
};

// ---- the whole pass
// ---------------------------------------------------------------------------------------------------

template <class Element>
std::vector<Chunk> make_chunks(const BackwardContext<Element>& context) {
  const int64_t blocks_per_head = context.layout.blocks_per_head;
  std::vector<Chunk> chunks;
  for (int64_t kv = 0; kv < context.num_kv; ++kv) {
    for (int64_t first = 0; first < context.blocks_per_kv;) {
      const int64_t head_end = (first / blocks_per_head + 1) * blocks_per_head;
      Chunk chunk{kv, first, std::min(first + context.layout.gather_blocks, head_end)};
      for_saved_rows(context, chunk, [&](int64_t, const auto& list) {
        ++chunk.num_rows;
        chunk.num_entries += list.size + kLanes<Accumulator<Element>>;
      });
      chunks.push_back(chunk);
      first = chunk.last_block;
    }
  }
  return chunks;
}

// Consecutive chunks, as many as most_bytes allow, split by kv head. Where elements of the mask's gradient are shared a
// wave has one query head, so that heads add to them one after the other.
template <class Element>
std::vector<std::vector<WavePart>> make_waves(const BackwardContext<Element>& context, int64_t most_bytes,
                                              int64_t row_bytes, std::vector<Chunk>& chunks) {
  constexpr int64_t kEntryBytes = 2 * sizeof(Accumulator<Element>);
  std::vector<std::vector<WavePart>> waves;
  int64_t rows = 0, entries = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(chunks.size()); ++i) {
    Chunk& chunk = chunks[i];
    const bool starts_head = chunk.first_block % context.layout.blocks_per_head == 0;
    const int64_t bytes = (entries + chunk.num_entries) * kEntryBytes + (rows + chunk.num_rows) * row_bytes;
    if (waves.empty() || bytes > most_bytes || (context.shares_mask() && starts_head)) {
      waves.emplace_back();
      rows = entries = 0;
    }
    auto& parts = waves.back();
    const bool is_first = i == 0 || chunks[i - 1].kv != chunk.kv;
    if (parts.empty() || parts.back().kv != chunk.kv) parts.push_back({chunk.kv, i, i, is_first, false});
    parts.back().last_chunk = i + 1;
    parts.back().is_last = i + 1 == static_cast<int64_t>(chunks.size()) || chunks[i + 1].kv != chunk.kv;
    chunk.wave_row = rows;
    chunk.wave_entry = entries;
    rows += chunk.num_rows;
    entries += chunk.num_entries;
  }
  return waves;
}

template <class Element>
void zero_rows(const Rows& rows, const AttentionProblem& problem, int64_t num_heads, int64_t num_rows, int64_t dim) {
  if (rows.data == nullptr) return;
  for (int64_t head = 0; head < problem.batch * num_heads; ++head) {
    for (int64_t row = 0; row < num_rows; ++row) {
      fill_row(mutable_row_pointer<Element>(rows, head / num_heads, head % num_heads, row), dim,
               Accumulator<Element>(0));
    }
  }
}

template <class Element>
void backward_typed(const AttentionBackward& params, const Parallel& parallel) {
  using Real = Accumulator<Element>;
  if (params.batch * params.num_heads * params.num_queries == 0 || params.num_keys == 0) {
    zero_rows<Element>(params.grad_query, params, params.num_heads, params.num_queries, params.head_dim);
    zero_rows<Element>(params.grad_key, params, params.num_kv_heads, params.num_keys, params.head_dim);
    zero_rows<Element>(params.grad_value, params, params.num_kv_heads, params.num_keys, params.value_head_dim);
    if (params.grad_alpha != nullptr) std::fill_n(params.grad_alpha, params.batch * params.num_heads, 0.0);
    return;
  }
  BackwardContext<Element> context(params);
  std::vector<Chunk> chunks = make_chunks(context);
  std::vector<KeyGradients<Real>> gradients(context.num_kv);
  ListGradients<Element> lists(context, chunks, gradients, parallel);
  const int64_t wave_bytes = std::min(kMostWaveBytes, kWaveBytesPerThread * parallel.num_threads);
  const auto waves = make_waves(context, wave_bytes, lists.row_bytes(), chunks);
  const std::vector<StripHead> strips = find_strips(context);

  // What must be kept: the ranges of keys that strips see, and all of them for heads that are in several waves.
  const int64_t range = lists.keys_per_range();
  const int64_t all_keys = panels_of(params.num_keys) * kPanelCols;
  std::vector<int64_t> num_kept(context.num_kv, 0);
  for (const StripHead& head : strips) {
    num_kept[head.kv] = std::min(all_keys, (head.num_keys + range - 1) / range * range);
  }
  for (const auto& wave : waves) {
    for (const WavePart& part : wave) {
      if (!(part.is_first && part.is_last)) num_kept[part.kv] = all_keys;
    }
  }
  run_tasks(parallel, context.num_kv, [&] {
    return [&](int64_t kv) {
      if (num_kept[kv] > 0) gradients[kv].set_zero(num_kept[kv], params);
    };
  });
  if (!strips.empty()) differentiate_strips(context, strips, gradients, parallel);
  for (const auto& wave : waves) lists(wave);

  if (params.grad_alpha != nullptr) {
    for (int64_t head = 0; head < params.batch * params.num_heads; ++head) {
      const double* rows = context.alpha_rows.data() + head * params.num_queries;
      double sum = 0;
      for (int64_t row = 0; row < params.num_queries; ++row) sum += rows[row];
      params.grad_alpha[head] = sum;
    }
  }
}

inline void attention_backward(const AttentionBackward& params, const Parallel& parallel) {
  switch (params.dtype) {
    case DataType::kFloat32:
      return backward_typed<float>(params, parallel);
    case DataType::kBFloat16:
      return backward_typed<BFloat16>(params, parallel);
    case DataType::kFloat16:
      return backward_typed<Float16>(params, parallel);
    case DataType::kFloat64:
      return backward_typed<double>(params, parallel);
    case DataType::kBool:
      break;
  }
  throw std::invalid_argument("adasplash2: expected a floating point dtype");
}

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
