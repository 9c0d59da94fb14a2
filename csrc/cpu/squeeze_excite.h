// The host side of the passes that squeeze_excite.cpp is made of; each is an operator of its own as well.
#pragma once
#include <optional>
#include <vector>

#include "plane_affine.h"
#include "planes.h"

namespace nvae {

// plane_affine in parts. The coefficients of a sample are read when it is computed.
class PlaneAffine {
 public:
  PlaneAffine(const Tensor& x, const Tensor& a, const std::optional<Tensor>& y,
              const std::optional<Tensor>& b, const std::optional<Tensor>& c);
  void run(int64_t begin, int64_t end) const {  // samples
    for_samples(walk_, begin, end, [this](int64_t first, int64_t last) { run_tasks(first, last); });
  }
  void run_tasks(int64_t begin, int64_t end) const;
  const Tensor& out() const { return keep_alive_.back(); }

 private:
  PlaneAffineArgs args_;
  MapShape walk_;
  std::vector<Tensor> keep_alive_;  // the result last
};

// plane_dots in parts.
class PlaneDots {
 public:
  PlaneDots(const Tensor& x, const Tensor& y, const std::optional<Tensor>& pivot);
  void run(int64_t begin, int64_t end) const {  // samples
    for_samples(args_, begin, end, [this](int64_t first, int64_t last) { run_tasks(first, last); });
  }
  void run_tasks(int64_t begin, int64_t end) const;
  // Once per sample: the sums of those that have run.
  void write_sums(int64_t begin, int64_t end, const Tensor& sum_x, const Tensor& sum_xy);
  bool mixed() const { return args_.mixed; }
  const MapShape& shape() const { return args_; }

 private:
  PlaneDotsArgs args_;
  std::optional<Coefficients> pivots_;
  std::optional<Partials> partial_;
  std::vector<Tensor> keep_alive_;
};

// The weights (units, C) and (C, units) of the two layers as doubles (units, C), the second transposed: inner loops
// are over channels.
struct GateWeights {
  std::vector<double> reduce, expand;
  template <class S>
  GateWeights(const S* w1, const S* w2, int64_t units, int64_t channels)
      : reduce(w1, w1 + units * channels), expand(reduce.size()) {
    from_transposed(w2, units, channels, expand.data());
  }
  // to (rows, columns) = from (columns, rows), transposed.
  template <class S, class D>
  static void from_transposed(const S* from, int64_t rows, int64_t columns, D* to) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) to[r * columns + c] = static_cast<D>(from[c * rows + r]);
  }
};

}  // namespace nvae
