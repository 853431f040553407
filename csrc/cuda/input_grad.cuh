// Backward on a GPU as a reducer and a map, which every engine of kernels takes: grad_sums, input_grad, and
// their folds.
#pragma once

#include "cuda/gradient.cuh"
#include "cuda/map.cuh"
#include "cuda/reduce.cuh"

namespace bnext::cuda {

struct BackwardParams {
  BackwardArgs args;
  Reduction reduction;
  Mapping mapping;
  Sums* totals;  // [channel], from the reduce to the map; null where both are one kernel
  Reuse output_reuse;
};

// With fixed statistics dx needs no sums: the reduce writes it, or without a reduce the map. Kernels that
// find dz are large and spend their time on that: of them there is one for either, which asks as it runs.
enum class Statistics : uint8_t { batch, fixed, either };

template <Slope kSlope>
constexpr Statistics kBatch = is_found(kSlope) ? Statistics::either : Statistics::batch;
template <Slope kSlope>
constexpr Statistics kFixed = is_found(kSlope) ? Statistics::either : Statistics::fixed;

// What both kernels read and write. dresidual belongs to an activation's input.
template <class T, Slope kSlope, Statistics kStatistics>
struct BackwardTensors {
  using Storage = T;
  using Math = opmath_t<T>;
  static constexpr bool kFound = is_found(kSlope), kReadsMask = kSlope == Slope::mask || kSlope == Slope::any;
  static constexpr int kTensorsOut = kSlope == Slope::one ? 1 : 2;

  const BackwardParams& p;

  BNEXT_DEVICE bool fixed() const {
    return kStatistics == Statistics::either ? !p.args.batch_statistics : kStatistics == Statistics::fixed;
  }
  BNEXT_DEVICE Input<T> input(int i) const {
    const void* const data = i == 0 ? p.args.dy : i == 1 ? p.args.x : p.args.residual;
    return {static_cast<const T*>(data), p.args.extent.numel()};
  }
  BNEXT_DEVICE Output<T> output(int i) const {
    void* const data = i == 0 ? p.args.dx : p.args.dresidual;
    return {static_cast<T*>(data), p.args.extent.numel(), p.output_reuse};
  }
  BNEXT_DEVICE const void* mask() const { return p.args.mask; }
  BNEXT_DEVICE bool has_mask() const { return kSlope != Slope::any || p.args.mask != nullptr; }
  BNEXT_DEVICE Gradient<T, kSlope> gradient() const { return {p.args}; }
};

template <class T, Slope kSlope, Statistics kStatistics>
struct GradSumsReducer : BackwardTensors<T, kSlope, kStatistics> {
  using Tensors = BackwardTensors<T, kSlope, kStatistics>;
  using Math = opmath_t<T>;
  using Center = GradientTerms<Math>;
  using Tensors::fixed, Tensors::gradient, Tensors::kFound, Tensors::p;
  static constexpr bool kMayWrite = kStatistics != Statistics::batch, kAroundFirst = false;
  static constexpr int kInputs = kFound ? 3 : 2, kSureInputs = 2;
  static constexpr int kOutputs = kMayWrite ? Tensors::kTensorsOut : 0, kSureOutputs = 0;
  static constexpr int kVectors = !kFound ? 4 : sizeof(T) == 8 ? 1 : 2;
  // The same wherever dz comes from: behind a relu the same bits as of a dy that is zero where it is.
  static constexpr int kColumnBatch = sizeof(T) == 8 ? 1 : 4, kKeptVectors = 2;
  static constexpr int kRowVectors = kVectors > kColumnBatch ? kVectors : kColumnBatch;
  static constexpr Reuse kReuse = kStatistics == Statistics::fixed ? Reuse::no : Reuse::yes;

  BNEXT_DEVICE Output<T> output(int i) const {
    Output<T> out = Tensors::output(i);
    if (!fixed()) out.data = nullptr;
    return out;
  }
  BNEXT_DEVICE int phase() const {
    return kMayWrite && writes(*this, 0) ? phase_of(output(0).data) : phase_of(this->input(0).data);
  }

  BNEXT_DEVICE Center center(int64_t c) const {
    Center center{};
    center.center = static_cast<Math>(standing(p.args, c, 0).mean);
    if constexpr (kFound) gradient().input_terms(c, center);
    if constexpr (kMayWrite) center.dx_scale = gradient().coefficients(c, {}).scale;
    return center;
  }

  struct Centers {
    Center values[kLanes<T>];

    BNEXT_DEVICE void set(int lane, const Center& center) { values[lane] = center; }
    BNEXT_DEVICE const Center& at(int lane) const { return values[lane]; }
  };

