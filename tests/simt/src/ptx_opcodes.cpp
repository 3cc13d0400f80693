// Every instruction that the interpreter knows, by its full name: a modifier that is not here is an error.
#include <unordered_map>

#include "barrier.h"
#include "cp_async.h"
#include "mbarrier.h"
#include "ptx.h"
#include "scalar.h"
#include "tma.h"
#include "warp_matrix.h"
#include "wgmma.h"

namespace simt {

namespace {

using Table = std::unordered_map<std::string, std::vector<PtxOpcode>>;

std::string vector_of(char kind, int count) { return "{" + std::string(static_cast<size_t>(count), kind) + "}"; }

void add_matrices(Table& table) {
  for (const int count : {2, 4}) {
    const std::string registers = vector_of('r', count), name = "matrix.sync.aligned.m8n8.x" + std::to_string(count);
    table["ld" + name + ".shared.b16"] = {{registers + ",[r]", &execute_ldmatrix, count}};
    table["ld" + name + ".trans.shared.b16"] = {{registers + ",[r]", &execute_ldmatrix, count + kTransposed}};
    table["st" + name + ".shared.b16"] = {{"[r]," + registers, &execute_stmatrix, count}};
    table["st" + name + ".trans.shared.b16"] = {{"[r]," + registers, &execute_stmatrix, count + kTransposed}};
  }
  const std::string mma = "mma.sync.aligned.", operands = "{ffff},{rrrr},{rr},{ffff}";
  table[mma + "m16n8k16.row.col.f32.bf16.bf16.f32"] = {
      {operands, &execute_mma_k16, static_cast<int>(MatrixElement::kBFloat16)}};
  table[mma + "m16n8k16.row.col.f32.f16.f16.f32"] = {
      {operands, &execute_mma_k16, static_cast<int>(MatrixElement::kFloat16)}};
  table[mma + "m16n8k8.row.col.f32.tf32.tf32.f32"] = {{operands, &execute_mma_k8_tf32, 0}};
}

void add_tma(Table& table) {
  for (int rank = 2; rank <= 5; ++rank) {
    const std::string tensor = ".async.bulk.tensor." + std::to_string(rank) + "d.";
    const std::string box = "[l," + vector_of('r', rank) + "]";
    table["cp" + tensor + "shared::cluster.global.mbarrier::complete_tx::bytes"] = {
        {"[r]," + box + ",[r]", &execute_tma_load, rank}};
    table["cp" + tensor + "global.shared::cta.bulk_group"] = {{box + ",[r]", &execute_tma_store, rank}};
    table["cp.reduce" + tensor + "global.shared::cta.add.bulk_group"] = {{box + ",[r]", &execute_tma_reduce_add, rank}};
  }
  table["prefetch.tensormap"] = {{"[l]", &execute_tma_prefetch, 0}};
  table["cp.async.bulk.commit_group"] = {{"", &execute_tma_store_commit, 0}};
  table["cp.async.bulk.wait_group"] = {{"n", &execute_tma_store_wait, 0}};
  table["cp.async.bulk.wait_group.read"] = {{"n", &execute_tma_store_wait, 0}};
}

void add_wgmma(Table& table) {
  for (int n = 8; n <= 256; n += 8) {
    for (const MatrixElement element : {MatrixElement::kBFloat16, MatrixElement::kFloat16}) {
      const std::string type = element == MatrixElement::kBFloat16 ? ".bf16.bf16" : ".f16.f16";
      const std::string name = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(n) + "k16.f32" + type;
      const std::string acc = vector_of('f', n / 2);
      table[name] = {{acc + ",l,l,p,n,n,n,n", &execute_wgmma, wgmma_parameter(n, element, false)},
                     {acc + ",{rrrr},l,p,n,n,n", &execute_wgmma, wgmma_parameter(n, element, true)}};
    }
  }
  table["wgmma.fence.sync.aligned"] = {{"", &execute_wgmma_fence, 0}};
  table["wgmma.commit_group.sync.aligned"] = {{"", &execute_wgmma_commit, 0}};
  table["wgmma.wait_group.sync.aligned"] = {{"n", &execute_wgmma_wait, 0}};
}

Table make_table() {
  Table table;
  add_matrices(table);
  add_tma(table);
  add_wgmma(table);
  table["cp.async.cg.shared.global"] = {{"[r],[l],n,r", &execute_cp_async, 1}};
  table["cp.async.ca.shared.global"] = {{"[r],[l],n,r", &execute_cp_async, 0}};
  table["cp.async.commit_group"] = {{"", &execute_cp_async_commit, 0}};
  table["cp.async.wait_group"] = {{"n", &execute_cp_async_wait, 0}};
  table["cvt.rn.bf16x2.f32"] = {{"r,f,f", &execute_cvt_bf16x2, 0}};
  table["cvt.rn.f16x2.f32"] = {{"r,f,f", &execute_cvt_f16x2, 0}};
  table["cvt.rn.relu.f16x2.f32"] = {{"r,f,f", &execute_cvt_f16x2_relu, 0}};
  table["cvt.rna.tf32.f32"] = {{"r,f", &execute_cvt_tf32, 0}};
  table["max.NaN.f32"] = {{"f,f,f", &execute_max_nan, 0}};
  table["setp.ne.b32"] = {{"p,r,n", &execute_setp_ne, 0}};
  table["selp.u32"] = {{"r,n,n,p", &execute_selp, 0}};
  table["elect.sync"] = {{"_|p,n", &execute_elect, 0}};
  table["setmaxnreg.inc.sync.aligned.u32"] = {{"n", &execute_setmaxnreg, 0}};
  table["setmaxnreg.dec.sync.aligned.u32"] = {{"n", &execute_setmaxnreg, 0}};
  table["bar.sync"] = {{"n,n", &execute_bar_sync, 0}};
  table["bar.arrive"] = {{"n,n", &execute_bar_arrive, 0}};
  table["fence.proxy.async.shared::cta"] = {{"", &execute_fence_proxy_async, 0}};
  table["fence.mbarrier_init.release.cluster"] = {{"", &execute_fence_mbarrier_init, 0}};
  table["mbarrier.init.shared::cta.b64"] = {{"[r],r", &execute_mbarrier_init, 0}};
  table["mbarrier.inval.shared::cta.b64"] = {{"[r]", &execute_mbarrier_inval, 0}};
  table["mbarrier.arrive.shared::cta.b64"] = {{"_,[r]", &execute_mbarrier_arrive, 0}};
  table["mbarrier.arrive.expect_tx.shared::cta.b64"] = {{"_,[r],r", &execute_mbarrier_arrive, 1}};
  table["mbarrier.expect_tx.relaxed.cta.shared::cta.b64"] = {{"[r],r", &execute_mbarrier_expect_tx, 0}};
  table["mbarrier.test_wait.parity.shared::cta.b64"] = {{"p,[r],r", &execute_mbarrier_test_wait, 0}};
  table["mbarrier.try_wait.parity.shared::cta.b64"] = {{"p,[r],r", &execute_mbarrier_try_wait, 0}};
  return table;
}

}  // namespace

const std::vector<PtxOpcode>* find_opcodes(const std::string& name, const char** interned_name) {
  static const Table table = make_table();
  const auto found = table.find(name);
  if (found == table.end()) return nullptr;
  *interned_name = found->first.c_str();
  return &found->second;
}

}  // namespace simt
