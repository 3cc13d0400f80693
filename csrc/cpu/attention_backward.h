// Backward pass: with w = p^(2 - alpha), dP = dO V^T, delta_i = sum_j w_ij dP_ij / sum_j w_ij and dS = w (dP - delta):
//
//   dQ = sigma dS K,   dK = sigma dS^T Q,   dV = P^T dO,   d mask = dS,   d alpha: gradient_by_alpha() below
//
// Row blocks whose support was saved (support_layout.h) touch the support and nothing else, in three steps:
//   rows   a chunk of row blocks computes dS and dQ and files (row, p, dS) under its keys; where each entry goes was
//          counted before, so entries lie in the order of the rows whatever the number of threads
//   keys   a block of keys gathers its rows of Q and dO: dK and dV
// The chunks are taken in waves that bound the memory of the filed entries. Row blocks that were not saved are
// recomputed in strips (dense.h) and accumulate dK and dV in float, a fixed number of parts per kv head, added up in
// order. So every sum has one order: results are the same bits for any number of threads.
#pragma once

#include "cpu/attention_forward.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {

constexpr int64_t kChunkBlocks = 8;                // row blocks that file their entries one after the other
constexpr int64_t kKeyBlock = 64;                  // keys of one task of the key step
constexpr int64_t kWaveBytes = int64_t{64} << 20;  // of filed entries and their counts
constexpr int64_t kDenseParts = 16;  // tasks of the strips, at least, if the problem has as many row blocks

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
  const char* region(int64_t kv, int64_t block_of_kv) const {
    return static_cast<const char*>(params.support) +
           layout.block_offset(view(kv, block_of_kv).index(), block_of_kv % layout.blocks_per_head);
  }
  bool is_saved(int64_t kv, int64_t block_of_kv) const {
    return *reinterpret_cast<const int64_t*>(region(kv, block_of_kv)) == 1;
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

  void write_grad_query(const HeadView<Element>& view, int64_t row, const Real* sum) const {
    Element* to = mutable_row_pointer<Element>(params.grad_query, view.batch, view.head, row);
    const Real tau_shifted = origin(row_index(view, row))[1];
    const Real factor = tau_shifted == tau_shifted ? static_cast<Real>(params.scale) : tau_shifted;  // NaN row: NaN
    for (int64_t d = 0; d < params.head_dim; d += kLanes<Real>) store(to + d, load(sum + d) * factor);
  }
};

// dK and dV of some kv heads before they are final, in the accumulation type.
template <class Real>
struct KeyGradients {
  Buffer<Real> data;
  int64_t key_dim = 0, value_dim = 0, num_cols = 0;

  // Room for whole groups of rows past the last key: strips are accumulated by groups.
  static int64_t cols_for(int64_t num_keys) {
    return (num_keys + kPanelCols - 1) / kPanelCols * kPanelCols + kTileRows;
  }

  void reserve(int64_t count, const AttentionProblem& problem) {
    key_dim = problem.head_dim;
    value_dim = problem.value_head_dim;
    num_cols = cols_for(problem.num_keys);
    data.reserve(count * size());
    std::fill_n(data.data(), count * size(), Real(0));
  }
  int64_t size() const { return num_cols * (key_dim + value_dim); }
  Real* key(int64_t index, int64_t col) { return data.data() + index * size() + col * key_dim; }
  Real* value(int64_t index, int64_t col) {
    return data.data() + index * size() + num_cols * key_dim + col * value_dim;
  }
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

  // Adds a block's dK and dV to gradients[index].
  void operator()(int64_t kv, int64_t block_of_kv, KeyGradients<Real>& gradients, int64_t index) {
    const HeadView<Element> view = context_.view(kv, block_of_kv);
    with_power(view.alpha, [&](auto exponent) { run<exponent>(view, kv, block_of_kv, gradients, index); });
  }

