// The smallest pieces of work, tiles and folds over channels, and the tables of functions that do them: one
// set of tables per instruction set, all compiled from tiles.inc. Nothing here knows threads, schedules or
// tensors.
#pragma once

#include <cstdint>

#include "args.h"
#include "dispatch.h"
#include "formulas.h"
#include "plan.h"

namespace bnext::cpu {

// Channels [channel_begin, channel_end), positions [begin, end) of them. ahead: elements on to what the
// thread reduces after this tile, for maps to fetch meanwhile; 0 where nothing follows.
struct Tile {
  int64_t channel_begin = 0, channel_end = 0;
  int64_t begin = 0, end = 0;
  int64_t ahead = 0;

  constexpr int64_t channels() const { return channel_end - channel_begin; }
};

constexpr int kMaxCoefficients = 6;

// Bits of a mask that a tile writes at once.
constexpr int64_t kMaskWord = 16;

struct Operands {
  const void* x = nullptr;
  const void* dy = nullptr;
  const void* residual = nullptr;
  const void* mask_read = nullptr;
  void* out = nullptr;  // of normalize it may be x
  void* mask = nullptr;
  void* dresidual = nullptr;
  bool from_output = false;  // x is the output
  bool streaming_stores = false;
  bool dresidual_first = false;    // is written where sums are taken, not with dx
  bool fetches = false;            // ahead of what is read; where it is in cache, that costs up to a quarter
  bool fetches_first = false;      // reducers into the L1 cache
  const double* center = nullptr;  // per channel: what reducers subtract from x
  // Per channel, in opmath: what maps apply, in the order of formulas.h; for backward see InputGradMap.
  const void* coefficients[kMaxCoefficients] = {};
  ActivationSpec activation;
};

// Reducers add to sums[channel - channel_begin]; maps write operands.out and ignore sums. scratch: see
// scratch_bytes.
using TileFunction = void (*)(const Operands&, const Geometry&, const Tile&, void* scratch, Sums* sums);

// With fixed statistics dx comes with the sums, or, where neither they nor x are wanted, from dy and perhaps
// a mask alone.
enum class Phase : uint8_t { moments, normalize, grad_sums, input_grad, grad_sums_and_input_grad, scale };

// Activations as forward tiles know them: relu is compiled into the loops, the others are called.
enum class ActivationClass : uint8_t { none, relu, called };

// What normalize does besides: nothing; write a mask; add a residual, and write a mask if there is one.
enum class Beside : uint8_t { nothing, mask, residual };

// Where dz comes from: dy alone; z of relu; the mask of what blocks all; anything, by tests and calls.
enum class SlopeClass : uint8_t { none, relu, mask, called };

struct Kernel {
  Phase phase;
  Dtype dtype;
  Traversal traversal;
  ActivationClass activation = ActivationClass::none;  // of normalize
  Beside beside = Beside::nothing;                     // of normalize; those that call do not ask
  SlopeClass slope = SlopeClass::none;                 // of backward
};

// What a fold has besides the call itself. coefficients: [coefficient][channel] in opmath, as in Operands.
struct ForwardFold {
  const ForwardArgs& args;
  double factor;   // weight of the batch in the running statistics
  double* center;  // per channel
  void* coefficients;
};

struct BackwardFold {
  const BackwardArgs& args;
  double* center;      // per channel, where the output stands for x; else null
  void* coefficients;  // null: none are wanted
  bool from_input;     // scale and offset of the activation's input among them
};

// For channels [begin, end); sums[0] is that of begin, null where nothing was summed.
struct Folds {
  void (*find_centers)(const ForwardFold&, int64_t begin, int64_t end);
  bool (*move_centers)(const ForwardFold&, int64_t begin, int64_t end, const Sums* sums);
  void (*forward)(const ForwardFold&, int64_t begin, int64_t end, const Sums* sums);
  void (*prepare_backward)(const BackwardFold&, int64_t begin, int64_t end);
  void (*backward)(const BackwardFold&, int64_t begin, int64_t end, const Sums* sums);
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  TileFunction (*find)(const Kernel&);
  Folds (*folds)(Dtype);
};

// Compiled instruction sets, best first; the last one runs everywhere.
extern const InstructionSet kInstructionSets[];
extern const int kInstructionSetCount;

inline ActivationClass class_of(const ActivationSpec& activation) {
  return !activation                           ? ActivationClass::none
         : activation.kind == Activation::relu ? ActivationClass::relu
                                               : ActivationClass::called;
}

inline SlopeClass slope_of(const BackwardArgs& args) {
  if (!args.activation) return SlopeClass::none;
  const Activation kind = args.activation.kind;
  if (args.mask != nullptr) return kind == Activation::leaky_relu ? SlopeClass::called : SlopeClass::mask;
  const bool from_input = args.residual == nullptr && !args.from_output;
  return from_input && kind == Activation::relu ? SlopeClass::relu : SlopeClass::called;
}

// The best one this machine supports.
const InstructionSet& instruction_set();

// Bytes of 64-byte aligned scratch that a reducer or a map of a tile needs.
inline int64_t scratch_bytes(const Geometry& geometry, const Tile& tile, bool reduces) {
  if (geometry.traversal == Traversal::planes)
    return reduces ? tile.channels() * 2 * 16 * 8 : 0;  // two double sums per lane
  const int64_t columns = geometry.fold > 1 ? geometry.row_length() : tile.channels() * geometry.extent.inner;
  return (columns + 16) * kMaxCoefficients * 8;  // as many doubles per column as a map has coefficients
}

}  // namespace bnext::cpu
