// entmax of a tensor: quick to build beside the attention kernels.
#include "cuda/any_arch/entmax.cu"
#include "entmax_api.h"