 private:
  template <Exponent kExponent>
  void run(const HeadView<Element>& view, int64_t kv, int64_t block_of_kv, KeyGradients<Real>& gradients,
           int64_t index) {
    const RowBlock block(view, block_of_kv % context_.layout.blocks_per_head);
    const Power<Real, kExponent> power(view.alpha);
    const int64_t num_cols = block.num_panels * kPanelCols, key_dim = params_.head_dim,
                  value_dim = params_.value_head_dim;
    const Element* grad_out = row_pointer<Element>(params_.grad_out, view.batch, view.head, block.first_row);
    pack_groups(view.query(block.first_row), params_.query.stride_row, block.num_rows, key_dim, view.units.query_factor,
                query_groups_.data());
    pack_groups(grad_out, params_.grad_out.stride_row, block.num_rows, value_dim, Real(1), grad_out_groups_.data());
    const Real *keys = keys_.head(kv), *values = values_.head(kv);
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
        differentiate_row(view, block.first_row + row, row - first, num_cols, power, gradients, index);
      }
      if (params_.grad_query.data != nullptr) sum_keys(view, block, first, last, num_cols);
      if (context_.wants_keys()) {
        const int64_t cols_end = (num_cols + kTileRows - 1) / kTileRows * kTileRows;
        const MatrixView<Real> queries{query_rows_.data(), key_dim}, grad_outs{grad_out_rows_.data(), value_dim};
        for (int64_t col = 0; col < cols_end; col += kTileRows) {
          accumulate_tile(grad_strip_.row(0) + col, 1, grad_strip_.stride, queries, last - first, key_dim,
                          gradients.key(index, col), key_dim);
          accumulate_tile(strip_.row(0) + col, 1, strip_.stride, grad_outs, last - first, value_dim,
                          gradients.value(index, col), value_dim);
        }
      }
    }
  }

  // Scores -> probabilities and dP -> dS in the two strips, and the row's operands of dK and dV.
  template <Exponent kExponent>
  void differentiate_row(const HeadView<Element>& view, int64_t row, int64_t strip_row, int64_t num_cols,
                         const Power<Real, kExponent>& power, KeyGradients<Real>& gradients, int64_t index) {
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
    if (has_support) widen_row(view.query(row), key_dim, query_rows_.data() + strip_row * key_dim);
    else fill_row(query_rows_.data() + strip_row * key_dim, key_dim, Real(0));
    if (has_support && all_finite(grad_out, 1, value_dim)) return widen_row(grad_out.row(0), value_dim, grad_out_row);
    fill_row(grad_out_row, value_dim, Real(0));
    for (int64_t col = 0; col < num_cols; ++col) {
      if (!(score[col] > 0)) continue;
      Real* sum = gradients.value(index, col);
      for (int64_t d = 0; d < value_dim; d += kLanes<Real>)
        store(sum + d, load(sum + d) + load(grad_out.row(0) + d) * score[col]);
    }
  }

  void sum_keys(const HeadView<Element>& view, const RowBlock& block, int64_t first, int64_t last, int64_t num_cols) {
    const int64_t dim = params_.head_dim;
    std::memset(sums_.data(), 0, kRowBlock * dim * sizeof(Real));
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

// Adds dK and dV of every row block that was not saved to gradients (one slot per kv head).
template <class Element>
void differentiate_strips(BackwardContext<Element>& context, const std::vector<int64_t>& kv_heads,
                          KeyGradients<Accumulator<Element>>& gradients, const std::vector<int64_t>& slot,
                          const Parallel& parallel) {
  using Real = Accumulator<Element>;
  const AttentionBackward& params = context.params;
  PackedPanels<Element> keys(params, params.key, params.head_dim), values(params, params.value, params.value_head_dim);
  // The number of parts follows from the shapes alone, so sums have one order.
  const int64_t num_parts =
      std::clamp<int64_t>((kDenseParts + context.num_kv - 1) / context.num_kv, 1, context.blocks_per_kv);
  Parallel one_at_a_time = parallel;
  one_at_a_time.num_threads = 1;
  KeyGradients<Real> parts;
  for (size_t done = 0; done < kv_heads.size();) {
    parts.reserve(0, params);
    const int64_t fitting = kWaveBytes / (num_parts * parts.size() * static_cast<int64_t>(sizeof(Real)) + 1);
    const int64_t count = std::clamp<int64_t>(fitting, 1, kv_heads.size() - done);
    parts.reserve(count * num_parts, params);
    // Row blocks of several heads may add to one element of the mask's gradient: keep their order.
    run_tasks(context.wants_mask() ? one_at_a_time : parallel, count * num_parts, [&] {
      return [&, worker = StripGradientWorker<Element>(context, keys, values)](int64_t task) mutable {
        const int64_t kv = kv_heads[done + task / num_parts], part = task % num_parts;
        for (int64_t block = context.blocks_per_kv * part / num_parts;
             block < context.blocks_per_kv * (part + 1) / num_parts; ++block) {
          if (!context.is_saved(kv, block)) worker(kv, block, parts, task);
        }
      };
    });
    run_tasks(parallel, count, [&] {
      return [&](int64_t i) {
        Real* sum = gradients.key(slot[kv_heads[done + i]], 0);
        for (int64_t part = 0; part < num_parts; ++part) {
          const Real* add = parts.key(i * num_parts + part, 0);
          for (int64_t j = 0; j < parts.size(); ++j) sum[j] += add[j];
        }
      };
    });
    done += count;
  }
}

// ---- lists: row blocks that were saved
// --------------------------------------------------------------------------------

// Consecutive row blocks of one query head.
struct Chunk {
  int64_t kv, first_block, last_block;  // blocks of the kv head, [first, last)
  int64_t num_entries;
};

// What the row step files under a key.
template <class Real>
struct Entry {
  int32_t row;  // of the query head
  Real prob, grad_score;
};

// The entries of the chunks of one wave.
template <class Real>
struct FiledEntries {
  Buffer<Entry<Real>> data;
  Buffer<int32_t> count;  // [chunk][Nk]; then where the chunk's next entry of the key goes; in the end where they end
};

template <class Element>
class RowStepWorker {
  using Real = Accumulator<Element>;

 public:
  RowStepWorker(BackwardContext<Element>& context, FiledEntries<Real>& filed)
      : context_(context), params_(context.params), filed_(filed) {
    grad_out_.reserve(kRowBlock * params_.value_head_dim);
    grad_query_.reserve(kRowBlock * params_.head_dim);
    const int64_t most = context.layout.block_capacity + kRowBlock * 2 * kLanes<Real>;
    prob_.reserve(most);
    grad_.reserve(most);
  }

  void operator()(const Chunk& chunk, int32_t* next, int64_t first_entry) {
    const HeadView<Element> view = context_.view(chunk.kv, chunk.first_block);
    Entry<Real>* entries = filed_.data.data() + first_entry;
    with_power(view.alpha, [&](auto exponent) {
      const Power<Real, exponent> power(view.alpha);
      for (int64_t block = chunk.first_block; block < chunk.last_block; ++block) {
        if (context_.is_saved(chunk.kv, block)) run(view, chunk.kv, block, next, entries, power);
      }
    });
  }

 private:
  template <Exponent kExponent>
  void run(const HeadView<Element>& view, int64_t kv, int64_t block_of_kv, int32_t* next, Entry<Real>* entries,
           const Power<Real, kExponent>& power) {
    const SupportLayout& layout = context_.layout;
    const int64_t first_row = block_of_kv % layout.blocks_per_head * kRowBlock;
    const int64_t num_rows = std::min(kRowBlock, params_.num_queries - first_row);
    const int64_t key_dim = params_.head_dim, value_dim = params_.value_head_dim;
    const MatrixView<Element> keys{view.key(0), params_.key.stride_row},
        values{view.value(0), params_.value.stride_row};
    const RowGradient<Real, kExponent> gradient{power, view.alpha};

    const char* saved = context_.region(kv, block_of_kv) + SupportLayout::kHeaderBytes;
    int64_t offset = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t size = params_.support_size[context_.row_index(view, first_row + row)];
      gap_[row] = reinterpret_cast<const Real*>(saved);
      lists_[row] = {reinterpret_cast<const int32_t*>(saved + size * layout.real_bytes), size};
      offset_[row] = offset;
      saved += size * layout.entry_bytes();
      offset += size + kLanes<Real>;  // products are written up to a vector past a range's end
      widen_row(row_pointer<Element>(params_.grad_out, view.batch, view.head, first_row + row), value_dim,
                grad_out_.data() + row * value_dim);
    }

    // dP on the support; what a range writes past its end is overwritten by the next one.
    for_key_ranges(lists_, num_rows, params_.num_keys, values, value_dim,
                   [&](int64_t row, int64_t begin, int64_t count) {
                     gather_dot(grad_out_.data() + row * value_dim, values, value_dim, lists_[row].column + begin,
                                count, grad_.data() + offset_[row] + begin);
                   });
    for (int64_t row = 0; row < num_rows; ++row) {
      const ColumnList& list = lists_[row];
      Real *prob = prob_.data() + offset_[row], *grad = grad_.data() + offset_[row];
      std::memcpy(prob, gap_[row], list.size * sizeof(Real));
      fill_row(prob + list.size, kLanes<Real>, Real(0));
      if (params_.grad_alpha != nullptr) {
        context_.alpha_rows[context_.row_index(view, first_row + row)] =
            gradient.gradient_by_alpha(prob, grad, list.size);
      }
      gradient(prob, grad, list.size);  // now prob and dS
      if (context_.wants_mask() && params_.mask.stride_row != 0) {
        Real* grad_mask = context_.grad_mask_row(view, first_row + row);
        for (int64_t j = 0; j < list.size; ++j) grad_mask[list.column[j] * params_.mask.stride_col] += grad[j];
      }
    }
    std::fill_n(grad_query_.data(), num_rows * key_dim, Real(0));
    for_key_ranges(lists_, num_rows, params_.num_keys, keys, key_dim, [&](int64_t row, int64_t begin, int64_t count) {
      const int32_t* column = lists_[row].column + begin;
      const Real *prob = prob_.data() + offset_[row] + begin, *grad = grad_.data() + offset_[row] + begin;
      if (params_.grad_query.data != nullptr) {
        gather_sum<true>(keys, key_dim, column, grad, count, grad_query_.data() + row * key_dim);
      }
      if (next == nullptr) return;
      for (int64_t j = 0; j < count; ++j) {
        entries[next[column[j]]++] = {static_cast<int32_t>(first_row + row), prob[j], grad[j]};
      }
    });
    if (params_.grad_query.data == nullptr) return;
    for (int64_t row = 0; row < num_rows; ++row) {
      context_.write_grad_query(view, first_row + row, grad_query_.data() + row * key_dim);
    }
  }

  BackwardContext<Element>& context_;
  const AttentionBackward& params_;
  FiledEntries<Real>& filed_;
  // The block's saved lists, and where a row's prob and dS lie in prob_ and grad_.
  ColumnList lists_[kRowBlock];
  const Real* gap_[kRowBlock];
  int64_t offset_[kRowBlock];
  Buffer<Real> grad_out_, grad_query_;  // [kRowBlock, Dv], [kRowBlock, D]
  Buffer<Real> prob_, grad_;            // of the block's entries
};

