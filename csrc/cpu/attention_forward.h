// Forward pass: scan -> tau -> output, one task per (batch, head, a few blocks of kRowBlock queries).
//
// In:  query (B, H, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv), masks.
// Out: out (B, H, Nq, Dv), tau and support_size (B, H, Nq), the support (support_layout.h), block_mask on request.
// A row block is scanned into lists (scan.h). If its rows turn out to keep a large part of their keys, it is done again
// in strips (dense.h). docs/performance.md has the cost of each step.
#pragma once

#include "cpu/dense.h"
#include "cpu/gather.h"
#include "cpu/quantized_scan.h"
#include "cpu/scan.h"

namespace adasplash2::cpu::ADASPLASH2_ISA {

// The keys (or values) of every kv head in panels of float. A panel is packed when it is first asked for.
template <class Element>
class PackedPanels {
  using Real = Accumulator<Element>;

 public:
  PackedPanels(const AttentionProblem& problem, const Rows& matrix, int64_t depth)
      : problem_(problem),
        matrix_(matrix),
        depth_(depth),
        panels_per_head_(panels_of(problem.num_keys)),
        state_(std::make_unique<std::atomic<State>[]>(num_panels())) {
    data_.reserve(num_panels() * panel_size(), Use::kSparse);
  }

  int64_t panel_size() const { return depth_ * kPanelCols; }

  // The first num_panels panels of a head.
  const Real* head(int64_t kv_index, int64_t num_panels) {
    for (int64_t panel = 0; panel < num_panels; ++panel) pack(kv_index * panels_per_head_ + panel);
    return data_.data() + kv_index * panels_per_head_ * panel_size();
  }

  void pack_all(const Parallel& parallel) {
    run_tasks(parallel, num_panels(), [&] { return [&](int64_t task) { pack(task); }; });
  }

 private:
  int64_t num_panels() const { return problem_.batch * problem_.num_kv_heads * panels_per_head_; }

  enum class State : uint8_t { kNotPacked, kBeingPacked, kPacked };

  // Not std::call_once: on Linux each of its first calls ends in a system call, waiters or not.
  void pack(int64_t index) {
    std::atomic<State>& state = state_[index];
    State found = state.load(std::memory_order_acquire);
    if (found == State::kNotPacked && state.compare_exchange_strong(found, State::kBeingPacked)) {
      const int64_t kv_index = index / panels_per_head_, first = index % panels_per_head_ * kPanelCols;
      const int64_t kv_heads = problem_.num_kv_heads;
      pack_panel(row_pointer<Element>(matrix_, kv_index / kv_heads, kv_index % kv_heads, first), matrix_.stride_row,
                 std::min<int64_t>(kPanelCols, problem_.num_keys - first), depth_, data_.data() + index * panel_size());
      state.store(State::kPacked, std::memory_order_release);
      return;
    }
    while (state.load(std::memory_order_acquire) != State::kPacked) std::this_thread::yield();
  }

  const AttentionProblem& problem_;
  const Rows& matrix_;
  const int64_t depth_, panels_per_head_;
  std::unique_ptr<std::atomic<State>[]> state_;  // of each panel
  Buffer<Real> data_;
};

// The keys in both precisions of the scan, and the sample of them.
template <class Element>
struct ScanKeys {
  PackedPanels<Element> panels;
  bool is_quantized;
  Buffer<float> scale;  // of the integers, by kv head
  QuantizedKeys quantized, sampled;
  int64_t stride;  // of the sample

  ScanKeys(const AttentionProblem& problem, const Parallel& parallel)
      : panels(problem, problem.key, problem.head_dim),
        is_quantized(has_quantized_scan() && !std::is_same_v<Element, double> && problem.mask.data == nullptr &&
                     problem.num_keys >= kQuantizedKeys && problem.head_dim <= kMostQuantizedDim),
        stride(sample_stride(problem.num_keys)) {
    // A short head's panels are packed by the task that comes first: a parallel region would cost more.
    if (!is_quantized && problem.num_keys > kStripKeys) panels.pack_all(parallel);
    if constexpr (!std::is_same_v<Element, double>) {
      if (!is_quantized) return;
      find_scales(problem, parallel);
      quantize(problem, 1, problem.num_keys, quantized, parallel);
      quantize(problem, stride, num_sampled(problem.num_keys, stride), sampled, parallel);
    }
  }

 private:
  // Of every stride-th key a panel: those that take part, as the others may be anything.
  struct Panel {
    int64_t kv_index, first, count;
    const Element* keys;

