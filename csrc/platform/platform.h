// Everything kernels may use of the machine. The only folder with inline PTX and with #if on the compiler.
//
// A kernel is written once:
//
//     struct Storage { float sum[32]; };
//     KDA_GLOBAL void __launch_bounds__(128) my_kernel(MyParams const p) {
//       KDA_DYNAMIC_SHARED(Storage, storage);
//       storage->sum[...] = ...;
//       sync_block();
//     }
//     launch(my_kernel, dim3(blocks), dim3(128), sizeof(Storage), stream, params);
//
// nvcc compiles it for the GPU. g++ with KDA_EMULATE compiles the same source for the CPU: every primitive here has a
// host twin beside its PTX, and the twins meet in csrc/emulator.
#pragma once
#include "platform/macros.h"
#include "platform/math.h"
#include "platform/types.h"
#if defined(KDA_DEVICE_CODE)
#include "platform/barriers.h"
#include "platform/bulk_copy.h"
#include "platform/flags.h"
#include "platform/mbarrier.h"
#include "platform/memory.h"
#include "platform/mma.h"
#include "platform/warp.h"
#include "platform/wgmma.h"
#endif