// The chunks [first, last) that one kv head has in a wave, and where its entries lie.
struct WavePart {
  int64_t kv, first_chunk, last_chunk, first_entry;
  bool is_first, is_last;  // wave with chunks of this kv head
};

template <class Element>
class ListGradients {
  using Real = Accumulator<Element>;

 public:
  ListGradients(BackwardContext<Element>& context, const std::vector<Chunk>& chunks, KeyGradients<Real>& gradients,
                const std::vector<int64_t>& slot, const Parallel& parallel)
      : context_(context),
        params_(context.params),
        chunks_(chunks),
        gradients_(gradients),
        slot_(slot),
        parallel_(parallel) {}

  void operator()(const std::vector<WavePart>& parts) {
    first_chunk_ = parts.front().first_chunk;
    num_chunks_ = parts.back().last_chunk - first_chunk_;
    const int64_t num_keys = params_.num_keys;
    if (!context_.wants_keys() && !context_.wants_mask()) return run_rows(parts, /*files_entries=*/false);
    int64_t num_entries = 0;
    for (int64_t i = 0; i < num_chunks_; ++i) num_entries += chunks_[first_chunk_ + i].num_entries;
    filed_.data.reserve(num_entries);
    filed_.count.reserve(num_chunks_ * num_keys);
    run_tasks(parallel_, num_chunks_, [&] { return [&](int64_t task) { count_columns(first_chunk_ + task); }; });
    run_tasks(parallel_, parts.size(), [&] { return [&](int64_t task) { count_to_positions(parts[task]); }; });
    run_rows(parts, /*files_entries=*/true);
    // A key's entries of several chunks are gathered together, unless they are so many that the rows of Q and dO which
    // one chunk names are better kept in the cache for a whole block of keys.
    const int64_t per_key = num_entries / (num_chunks_ * num_keys);
    const int64_t chunks_at_once = per_key >= kEntriesPerRange / 2 ? 1 : num_chunks_;
    const int64_t key_blocks = (num_keys + kKeyBlock - 1) / kKeyBlock;
    run_tasks(parallel_, parts.size() * key_blocks, [&] {
      return [&, sums = Buffer<Real>(kKeyBlock * (params_.head_dim + params_.value_head_dim))](int64_t task) mutable {
        sum_key_block(parts[task / key_blocks], task % key_blocks * kKeyBlock, chunks_at_once, sums.data());
      };
    });
  }

