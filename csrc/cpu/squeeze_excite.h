// The host side of the passes that squeeze_excite.cpp is made of; each is an operator of its own as well.
#pragma once
#include <optional>
#include <tuple>

#include "packed.h"

namespace nvae {

std::tuple<Tensor, Tensor> channel_statistics(const Tensor& x, bool per_sample);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_coefficients(
    const Tensor& mean, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
    const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, double residual_scale);
Tensor plane_affine(const Tensor& x, const Tensor& a, const std::optional<Tensor>& y,
                    const std::optional<Tensor>& b, const std::optional<Tensor>& c);

}  // namespace nvae
