// The host side of affine_activation, which batch_norm_swish and elu share.
#pragma once
#include <utility>
#include <vector>

#include "affine_activation.h"
#include "planes.h"

namespace nvae {

using Name = std::optional<Text>;

// Arguments of every kernel that describe the map x.
AffineActivationArgs describe(const char* op, const Tensor& x, const Name& activation,
                              std::vector<Tensor>& keep_alive);
void set_grad(const char* op, AffineActivationArgs& a, const Tensor& grad, const Tensor& x,
              std::vector<Tensor>& keep_alive);
void run_forward(const AffineActivationArgs& a);
void run_gradient(const AffineActivationArgs& a);
// The sums of g and of g (x - pivot), (C).
std::pair<std::vector<double>, std::vector<double>> run_sums(AffineActivationArgs& a);
Tensor vector_of(const Tensor& like, Dtype dtype, const std::vector<double>& values);

}  // namespace nvae