 private:
  int32_t* count(int64_t chunk) { return filed_.count.data() + (chunk - first_chunk_) * params_.num_keys; }

  void count_columns(int64_t index) {
    const Chunk& chunk = chunks_[index];
    int32_t* const count_of = count(index);
    std::fill_n(count_of, params_.num_keys, 0);
    const SupportLayout& layout = context_.layout;
    for (int64_t block = chunk.first_block; block < chunk.last_block; ++block) {
      if (!context_.is_saved(chunk.kv, block)) continue;
      const HeadView<Element> view = context_.view(chunk.kv, block);
      const char* saved = context_.region(chunk.kv, block) + SupportLayout::kHeaderBytes;
      const int64_t first_row = block % layout.blocks_per_head * kRowBlock;
      for (int64_t row = first_row; row < std::min(params_.num_queries, first_row + kRowBlock); ++row) {
        const int64_t size = params_.support_size[context_.row_index(view, row)];
        const int32_t* column = reinterpret_cast<const int32_t*>(saved + size * layout.real_bytes);
        for (int64_t j = 0; j < size; ++j) ++count_of[column[j]];
        saved += size * layout.entry_bytes();
      }
    }
  }

  // Turns the counts of a part's chunks into positions: keys first, then chunks, so that a key's entries lie together.
  void count_to_positions(const WavePart& part) {
    int32_t position = 0;
    for (int64_t key = 0; key < params_.num_keys; ++key) {
      for (int64_t chunk = part.first_chunk; chunk < part.last_chunk; ++chunk) {
        position += std::exchange(count(chunk)[key], position);
      }
    }
  }