    Panel(const AttentionProblem& problem, int64_t index, int64_t stride, int64_t num_keys)
        : kv_index(index / panels_of(num_keys)), first(index % panels_of(num_keys) * kPanelCols) {
      const int64_t batch = kv_index / problem.num_kv_heads, kv_head = kv_index % problem.num_kv_heads;
      const int64_t length = length_of(problem, batch);
      count = std::clamp<int64_t>((stride == 1 ? length : num_sampled(length, stride)) - first, 0, kPanelCols);
      keys = row_pointer<Element>(problem.key, batch, kv_head, first * stride + stride / 2);
    }
  };

  // The least one for each head's keys.
  void find_scales(const AttentionProblem& problem, const Parallel& parallel) {
    const int64_t num_heads = problem.batch * problem.num_kv_heads, per_head = panels_of(problem.num_keys);
    Buffer<float> of_panel(num_heads * per_head);
    run_tasks(parallel, num_heads * per_head, [&] {
      return [&](int64_t task) {
        const Panel panel(problem, task, 1, problem.num_keys);
        of_panel[task] = 0;
        for (int64_t row = 0; row < panel.count; ++row) {
          of_panel[task] = max_or_nan(of_panel[task],
                                      least_scale(panel.keys + row * problem.key.stride_row, problem.head_dim, 1.0f));
        }
      };
    });
    scale.reserve(num_heads);
    for (int64_t head = 0; head < num_heads; ++head) {
      // Not finite where a key is not: then neither is any error bound of the head.
      scale[head] = std::numeric_limits<float>::min();
      for (int64_t i = head * per_head; i < (head + 1) * per_head; ++i) {
        scale[head] = max_or_nan(scale[head], of_panel[i]);
      }
    }
  }

  // Every stride-th key.
  void quantize(const AttentionProblem& problem, int64_t stride, int64_t num_keys, QuantizedKeys& keys,
                const Parallel& parallel) {
    keys.reserve(problem, num_keys);
    run_tasks(parallel, problem.batch * problem.num_kv_heads * keys.panels_per_head, [&] {
      return [&](int64_t task) {
        const Panel panel(problem, task, stride, num_keys);
        quantize_panel(panel.keys, problem.key.stride_row * stride, panel.count, problem.head_dim,
                       scale[panel.kv_index], task, keys);
      };
    });
  }
};

// ---- block mask
// -------------------------------------------------------------------------------------------------------

constexpr int64_t kMaskTile = 64;
constexpr uint8_t kTileUnmasked = 1, kTileLive = 2;

struct BlockMaskView {
  uint8_t* data = nullptr;  // of one head
  int64_t num_tiles_n = 0;

  BlockMaskView() = default;
  template <class Element>
  BlockMaskView(uint8_t* base, const HeadView<Element>& view) {
    const int64_t num_tiles_m = (view.problem.num_queries + kMaskTile - 1) / kMaskTile;
    num_tiles_n = (view.problem.num_keys + kMaskTile - 1) / kMaskTile;
    data = base == nullptr ? nullptr : base + view.index() * num_tiles_m * num_tiles_n;
  }
  // Row blocks of different threads share tiles.
  void mark(int64_t row, int64_t col, uint8_t bit) const {
    __atomic_fetch_or(data + row / kMaskTile * num_tiles_n + col / kMaskTile, bit, __ATOMIC_RELAXED);
  }
};

static_assert(kMaskTile == kPanelCols, "a tile of the block mask is as wide as a panel");

template <class Element>
void mark_unmasked(const HeadView<Element>& view, const RowBlock& block, const BlockMaskView& block_mask) {
  MaskPanel<Accumulator<Element>> mask;
  for (int64_t row = 0; row < block.num_rows; ++row) {
    for (int64_t first_key = 0; first_key < block.key_end[row]; first_key += kPanelCols) {
      load_mask_panel(view, block.first_row + row, first_key, block.key_end[row], mask);
      if (mask.allowed != 0) block_mask.mark(block.first_row + row, first_key, kTileUnmasked);
    }
  }
}

// ---- lists or strips
// --------------------------------------------------------------------------------------------------

// Strips are faster where rows keep more than this part of their keys; yet a list of a few keys costs little whatever
// part it is (the first rows of a causal problem).
constexpr float kStripDensity = 0.35f, kStripSupport = 256;
constexpr int kLastSteps = 3;          // of the bound of a whole list
constexpr int64_t kFirstEstimate = 4;  // panels scanned before the first estimate of that part; then 8, 16, ...
constexpr int64_t kEstimatedRows = 8;  // every so many rows are asked
constexpr int64_t kSampledCols = 256;  // of a strip row, for the first guess at its tau
constexpr int64_t kSearchedCols =
    8192;  // of the strip rows that look for their tau together: they stay in the L1 cache

// ---- one task
// ---------------------------------------------------------------------------------------------------------

template <class Element>
class ForwardWorker {
  using Real = Accumulator<Element>;

