// The CUDA engine at tensor level: device, stream, workspace. In a build without CUDA kernels it only says
// so.
#pragma once

#include <c10/core/Device.h>

#include "args.h"
#include "plan.h"

namespace bnext {

void require_cuda_engine(c10::Device device);

void run_cuda(const ForwardArgs& args, Pass pass, c10::Device device);
void run_cuda(const BackwardArgs& args, Pass pass, c10::Device device);

}  // namespace bnext