  void run_rows(const std::vector<WavePart>& parts, bool files_entries) {
    std::vector<int64_t> first_entry;
    for (const WavePart& part : parts)
      first_entry.insert(first_entry.end(), part.last_chunk - part.first_chunk, part.first_entry);
    run_tasks(parallel_, num_chunks_, [&] {
      return [&, worker = RowStepWorker<Element>(context_, filed_)](int64_t task) mutable {
        worker(chunks_[first_chunk_ + task], files_entries ? count(first_chunk_ + task) : nullptr, first_entry[task]);
      };
    });
  }

  // Where the entries of a key from chunks before `chunk` end: the last chunk of the key before is where its own begin.
  int64_t entries_end(const WavePart& part, int64_t chunk, int64_t key) {
    if (chunk > part.first_chunk) return part.first_entry + count(chunk - 1)[key];
    return part.first_entry + (key == 0 ? 0 : count(part.last_chunk - 1)[key - 1]);
  }

  // The rows of Q and dO that the next key's first entries name.
  static void prefetch_rows(const MatrixView<Element>& queries, int64_t key_dim, const MatrixView<Element>& grad_outs,
                            int64_t value_dim, const Entry<Real>* begin, const Entry<Real>* end) {
    constexpr int64_t kPrefetchedEntries = 16, kLine = 64 / sizeof(Element);
    for (const Entry<Real>* entry = begin; entry < std::min(end, begin + kPrefetchedEntries); ++entry) {
      for (int64_t d = 0; d < key_dim; d += kLine) __builtin_prefetch(queries.row(entry->row) + d);
      for (int64_t d = 0; d < value_dim; d += kLine) __builtin_prefetch(grad_outs.row(entry->row) + d);
    }
  }