 public:
  ForwardWorker(const AttentionForward& params, ScanKeys<Element>& keys)
      : params_(params), keys_(keys), layout_(params), lists_(std::make_unique<RowLists<Real>>()) {
    groups_.reserve(kRowBlock * params.head_dim);
    query_rows_.reserve(kRowBlock * params.head_dim);
    out_rows_.reserve(kGatherRows * params.value_head_dim);
  }

  static int64_t tasks_per_head(const SupportLayout& layout) {
    return (layout.blocks_per_head + layout.gather_blocks - 1) / layout.gather_blocks;
  }

  void operator()(int64_t task) {
    const int64_t num_tasks = tasks_per_head(layout_), head = task / num_tasks;
    const HeadView<Element> view(params_, head / params_.num_heads, head % params_.num_heads);
    // Causal rows see more keys the later they come: the longest tasks go first.
    const int64_t first = (num_tasks - 1 - task % num_tasks) * layout_.gather_blocks;
    with_power(view.alpha, [&](auto exponent) {
      for (int64_t block = first; block < std::min(layout_.blocks_per_head, first + layout_.gather_blocks); ++block) {
        run<exponent>(view, block);
      }
    });
    sum_values(view);
  }

 private:
  template <Exponent kExponent>
  void run(const HeadView<Element>& view, int64_t block_index) {
    const RowBlock block(view, block_index);
    const Power<Real, kExponent> power(view.alpha);
    begin_block(view, block);
    if (params_.num_keys > kStripKeys && scan(view, block, power)) {
      solve_lists(view, block, RowSet().set(), power, kLikelyMargin);
      keep_block(view, block, view.index() * layout_.blocks_per_head + block_index, power);
    } else {
      run_strips(view, block, power);
    }
  }

  // Where this block's results go.
  void begin_block(const HeadView<Element>& view, const RowBlock& block) {
    const int64_t first = view.index() * params_.num_queries + block.first_row;
    tau_ = static_cast<Real*>(params_.tau) + first;
    support_size_ = params_.support_size + first;
    block_mask_ = BlockMaskView(params_.block_mask, view);
    if (block_mask_.data != nullptr) mark_unmasked(view, block, block_mask_);
    char* support = static_cast<char*>(params_.support);
    origins_ = support == nullptr ? nullptr : reinterpret_cast<Real*>(support + layout_.origin_offset(first));
  }

  void set_row(int64_t row, Real score_max, Real tau_shifted, Real unit, int64_t support_size) {
    // No key: tau is +inf; a NaN score: tau is NaN.
    tau_[row] = unit * (score_max + tau_shifted);
    support_size_[row] = static_cast<int32_t>(support_size);
    if (origins_ != nullptr) {
      origins_[2 * row] = score_max;
      origins_[2 * row + 1] = tau_shifted;
    }
  }

  // Every panel the block may see; false if the rows keep so much that strips are faster.
  template <Exponent kExponent>
  bool scan(const HeadView<Element>& view, const RowBlock& block, const Power<Real, kExponent>& power) {
    const int64_t kv_index = view.batch * params_.num_kv_heads + view.kv_head;
    lists_->reset(block.num_rows);
    is_exact_ = !quantize(view, block, kv_index) || !guess_bounds(view, block, kv_index, power);
    const Real* packed_keys = is_exact_ ? pack(view, block, kv_index) : nullptr;
    int64_t next_estimate = kFirstEstimate;
    for (int64_t panel = block.num_panels - 1; panel >= 0; --panel) {
      scan_one(view, block, packed_keys, kv_index, panel, power);
      const int64_t num_scanned = block.num_panels - panel;
      if (num_scanned == next_estimate && panel > 0) {
        if (prefers_strips(view, block, num_scanned, power)) return false;
        next_estimate *= 2;
      }
    }
    return true;
  }

  template <Exponent kExponent>
  void scan_one(const HeadView<Element>& view, const RowBlock& block, const Real* packed_keys, int64_t kv_index,
                int64_t panel, const Power<Real, kExponent>& power) {
    if constexpr (!std::is_same_v<Real, double>) {
      if (!is_exact_)
        return scan_panel_quantized(view, block, GroupSet::all(), quantized_queries_, keys_.quantized, kv_index, panel,
                                    power, thresholds_, *lists_);
    }
    scan_panel(view, block, groups_.data(), packed_keys + panel * keys_.panels.panel_size(), panel, power, *lists_);
  }

