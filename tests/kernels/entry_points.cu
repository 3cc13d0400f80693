// The entry points; the kernels are compiled beside them.
#include "api.h"
#include "entmax_api.h"
#include "work_order_api.h"
