// The same as one_instance_sm90.cu at head dim 128, where other things stay in shared memory.
#define ONE_INSTANCE_HEAD_DIM 128
#include "one_instance_sm90.cu"