  // In a scan in integers: for the row's lower bound, and what its list has got since the last call.
  void set_threshold(int64_t row) { thresholds_.set(row, lists_->lower[row], quantized_queries_); }
  void convert_sums(int64_t row) {
    if constexpr (!std::is_same_v<Real, double>) {
      if (!is_exact_) thresholds_.convert_sums(*lists_, row);
    }
  }

  // Lower bounds for all rows that see enough of the sample; false, and none, if wide margins would leave too many
  // candidates.
  template <Exponent kExponent>
  bool guess_bounds(const HeadView<Element>& view, const RowBlock& block, int64_t kv_index,
                    const Power<Real, kExponent>& power) {
    if constexpr (!std::is_same_v<Real, double>) {
      const Real unit = view.units.unit;
      Real candidates = 0, visible = 0;
      RowBlock sample = block;
      sample.set_key_ends([&](int64_t row) {
        const int64_t size = num_sampled(block.key_end[row], keys_.stride);
        return size < kLeastSampled ? 0 : size;
      });
      for (int64_t row = 0; row < block.num_groups() * kTileRows; ++row) {
        lists_->limit[row] = std::numeric_limits<int32_t>::max();  // all scores, as they come
        set_threshold(row);
      }
      for (int64_t panel = sample.num_panels - 1; panel >= 0; --panel) {
        scan_panel_quantized(view, sample, GroupSet::all(), quantized_queries_, keys_.sampled, kv_index, panel, power,
                             thresholds_, *lists_);
      }
      for (int64_t first = 0; first < block.num_rows; first += kSearchesAtOnce) {
        TauSearch<Real> searches[kSearchesAtOnce];
        int64_t searched[kSearchesAtOnce], count = 0;
        for (int64_t row = first; row < std::min(block.num_rows, first + kSearchesAtOnce); ++row) {
          const int64_t size = lists_->size[row];
          thresholds_.convert_sums(*lists_, row);
          const Real score_max = lists_->score_max[row];
          lists_->restart(row, 1);
          if (size == 0) continue;
          const Real fraction = static_cast<Real>(size) / static_cast<Real>(block.key_end[row]);
          searched[count] = row;
          searches[count++] = {lists_->score[row], size, score_max, -1 / unit, kGuessedMass * fraction, false};
        }
        estimate_taus<true>(power, searches, count, unit);
        for (int64_t i = 0; i < count; ++i) {
          const TauSearch<Real>& search = searches[i];
          const int64_t row = searched[i];
          const Real guess = search.score_max + search.t - lists_->margin[row] / 2;
          const Real expected =
              kGuessedMass / search.fraction * static_cast<Real>(list_count_above(search.score, search.size, guess));
          lists_->restart(row, kLeastGrowth + 2 * static_cast<int32_t>(expected));
          lists_->lower[row] = lists_->guess[row] = guess;
          set_threshold(row);
          if (lists_->margin[row] * unit > kSmallMargin) candidates += expected;
          visible += static_cast<Real>(block.key_end[row]);
        }
      }
      if (candidates > kMostCandidates * visible) {
        lists_->reset(block.num_rows);
        return false;
      }
    }
    return true;
  }

  // From the part of their keys that the rows will keep, estimated by the panels scanned so far (the last ones). It
  // decides how the block is computed, never what, and depends on the data alone: the same choice on every run.
  template <Exponent kExponent>
  bool prefers_strips(const HeadView<Element>& view, const RowBlock& block, int64_t num_scanned,
                      const Power<Real, kExponent>& power) {
    const Real unit = view.units.unit;
    const int64_t first_key = (block.num_panels - num_scanned) * kPanelCols;
    int64_t kept = 0, seen = 0, visible = 0, num_rows = 0;
    TauSearch<Real> searches[kSearchesAtOnce];
    static_assert(kRowBlock <= kEstimatedRows * kSearchesAtOnce, "all estimates at once");
    for (int64_t row = 0; row < block.num_rows; row += kEstimatedRows) {
      const int64_t num_seen = block.key_end[row] - first_key, size = lists_->size[row];
      if (num_seen < kPanelCols || lists_->is_poisoned[row] || size == 0) continue;
      convert_sums(row);
      pad(lists_->score[row], size);
      const Real score_max = list_max(lists_->score[row], size).max;
      const Real start = std::max(lists_->lower[row] - score_max, -1 / unit);
      const Real fraction = static_cast<Real>(num_seen) / static_cast<Real>(block.key_end[row]);
      searches[num_rows++] = {lists_->score[row], size, score_max, start, fraction, false};
      seen += num_seen;
      visible += block.key_end[row];
    }
    if (num_rows == 0) return false;
    estimate_taus<false>(power, searches, num_rows, unit);
    for (int64_t i = 0; i < num_rows; ++i) {
      kept += list_count_above(searches[i].score, searches[i].size, searches[i].score_max + searches[i].t);
    }
    const float density = static_cast<float>(kept) / static_cast<float>(seen);
    return density > kStripDensity && density * static_cast<float>(visible / num_rows) > kStripSupport;
  }

