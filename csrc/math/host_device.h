// The one macro that lets the maths compile for the host, for the device and under the emulator.
#pragma once

#ifdef __CUDACC__
#define ADASPLASH2_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ADASPLASH2_HOST_DEVICE inline
#endif