  // dK and dV of a block of keys from the entries filed under them.
  void sum_key_block(const WavePart& part, int64_t first_key, int64_t chunks_at_once, Real* sums) {
    const int64_t last_key = std::min(params_.num_keys, first_key + kKeyBlock), slot = slot_[part.kv];
    const int64_t key_dim = params_.head_dim, value_dim = params_.value_head_dim;
    Real* key_sums = slot < 0 ? sums : gradients_.key(slot, first_key);
    Real* value_sums = slot < 0 ? sums + kKeyBlock * key_dim : gradients_.value(slot, first_key);
    if (slot < 0) std::fill_n(sums, kKeyBlock * (key_dim + value_dim), Real(0));
    for (int64_t chunk = part.first_chunk; chunk < part.last_chunk;) {
      // Up to chunks_at_once chunks, of one query head.
      int64_t next = chunk + 1;
      while (next < part.last_chunk && next - chunk < chunks_at_once &&
             chunks_[next].first_block % context_.layout.blocks_per_head != 0) {
        ++next;
      }
      const HeadView<Element> view = context_.view(part.kv, chunks_[chunk].first_block);
      const MatrixView<Element> queries{view.query(0), params_.query.stride_row};
      const MatrixView<Element> grad_outs{row_pointer<Element>(params_.grad_out, view.batch, view.head),
                                          params_.grad_out.stride_row};
      for (int64_t key = first_key; key < last_key; ++key) {
        const int64_t begin = entries_end(part, chunk, key), size = entries_end(part, next, key) - begin;
        const Entry<Real>* entries = filed_.data.data() + begin;
        prefetch_rows(queries, key_dim, grad_outs, value_dim, entries + size,
                      filed_.data.data() + entries_end(part, next, last_key - 1));
        const auto row_of = [=](int64_t j) { return entries[j].row; };
        if (params_.grad_key.data != nullptr) {
          gather_sum<true>(
              queries, key_dim, size, row_of, [=](int64_t j) { return entries[j].grad_score; },
              key_sums + (key - first_key) * key_dim);
        }
        if (params_.grad_value.data != nullptr) {
          gather_sum<true>(
              grad_outs, value_dim, size, row_of, [=](int64_t j) { return entries[j].prob; },
              value_sums + (key - first_key) * value_dim);
        }
        if (context_.wants_mask() && params_.mask.stride_row == 0) {
          Real sum = 0;
          for (int64_t j = 0; j < size; ++j) sum += entries[j].grad_score;
          context_.grad_mask_row(view, 0)[key * params_.mask.stride_col] += sum;
        }
      }
      chunk = next;
    }
    if (!part.is_last) return;
    const auto write = [&](const Rows& grad, int64_t dim, const Real* from, Real factor) {
      if (grad.data == nullptr) return;
      for (int64_t key = first_key; key < last_key; ++key, from += dim) {
        Element* to =
            mutable_row_pointer<Element>(grad, part.kv / params_.num_kv_heads, part.kv % params_.num_kv_heads, key);
        for (int64_t d = 0; d < dim; d += kLanes<Real>) store(to + d, load(from + d) * factor);
      }
    };
    write(params_.grad_key, key_dim, key_sums, static_cast<Real>(params_.scale));
    write(params_.grad_value, value_dim, value_sums, Real(1));
  }