  // The block's queries and the head's keys in float.
  const Real* pack(const HeadView<Element>& view, const RowBlock& block, int64_t kv_index) {
    pack_groups(view.query(block.first_row), params_.query.stride_row, block.num_rows, params_.head_dim,
                view.units.query_factor, groups_.data());
    return keys_.panels.head(kv_index, block.num_panels);
  }

  bool quantize(const HeadView<Element>& view, const RowBlock& block, int64_t kv_index) {
    if constexpr (!std::is_same_v<Real, double>) {
      if (!keys_.is_quantized) return false;
      float norm = 0, residual_norm = 0;
      for (int64_t panel = 0; panel < block.num_panels; ++panel) {
        const int64_t index = kv_index * keys_.quantized.panels_per_head + panel;
        norm = std::max(norm, keys_.quantized.norm[index]);
        residual_norm = max_or_nan(residual_norm, keys_.quantized.residual_norm[index]);
      }
      quantized_queries_.key_scale = keys_.scale[kv_index];
      if (!quantize_queries(view, block, norm, residual_norm, quantized_queries_)) return false;
      for (int64_t row = 0; row < block.num_rows; ++row) lists_->margin[row] = 2 * quantized_queries_.epsilon[row];
      return true;
    }
    return false;
  }

  // Scores of the named rows -> tau and gaps; the lists keep the support only.
  template <Exponent kExponent>
  void solve_lists(const HeadView<Element>& view, const RowBlock& block, const RowSet& rows,
                   const Power<Real, kExponent>& power, Real part_of_margin) {
    const Real unit = view.units.unit;
    RowSet wrong;
    if (is_exact_) {
      for (int64_t row = 0; row < block.num_rows; ++row) {
        if (rows[row]) prune(*lists_, row, power, unit, kLastSteps);
      }
    } else {
      cut_lists(block, rows, power, unit, part_of_margin);
      score_candidates(view, block, rows);
    }
    for (int64_t first = 0; first < block.num_rows; first += kSearchesAtOnce) {
      TauSearch<Real> searches[kSearchesAtOnce];
      int64_t searched[kSearchesAtOnce], count = 0;
      for (int64_t row = first; row < std::min(block.num_rows, first + kSearchesAtOnce); ++row) {
        if (!rows[row]) continue;
        const int64_t size = lists_->size[row];
        if (lists_->is_poisoned[row] && block.key_end[row] > 0) {
          set_row(row, 0, std::numeric_limits<Real>::quiet_NaN(), unit, 0);
        } else if (size == 0) {
          lists_->lower[row] = -kInfinity<Real>;
          set_row(row, 0, kInfinity<Real>, unit, 0);
          if (lists_->guess[row] > -kInfinity<Real>) wrong.set(row);
        } else {
          pad(lists_->score[row], size);
          const Real score_max = list_max(lists_->score[row], size).max;
          const Real start = std::max(lists_->lower[row] + part_of_margin * lists_->margin[row] - score_max, -1 / unit);
          searched[count] = row;
          searches[count++] = {lists_->score[row], size, score_max, start, Real(1), false};
        }
      }
      find_taus(power, searches, count, unit);
      for (int64_t i = 0; i < count; ++i) {
        if (!keep_support(block, searched[i], searches[i], unit)) wrong.set(searched[i]);
      }
    }
    if (wrong.any()) solve_again(view, block, wrong, power);
  }

  // Rows whose guess was wrong: now they have bounds that were derived. The others of their groups take no more keys.
  template <Exponent kExponent>
  void solve_again(const HeadView<Element>& view, const RowBlock& block, const RowSet& rows,
                   const Power<Real, kExponent>& power) {
    if constexpr (!std::is_same_v<Real, double>) {
      GroupSet groups;
      for (int64_t row = 0; row < block.num_rows; ++row) {
        if (rows[row]) {
          groups.insert(row / kTileRows);
          lists_->restart(row, kLeastGrowth);
        } else {
          lists_->lower[row] = kInfinity<Real>;
        }
        set_threshold(row);
      }
      const int64_t kv_index = view.batch * params_.num_kv_heads + view.kv_head;
      for (int64_t panel = block.num_panels - 1; panel >= 0; --panel) {
        scan_panel_quantized(view, block, groups, quantized_queries_, keys_.quantized, kv_index, panel, power,
                             thresholds_, *lists_);
      }
      solve_lists(view, block, rows, power, Real(1));
    }
  }

