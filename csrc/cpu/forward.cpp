// Training and inference forward: which tiles and folds, and the memory between them.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>

#include "cpu/launch.h"
#include "cpu/schedule.h"

namespace bnext::cpu {
namespace {

struct ForwardWork {
  Operands operands;
  TileFunction reduce = nullptr;
  TileFunction map = nullptr;
  std::unique_ptr<double[]> center;
  std::unique_ptr<std::byte[]> coefficients;  // [coefficient][channel]
  ForwardFold vectors;
  Folds folds;

  ForwardWork(const ForwardArgs& args, double factor, const Plan& plan)
      : center(args.batch_statistics ? new double[args.extent.channels] : nullptr),
        coefficients(new std::byte[3 * args.extent.channels * opmath_bytes(args.dtype)]),
        vectors{args, factor, center.get(), coefficients.get()},
        folds(instruction_set().folds(args.dtype)) {
    operands.x = args.x;
    operands.residual = args.residual;
    operands.out = args.y;
    operands.mask = args.mask;
    operands.streaming_stores = args.y != nullptr && can_stream(plan, args.y);
    operands.fetches = plan.beyond_cache;
    operands.fetches_first = plan.fetches_first;
    operands.activation = args.activation;
    operands.center = center.get();
    for (int k = 0; k < 3; ++k)
      operands.coefficients[k] = coefficients.get() + k * args.extent.channels * opmath_bytes(args.dtype);
    const auto find = instruction_set().find;
    if (args.batch_statistics) reduce = find({Phase::moments, args.dtype, plan.geometry.traversal});
    if (args.y == nullptr) return;
    map = find({.phase = Phase::normalize,
                .dtype = args.dtype,
                .traversal = plan.geometry.traversal,
                .activation = class_of(args.activation),
                .beside = args.residual != nullptr ? Beside::residual
                          : args.mask != nullptr   ? Beside::mask
                                                   : Beside::nothing});
  }

  void prepare(int64_t begin, int64_t end) const { folds.find_centers(vectors, begin, end); }
  bool recenter(int64_t begin, int64_t end, const Sums* sums) const {
    return folds.move_centers(vectors, begin, end, sums);
  }
  void fold(int64_t begin, int64_t end, const Sums* sums) const { folds.forward(vectors, begin, end, sums); }
};

// What tiles do not write as whole words.
void clear_mask(const ForwardArgs& args, const Geometry& geometry) {
  const int64_t run = geometry.traversal == Traversal::planes ? geometry.extent.inner : geometry.row_length();
  const int64_t whole = run % kMaskWord == 0 ? args.extent.numel() / kMaskWord * (kMaskWord / 8) : 0;
  std::memset(static_cast<char*>(args.mask) + whole, 0, mask_bytes(args.extent.numel()) - whole);
}

}  // namespace

void forward(const ForwardArgs& args, const Plan& plan) {
  int64_t* const counter = args.num_batches_tracked;
  const int64_t count = counter != nullptr ? *counter + 1 : 0;
  double factor = args.momentum;
  if (args.cumulative) factor = counter != nullptr ? 1.0 / static_cast<double>(count) : 0.0;
  if (args.extent.numel() == 0) {
    std::fill(args.mean, args.mean + args.extent.channels, 0.0);
    std::fill(args.invstd, args.invstd + args.extent.channels, 0.0);
    if (args.var != nullptr) std::fill(args.var, args.var + args.extent.channels, 0.0);
  } else {
    if (args.mask != nullptr) clear_mask(args, plan.geometry);
    ForwardWork work(args, factor, plan);
    run(plan, work);
  }
  if (counter != nullptr) *counter = count;  // at last: there may have been no memory for the work
}

}  // namespace bnext::cpu