  template <int kCount>
  BNEXT_DEVICE void add(Sums& sums, Elements<GradSumsReducer, kCount>& elements, const Center& center) const {
    gradient().find(elements, [&](int) { return center; });
    Math(&dz)[kCount] = elements.values[0];
    Math(&x)[kCount] = elements.values[1];
    Math d[kCount];
    BNEXT_UNROLL
    for (int k = 0; k < kCount; ++k) {
      // The z of zeros may have an infinite slope.
      if constexpr (kFound) dz[k] = elements.there[k] ? dz[k] : Math{};
      d[k] = x[k] - center.center;
    }
    sums += {double{sum_of<kCount>(dz)}, double{sum_of_products<kCount>(dz, d)}};
    if constexpr (kMayWrite) {
      BNEXT_UNROLL
      for (int k = 0; k < kCount; ++k) {
        x[k] = dz[k];
        dz[k] = fixed_input_grad(dz[k], center.dx_scale);
      }
    }
  }

  BNEXT_DEVICE void fetch_for_fold(int64_t) const {}  // center() reads the same

  BNEXT_DEVICE void fold(int64_t c, const Center&, const Sums& sums) const {
    const BackwardArgs& a = p.args;
    const ParameterGrads grads = gradient().grads(c, sums);
    if (a.dweight != nullptr) store(static_cast<Math*>(a.dweight) + c, static_cast<Math>(grads.dweight));
    if (a.dbias != nullptr) store(static_cast<Math*>(a.dbias) + c, static_cast<Math>(grads.dbias));
    if (p.totals != nullptr) p.totals[c] = sums;
  }
};

// Coefficients: scale; center; where dz is found, scale and offset of the activation's input; slope and
// offset. Fixed statistics have no slope and no offset, and read x only to find dz.
template <class T, Slope kSlope, Statistics kStatistics>
struct InputGradMap : BackwardTensors<T, kSlope, kStatistics> {
  using Tensors = BackwardTensors<T, kSlope, kStatistics>;
  using Math = opmath_t<T>;
  using Tensors::fixed, Tensors::gradient, Tensors::kFound, Tensors::p;
  static constexpr bool kMaySlope = kStatistics != Statistics::fixed, kReadsX = kFound || kMaySlope;
  static constexpr int kRest = kFound ? 4 : 2, kCoefficients = kMaySlope ? kRest + 2 : 1;
  static constexpr int kInputs = kFound ? 3 : kReadsX ? 2 : 1;
  static constexpr int kSureInputs = kReadsX && kSlope != Slope::any ? 2 : 1;
  static constexpr int kOutputs = Tensors::kTensorsOut, kSureOutputs = 1;
  static constexpr bool kWritesMask = false;

  BNEXT_DEVICE Input<T> input(int i) const {
    Input<T> in = Tensors::input(i);
    if constexpr (kSlope == Slope::any) {
      if (i == 1 && fixed() && this->has_mask()) in.data = nullptr;
    }
    return in;
  }

  BNEXT_DEVICE void coefficients(int64_t c, bool, Math (&values)[kCoefficients]) const {
    coefficients(c, fixed() ? Sums{} : p.totals[c], values);
  }

  // Of the reducer's sums.
  BNEXT_DEVICE void coefficients(int64_t c, const GradientTerms<Math>&, const Sums& sums,
                                 Math (&values)[kCoefficients]) const {
    coefficients(c, sums, values);
  }

  BNEXT_DEVICE void coefficients(int64_t c, const Sums& sums, Math (&values)[kCoefficients]) const {
    const auto found = gradient().coefficients(c, sums);
    values[0] = found.scale;
    if constexpr (kReadsX) values[1] = found.center;
    if constexpr (kFound) {
      GradientTerms<Math> terms;
      gradient().input_terms(c, terms);
      values[2] = terms.z_scale;
      values[3] = terms.z_offset;
    }
    if constexpr (kMaySlope) {
      values[kRest] = found.slope;
      values[kRest + 1] = found.offset;
    }
  }

  template <int kCount, class Coefficient>
  BNEXT_DEVICE uint32_t values(Elements<InputGradMap, kCount>& elements, Coefficient c,
                               Math (&out)[kOutputs][kCount]) const {
    gradient().find(elements, [&](int l) -> GradientTerms<Math> { return {c(1, l), c(2, l), c(3, l), 0}; });
    const auto& values = elements.values;
    BNEXT_UNROLL
    for (int l = 0; l < kCount; ++l) {
      const Math dz = values[0][l];
      out[0][l] = fixed_input_grad(dz, c(0, l));
      if constexpr (kMaySlope) {
        const Math dx = input_grad<Math>(dz, values[1][l], c(0, l), c(1, l), c(kRest, l), c(kRest + 1, l));
        out[0][l] = fixed() ? out[0][l] : dx;
      }
      if constexpr (kOutputs == 2) out[1][l] = dz;
    }
    return 0;
  }
};

}  // namespace bnext::cuda