  // Drops what is a part of the margin below the tau of quantised scores; with less than all of it, that is a guess.
  template <Exponent kExponent>
  void cut_lists(const RowBlock& block, const RowSet& rows, const Power<Real, kExponent>& power, Real unit,
                 Real part_of_margin) {
    for (int64_t first = 0; first < block.num_rows; first += kSearchesAtOnce) {
      TauSearch<Real> searches[kSearchesAtOnce];
      Real margin[kSearchesAtOnce];
      int64_t searched[kSearchesAtOnce], count = 0;
      for (int64_t row = first; row < std::min(block.num_rows, first + kSearchesAtOnce); ++row) {
        const int64_t size = lists_->size[row];
        if (!rows[row] || size == 0) continue;
        convert_sums(row);
        pad(lists_->score[row], size);
        const Real score_max = lists_->score_max[row];
        margin[count] = part_of_margin * lists_->margin[row];
        const Real start = std::max(lists_->lower[row] + margin[count] - score_max, -1 / unit);
        searched[count] = row;
        searches[count++] = {lists_->score[row], size, score_max, start, Real(1), false};
      }
      take_steps<false>(power, searches, count, unit, kLastSteps, [&](TauSearch<Real>& search, const Sums<Real>& sums) {
        search.is_done = !(sums.prob > 1 && sums.weight > 0);
        if (search.is_done) return;
        const Real increase = power.norm_step(sums.prob, sums.weight) / unit;
        search.t += increase;
        search.is_done = increase < margin[&search - searches] / 8;
      });
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = searched[i], size = searches[i].size;
        const Real tau = searches[i].score_max + searches[i].t;
        const Real bound = tau - tau_rounding(size, tau, unit) - margin[i];
        if (bound > lists_->lower[row]) {
          lists_->lower[row] = bound;
          if (part_of_margin < 1) lists_->guess[row] = bound;
        }
        lists_->size[row] =
            static_cast<int32_t>(list_keep_above(lists_->score[row], lists_->column[row], size, lists_->lower[row]));
      }
    }
  }

  // The true scores of all candidates of the named rows.
  void score_candidates(const HeadView<Element>& view, const RowBlock& block, const RowSet& rows) {
    const int64_t dim = params_.head_dim;
    for (int64_t row = 0; row < block.num_rows; ++row) {
      entries_[row] = {lists_->column[row], lists_->score[row], rows[row] ? lists_->size[row] : 0};
      if (!rows[row]) continue;
      const Element* query = view.query(block.first_row + row);
      for (int64_t d = 0; d < dim; d += kLanes<Real>) {
        store(query_rows_.data() + row * dim + d, load(query + d) * view.units.query_factor);
      }
    }
    const MatrixView<Element> keys{view.key(0), params_.key.stride_row};
    for_key_ranges(entries_, block.num_rows, params_.num_keys, keys, dim,
                   [&](int64_t row, const int32_t* column, Real* score, int64_t count, bool is_cached) {
                     gather_dot(query_rows_.data() + row * dim, keys, dim, column, count, is_cached, score);
                   });
  }

  // Scores -> gaps of one row whose tau was found, and a bound for its scan; false if its guess was wrong.
  bool keep_support(const RowBlock& block, int64_t row, const TauSearch<Real>& found, Real unit) {
    Real* score = lists_->score[row];
    int32_t* column = lists_->column[row];
    int64_t size = found.size;
    const Real score_max = found.score_max, tau_shifted = found.t, tau = score_max + tau_shifted;
    lists_->lower[row] = tau - lists_->margin[row] / 2 - tau_rounding(size, tau, unit);
    if (lists_->guess[row] > lists_->lower[row]) return false;
    for (int64_t j = 0; j < size; j += kLanes<Real>)
      store(score + j, ((load(score + j) - score_max) - tau_shifted) * unit);
    pad(score, size);
    size = list_keep_above(score, column, size, Real(0));
    lists_->size[row] = static_cast<int32_t>(size);
    set_row(row, score_max, tau_shifted, unit, size);
    if (block_mask_.data != nullptr) {
      for (int64_t j = 0; j < size; ++j) block_mask_.mark(block.first_row + row, column[j], kTileLive);
    }
    return true;
  }

