// Second and higher orders: rare, so clarity before speed.
#include "double_backward.h"

#include <ATen/ATen.h>

namespace bnext {
namespace {

// Shapes (C,) for broadcasting against x.
at::Tensor along_channels(const at::Tensor& v, const at::Tensor& x) {
  std::vector<c10::SymInt> sizes(x.dim(), 1);
  sizes[1] = x.sym_size(1);
  return v.reshape_symint(sizes);
}

}  // namespace

// Let P(v) = v - m(v) - xhat * m(v * xhat), m the mean over a channel, r = invstd; P is the projection behind
// dx = w r P(dy), self-adjoint, and r P(v) is the pull-back of v through xhat. For the cotangents gx, gw, gb
// of dx, dweight, dbias:
//   to dy:  w r P(gx) + gw xhat + gb
//   to w:   sum(gx * r P(dy))
//   to x:   -w r^2 (xhat m(gx * P(dy)) + m(dy xhat) P(gx) + m(gx xhat) P(dy)) + gw r P(dy)
// With fixed statistics P is the identity and r a constant: the first factor of the last line vanishes.
std::tuple<at::Tensor, at::Tensor, at::Tensor> double_backward(const std::array<at::Tensor, 3>& cotangents,
                                                               const at::Tensor& given_dy,
                                                               const at::Tensor& given_x,
                                                               const at::Tensor& weight,
                                                               const at::Tensor& stats, bool training) {
  const auto math = given_x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor dy = given_dy.to(math), x = given_x.to(math);
  const at::Tensor w = weight.defined() ? along_channels(weight.to(math), x) : at::ones({1}, x.options());
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != 1) dims.push_back(d);
  }
  auto m = [&](const at::Tensor& v) { return v.mean(dims, /*keepdim=*/true); };

  // Differentiable in x, so that derivatives of any order are right: the saved invstd is 1/sqrt(var + eps) at
  // a constant eps, which var and invstd together determine.
  const at::Tensor saved_mean = along_channels(stats.select(0, 0), x);
  const at::Tensor saved_invstd = along_channels(stats.select(0, 1), x);
  at::Tensor mean = saved_mean.to(math), r = saved_invstd.to(math);
  at::Tensor centered = (x - mean);
  if (training) {
    const at::Tensor shift = m(centered);  // zero in value: carries the derivative of the mean
    centered = centered - shift;
    const at::Tensor var = m(centered * centered);
    const at::Tensor eps = (saved_invstd.pow(-2) - var.detach().to(at::kDouble)).to(math);
    r = (var + eps).rsqrt();
  }
  const at::Tensor xhat = centered * r;
  auto project = [&](const at::Tensor& v) { return training ? v - m(v) - xhat * m(v * xhat) : v; };

  const at::Tensor zero = at::zeros({1}, x.options());
  auto present = [](const at::Tensor& v) { return v.defined() && v.sym_numel() != 0; };
  const auto& [to_dx, to_dweight, to_dbias] = cotangents;
  const at::Tensor gx = present(to_dx) ? to_dx.to(math) : at::zeros_like(x);
  const at::Tensor gw = present(to_dweight) ? along_channels(to_dweight.to(math), x) : zero;
  const at::Tensor gb = present(to_dbias) ? along_channels(to_dbias.to(math), x) : zero;

  const at::Tensor projected_dy = project(dy);
  const at::Tensor to_dy = (w * r * project(gx) + gw * xhat + gb).to(given_dy.scalar_type());
  at::Tensor to_x = gw * r * projected_dy;
  if (training) {
    to_x =
        to_x -
        w * r * r * (xhat * m(gx * projected_dy) + m(dy * xhat) * project(gx) + m(gx * xhat) * projected_dy);
  }
  at::Tensor to_weight;
  if (weight.defined()) {
    to_weight = (gx * r * projected_dy).sum(dims).to(weight.scalar_type()).view_as(weight);
  }
  return {to_dy, to_x.to(given_x.scalar_type()), to_weight};
}

}  // namespace bnext