  BackwardContext<Element>& context_;
  const AttentionBackward& params_;
  const std::vector<Chunk>& chunks_;
  KeyGradients<Real>& gradients_;
  const std::vector<int64_t>& slot_;
  const Parallel& parallel_;
  FiledEntries<Real> filed_;
  int64_t first_chunk_ = 0, num_chunks_ = 0;  // of the wave at hand
};

// ---- the whole pass
// ---------------------------------------------------------------------------------------------------

template <class Element>
std::vector<Chunk> make_chunks(const BackwardContext<Element>& context) {
  const AttentionBackward& params = context.params;
  const int64_t blocks_per_head = context.layout.blocks_per_head;
  std::vector<Chunk> chunks;
  for (int64_t kv = 0; kv < context.num_kv; ++kv) {
    for (int64_t first = 0; first < context.blocks_per_kv;) {
      const int64_t head_end = (first / blocks_per_head + 1) * blocks_per_head;
      Chunk chunk{kv, first, std::min(first + kChunkBlocks, head_end), 0};
      for (int64_t block = first; block < chunk.last_block; ++block) {
        if (!context.is_saved(kv, block)) continue;
        const int64_t first_row = block % blocks_per_head * kRowBlock,
                      row_index = context.row_index(context.view(kv, block), 0);
        for (int64_t row = first_row; row < std::min(params.num_queries, first_row + kRowBlock); ++row) {
          chunk.num_entries += params.support_size[row_index + row];
        }
      }
      chunks.push_back(chunk);
      first = chunk.last_block;
    }
  }
  return chunks;
}

// Consecutive chunks, as many as kWaveBytes allow, split by kv head. Where the mask's gradient is wanted a wave has one
// query head, so that heads which share elements of the mask add to them one after the other.
template <class Element>
std::vector<std::vector<WavePart>> make_waves(const BackwardContext<Element>& context,
                                              const std::vector<Chunk>& chunks) {
  using Real = Accumulator<Element>;
  const int64_t entry_bytes = sizeof(Entry<Real>);
  std::vector<std::vector<WavePart>> waves;
  int64_t bytes = 0, entries = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(chunks.size()); ++i) {
    const Chunk& chunk = chunks[i];
    const int64_t chunk_bytes =
        chunk.num_entries * entry_bytes + context.params.num_keys * static_cast<int64_t>(sizeof(int32_t));
    const bool starts_head = chunk.first_block % context.layout.blocks_per_head == 0;
    if (waves.empty() || bytes + chunk_bytes > kWaveBytes || (context.wants_mask() && starts_head)) {
      waves.emplace_back();
      bytes = entries = 0;
    }
    auto& parts = waves.back();
    const bool is_first = i == 0 || chunks[i - 1].kv != chunk.kv;
    if (parts.empty() || parts.back().kv != chunk.kv) parts.push_back({chunk.kv, i, i, entries, is_first, false});
    parts.back().last_chunk = i + 1;
    parts.back().is_last = i + 1 == static_cast<int64_t>(chunks.size()) || chunks[i + 1].kv != chunk.kv;
    bytes += chunk_bytes;
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
  const std::vector<Chunk> chunks = make_chunks(context);
  const auto waves = make_waves(context, chunks);

  // Which kv heads need their sums kept: those with strips, and those that are in several waves.
  std::vector<int64_t> slot(context.num_kv, -1), with_strips;
  int64_t num_slots = 0;
  for (int64_t kv = 0; kv < context.num_kv; ++kv) {
    for (int64_t block = 0; block < context.blocks_per_kv; ++block) {
      if (context.is_saved(kv, block)) continue;
      with_strips.push_back(kv);
      slot[kv] = num_slots++;
      break;
    }
  }
  for (const auto& wave : waves) {
    for (const WavePart& part : wave) {
      if (slot[part.kv] < 0 && !(part.is_first && part.is_last)) slot[part.kv] = num_slots++;
    }
  }
  KeyGradients<Real> gradients;
  gradients.reserve(num_slots, params);
  if (!with_strips.empty()) differentiate_strips(context, with_strips, gradients, slot, parallel);
  ListGradients<Element> lists(context, chunks, gradients, slot, parallel);
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