  // Saves the gaps of a block for the backward pass, and keeps its probabilities until sum_values().
  template <Exponent kExponent>
  void keep_block(const HeadView<Element>& view, const RowBlock& block, int64_t block_index,
                  const Power<Real, kExponent>& power) {
    int64_t num_entries = 0;
    for (int64_t row = 0; row < block.num_rows; ++row) num_entries += lists_->size[row];
    char* saved = params_.support == nullptr ? nullptr : layout_.take_block(params_.support, block_index, num_entries);
    const int64_t needed = num_entries + block.num_rows * kLanes<Real>;
    if (kept_entries_ + needed > kept_prob_.size()) sum_values(view);
    kept_prob_.reserve(std::max(needed, kGatherRows * kSavedPerRow));
    kept_column_.reserve(kept_prob_.size());
    for (int64_t row = 0; row < block.num_rows; ++row) {
      const int64_t size = lists_->size[row];
      Real *gap = lists_->score[row], *prob = kept_prob_.data() + kept_entries_;
      int32_t* column = kept_column_.data() + kept_entries_;
      if (saved != nullptr) {
        std::memcpy(saved, gap, size * sizeof(Real));
        std::memcpy(saved + size * sizeof(Real), lists_->column[row], size * sizeof(int32_t));
        saved += size * layout_.entry_bytes();
      }
      pad(gap, size);
      for (int64_t j = 0; j < size; j += kLanes<Real>)
        store(prob + j, power.prob(max<Real>(load(gap + j), Vector<Real>{})));
      std::memcpy(column, lists_->column[row], size * sizeof(int32_t));
      kept_row_[num_kept_] = block.first_row + row;
      kept_[num_kept_++] = {column, prob, size};
      kept_entries_ += size + kLanes<Real>;
    }
  }

  // The output of all rows that were kept.
  void sum_values(const HeadView<Element>& view) {
    const int64_t dim = params_.value_head_dim;
    const MatrixView<Element> values{view.value(0), params_.value.stride_row};
    std::fill_n(out_rows_.data(), num_kept_ * dim, Real(0));
    for_key_ranges(kept_, num_kept_, params_.num_keys, values, dim,
                   [&](int64_t i, const int32_t* column, const Real* prob, int64_t count, bool is_cached) {
                     gather_sum(values, dim, column, prob, count, is_cached, out_rows_.data() + i * dim);
                   });
    for (int64_t i = 0; i < num_kept_; ++i) write_out(view, kept_row_[i], out_rows_.data() + i * dim);
    num_kept_ = kept_entries_ = 0;
  }

  void write_out(const HeadView<Element>& view, int64_t row, const Real* out) {
    Element* to = mutable_row_pointer<Element>(params_.out, view.batch, view.head, row);
    const Real tau = static_cast<const Real*>(params_.tau)[view.index() * params_.num_queries + row];
    if (tau != tau) fill_row(to, params_.value_head_dim, tau);
    else convert_row(out, params_.value_head_dim, to);
  }

  template <Exponent kExponent>
  void run_strips(const HeadView<Element>& view, const RowBlock& block, const Power<Real, kExponent>& power) {
    const Real* packed_keys = pack(view, block, view.batch * params_.num_kv_heads + view.kv_head);
    const int64_t dim = params_.value_head_dim, num_cols = block.num_panels * kPanelCols;
    strip_.reserve(block.num_panels);
    for (int64_t first = 0; first < block.num_rows; first += strip_.rows) {
      const int64_t last = std::min(block.num_rows, first + strip_.rows);
      score_strip(view, block, first, groups_.data(), packed_keys, strip_);
      const int64_t at_once = std::clamp<int64_t>(kSearchedCols / std::max<int64_t>(num_cols, 1), 1, kSearchesAtOnce);
      for (int64_t row = first; row < last; row += at_once) {
        solve_strip_rows(view, block, row, std::min(last, row + at_once), strip_.row(row - first), num_cols, power);
      }
      // Rows that fill up the last group have probabilities of no meaning; their output is not written.
      const int64_t num_padded = (last - first + kTileRows - 1) / kTileRows * kTileRows;
      std::fill_n(strip_out_.reserve(strip_.rows * dim), num_padded * dim, Real(0));
      for (int64_t first_key = 0; first_key < num_cols; first_key += kPanelCols) {
        const MatrixView<Element> values{view.value(first_key), params_.value.stride_row};
        const int64_t count = std::min<int64_t>(kPanelCols, params_.num_keys - first_key);
        const bool are_finite = all_finite(values, count, dim);
        for (int64_t row = first; row < last; row += kTileRows) {
          accumulate_rows(strip_.row(row - first) + first_key, strip_.stride, values, count, dim,
                          strip_out_.data() + (row - first) * dim, are_finite);
        }
      }
      for (int64_t row = first; row < last; ++row) {
        write_out(view, block.first_row + row, strip_out_.data() + (row - first) * dim);
      }
    }
  }

