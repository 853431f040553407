// The folds of a backward pass: what is known before the sums, and the parameters' gradients and what the map
// applies after them.
//
// Included once per instruction set, after channels.h. A is the arithmetic type. What the loops write is
// local or aliases nothing, so that they become vectors.

// What does not need sums: centers of the output; scale of dz; scale and offset of the activation's input, as
// the forward pass had them.
template <class A>
void prepare_backward(const BackwardFold& fold, int64_t begin, int64_t end) {
  const BackwardArgs& args = fold.args;
  const int64_t channels = args.extent.channels;
  for_each_fold(begin, end, [&](int64_t c, int64_t n) {
    if (fold.center != nullptr) read_channels(args.bias, c, n, 0, fold.center + c);
    if (fold.coefficients == nullptr) return;
    double weight[kFoldChannels], bias[kFoldChannels];
    read_channels(args.weight, c, n, 1, weight);
    A* __restrict const scale_out = static_cast<A*>(fold.coefficients) + c;
    for (int64_t k = 0; k < n; ++k) scale_out[k] = static_cast<A>(weight[k] * args.invstd[c + k]);
    if (!fold.from_input) return;
    read_channels(args.bias, c, n, 0, bias);
    A* __restrict const z_scale_out = scale_out + 2 * channels;
    A* __restrict const z_offset_out = scale_out + 3 * channels;
    for (int64_t k = 0; k < n; ++k) {
      const auto z = normalize_coefficients<A>(args.mean[c + k], args.invstd[c + k], weight[k], bias[k]);
      z_scale_out[k] = z.scale;
      z_offset_out[k] = z.offset;
    }
  });
}

// n channels from c on, at most kFoldChannels.
template <class A>
void fold_grad_sums(const BackwardFold& fold, int64_t c, int64_t n, const Sums* sums) {
  const BackwardArgs& args = fold.args;
  const double inverse_count = 1 / static_cast<double>(args.extent.count());
  double weight[kFoldChannels], mean[kFoldChannels], invstd[kFoldChannels];
  read_channels(args.weight, c, n, 1, weight);
  const bool from_output = fold.center != nullptr;  // z stands for x
  for (int64_t k = 0; k < n; ++k) mean[k] = from_output ? fold.center[c + k] : args.mean[c + k];
  for (int64_t k = 0; k < n; ++k) invstd[k] = from_output ? 1 / weight[k] : args.invstd[c + k];
  // The reducers subtracted the mean as their arithmetic can hold it.
  const auto held = [](double value) { return static_cast<double>(static_cast<A>(value)); };
  const auto grads_of = [&](int64_t k) {
    return parameter_grads(sums[k], mean[k], held(mean[k]), invstd[k]);
  };
  if (A* __restrict const dweight = static_cast<A*>(args.dweight)) {
    for (int64_t k = 0; k < n; ++k) dweight[c + k] = static_cast<A>(grads_of(k).dweight);
  }
  if (A* __restrict const dbias = static_cast<A*>(args.dbias)) {
    for (int64_t k = 0; k < n; ++k) dbias[c + k] = static_cast<A>(grads_of(k).dbias);
  }
  if (args.sums_out != nullptr) {
    for (int64_t k = 0; k < n; ++k) args.sums_out[c + k] = sums[k];
  }
  if (!args.batch_statistics || args.dx == nullptr) return;  // with fixed ones dx needs no sums
  const int64_t channels = args.extent.channels, rest = fold.from_input ? 4 : 2;
  A* __restrict const scale_out = static_cast<A*>(fold.coefficients) + c;
  A* __restrict const center_out = scale_out + channels;
  A* __restrict const slope_out = scale_out + rest * channels;
  A* __restrict const offset_out = scale_out + (rest + 1) * channels;
  for (int64_t k = 0; k < n; ++k) {
    const auto found = input_grad_coefficients<A>(sums[k], mean[k], held(mean[k]), invstd[k],
                                                  weight[k] * args.invstd[c + k], inverse_count);
    scale_out[k] = found.scale;
    center_out[k] = found.center;
    slope_out[k] = found.slope;
    offset_out[k] = found.offset;
  }
}

template <class A>
void fold_backward(const BackwardFold& fold, int64_t begin, int64_t end, const Sums* sums) {
  if (sums == nullptr) return prepare_backward<A>(fold, begin, end);
  for_each_fold(begin, end, [&](int64_t c, int64_t n) { fold_grad_sums<A>(fold, c, n, sums + (c - begin)); });
}
