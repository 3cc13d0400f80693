// The passes of the one instance, each defined by a translation unit of its own; ONE_INSTANCE_HEAD_DIM is its head dim.
#pragma once

#include "cuda/passes.h"

namespace adasplash2::cuda::one_instance {

void scan(const Forward& call, const ForwardWorkspace& workspace);
void output(const Forward& call, const ForwardWorkspace& workspace);
void delta(const Backward& call, const BackwardWorkspace& workspace);
void grad_query(const Backward& call, const BackwardWorkspace& workspace);
void grad_key_value(const Backward& call, const BackwardWorkspace& workspace);
void grad_alpha(const Backward& call, const BackwardWorkspace& workspace);
void grad_mask(const Backward& call, const BackwardWorkspace& workspace);

}  // namespace adasplash2::cuda::one_instance