  // Scores -> probabilities, in place, of the rows [first, last), at most kSearchesAtOnce.
  template <Exponent kExponent>
  void solve_strip_rows(const HeadView<Element>& view, const RowBlock& block, int64_t first, int64_t last, Real* scores,
                        int64_t num_cols, const Power<Real, kExponent>& power) {
    const Real unit = view.units.unit;
    TauSearch<Real> searches[kSearchesAtOnce];
    int64_t searched[kSearchesAtOnce], count = 0;
    // Long rows start from the tau of a part that stands for all of the row.
    const int64_t num_seen = std::min(num_cols, kSampledCols);
    const Real fraction = static_cast<Real>(num_seen) / static_cast<Real>(num_cols);
    for (int64_t row = first; row < last; ++row) {
      Real* score = scores + (row - first) * strip_.stride;
      const MaxResult<Real> top = list_raise_and_max(score, num_cols);
      if (!top.is_finite || top.max == kLowest<Real>) {
        set_row(row, 0, top.is_finite ? kInfinity<Real> : std::numeric_limits<Real>::quiet_NaN(), unit, 0);
        fill_row(score, num_cols, Real(0));
      } else {
        searched[count] = row;
        searches[count++] = {score, num_seen, top.max, -1 / unit, fraction, false};
      }
    }
    if (num_seen < num_cols) {
      estimate_taus<false>(power, searches, count, unit);
      for (int64_t i = 0; i < count; ++i) {
        searches[i].size = num_cols;
        searches[i].is_done = false;
      }
    }
    find_taus(power, searches, count, unit);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = searched[i];
      Real* score = scores + (row - first) * strip_.stride;
      const Real score_max = searches[i].score_max, tau_shifted = searches[i].t;
      int64_t size = 0;
      for (int64_t first_key = 0; first_key < num_cols; first_key += kPanelCols) {
        int64_t size_of_panel = 0;
        for (int64_t j = first_key; j < first_key + kPanelCols; j += kLanes<Real>) {
          const Vector<Real> gap = max<Real>(((load(score + j) - score_max) - tau_shifted) * unit, Vector<Real>{});
          size_of_panel += __builtin_popcount(above<Real>(gap, Vector<Real>{}));
          store(score + j, power.prob(gap));
        }
        if (size_of_panel > 0 && block_mask_.data != nullptr) {
          block_mask_.mark(block.first_row + row, first_key, kTileLive);
        }
        size += size_of_panel;
      }
      set_row(row, score_max, tau_shifted, unit, size);
    }
  }

  const AttentionForward& params_;
  ScanKeys<Element>& keys_;
  const SupportLayout layout_;
  QuantizedQueries quantized_queries_;
  QuantizedThresholds thresholds_;
  bool is_exact_ = true;     // the lists hold scores, not candidates by quantised scores
  Buffer<Real> groups_;      // the block's queries, packed
  Buffer<Real> query_rows_;  // [kRowBlock, D], times query_factor
  EntryList<Real> entries_[kRowBlock];
  std::unique_ptr<RowLists<Real>> lists_;
  // Rows that wait for sum_values().
  Buffer<Real> kept_prob_;
  Buffer<int32_t> kept_column_;
  int64_t kept_entries_ = 0, num_kept_ = 0;
  int64_t kept_row_[kGatherRows];
  EntryList<Real> kept_[kGatherRows];
  Buffer<Real> out_rows_;  // [kGatherRows, Dv]
  Strip<Real> strip_;
  Buffer<Real> strip_out_;  // [strip rows, Dv]
  Real* tau_ = nullptr;
  int32_t* support_size_ = nullptr;
  BlockMaskView block_mask_;
  Real* origins_ = nullptr;
};

template <class Element>
void forward_typed(const AttentionForward& params, const Parallel& parallel) {
  ScanKeys<Element> keys(params, parallel);
  const int64_t num_tasks =
      params.batch * params.num_heads * ForwardWorker<Element>::tasks_per_head(SupportLayout(params));
  run_tasks(parallel, num_tasks, [&] { return ForwardWorker<Element>(params, keys); });
}

inline void attention_forward(const AttentionForward& params, const Parallel& parallel) {
  switch (params.dtype) {
    case DataType::kFloat32:
      return forward_typed<float>(params, parallel);
    case DataType::kBFloat16:
      return forward_typed<BFloat16>(params, parallel);
    case DataType::kFloat16:
      return forward_typed<Float16>(params, parallel);
    case DataType::kFloat64:
      return forward_typed<double>(params, parallel);
    case DataType::kBool:
      break;
  }
  throw std::invalid_argument("adasplash2: expected a floating point dtype");
}

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
