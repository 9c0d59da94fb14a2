// nvae_fast::spectral_lengths and spectral_gradients on the CPU; the arithmetic is in spectral_norm.vec.cpp.
#include "spectral_norm.h"

#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "../checks.h"

namespace nvae {

using Tensors = std::vector<Tensor>;

static Tensor fresh_like(const Tensor& t) {
  const auto sizes = t.sizes();
  return torch::stable::empty(sizes, t.scalar_type(), std::nullopt, t.device());
}

// Columns of a (C_out, C_in, K, K) weight in memory: as in the logical matrix, or with the channels
// innermost.
static bool has_inner_channels(const Tensor& w) {
  return w.dim() == 4 && w.size(2) * w.size(3) > 1 && w.size(1) > 1 && w.stride(1) == 1 &&
         !w.is_contiguous() && w.stride(3) == w.size(1) && w.stride(2) == w.size(3) * w.size(1) &&
         (w.size(0) == 1 || w.stride(0) == w.size(1) * w.size(2) * w.size(3));
}

// Moves the entries of a vector over columns between logical order (channel, pixel) and (pixel, channel).
template <class S>
static void permute(const S* from, S* to, int64_t channels, int64_t pixels, bool to_inner) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t logical = c * pixels + p, inner = p * channels + c;
      to[to_inner ? inner : logical] = from[to_inner ? logical : inner];
    }
}

// Runs work(i) for 0 <= i < count in all threads, whoever is free next: layers differ a thousandfold in size.
template <class F>
static void for_each(int64_t count, F work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = count < 64 ? count : 64;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) work(i);
  });
}

struct Group {
  int64_t first, rows, columns;
};

static std::vector<Group> groups_of(const char* op, const Tensors& weights, const Tensors& u) {
  std::vector<Group> groups;
  int64_t first = 0;
  for (const Tensor& vectors : u) {
    STD_TORCH_CHECK(vectors.dim() == 2 && vectors.is_contiguous(), op,
                    ": u must keep_alive contiguous (n, rows) tensors");
    STD_TORCH_CHECK(first + vectors.size(0) <= static_cast<int64_t>(weights.size()), op,
                    ": expected one weight for each vector");
    const int64_t rows = vectors.size(1);
    const int64_t columns = vectors.size(0) && rows ? weights[first].numel() / rows : 0;
    groups.push_back({first, rows, columns});
    for (int64_t i = 0; i < vectors.size(0); ++i)
      STD_TORCH_CHECK(weights[first + i].numel() == rows * columns &&
                          weights[first + i].scalar_type() == vectors.scalar_type(),
                      op, ": weights of a group must have its shape and dtype");
    first += vectors.size(0);
  }
  STD_TORCH_CHECK(first == static_cast<int64_t>(weights.size()), op, ": expected one vector for each weight");
  return groups;
}

static std::tuple<Tensor, Tensors, Tensors> spectral_lengths(const Tensors& weights, const Tensors& u,
                                                             int64_t iterations, double eps) {
  const char* op = "spectral_lengths";
  STD_TORCH_CHECK(!weights.empty(), op, ": expected at least one weight");
  const ScalarType type = weights[0].scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
                  ": expected float32 or float64");
  const bool wide = type == ScalarType::Double;
  const int64_t size = wide ? 8 : 4, count = static_cast<int64_t>(weights.size());
  Tensors keep_alive, u_out, v_out;
  std::vector<double> lengths(weights.size(), 0.0);
  std::vector<SpectralLayer> layers;
  const std::vector<Group> groups = groups_of(op, weights, u);
  for (size_t g = 0; g < u.size(); ++g) {
    const int64_t n = u[g].size(0), rows = groups[g].rows, columns = groups[g].columns;
    u_out.push_back(fresh_like(u[g]));
    v_out.push_back(torch::stable::empty({n, columns}, type, std::nullopt, u[g].device()));
    char* to = static_cast<char*>(u_out.back().mutable_data_ptr());
    std::memcpy(to, u[g].const_data_ptr(), static_cast<size_t>(n * rows * size));
    char* v = static_cast<char*>(v_out.back().mutable_data_ptr());
    for (int64_t i = 0; i < n; ++i) {
      const Tensor& w = weights[groups[g].first + i];
      keep_alive.push_back(has_inner_channels(w) ? w : torch::stable::contiguous(w));
      SpectralLayer layer;
      layer.matrix = keep_alive.back().const_data_ptr();
      layer.rows = rows;
      layer.columns = columns;
      layer.wide = wide;
      layer.u = to + i * rows * size;
      layer.v = v + i * columns * size;
      layer.length = &lengths[groups[g].first + i];
      layers.push_back(layer);
    }
  }
  for_each(count, [&](int64_t i) {
    const SpectralLayer& layer = layers[i];
    NVAE_CALL(spectral_iterate, layer, iterations, eps);
    if (!has_inner_channels(keep_alive[i])) return;
    const int64_t channels = keep_alive[i].size(1), pixels = layer.columns / channels;
    const auto reorder = [&](auto* v) {
      using S = std::remove_pointer_t<decltype(v)>;
      const std::vector<S> inner(v, v + layer.columns);
      permute(inner.data(), v, channels, pixels, false);
    };
    wide ? reorder(static_cast<double*>(layer.v)) : reorder(static_cast<float*>(layer.v));
  });
  const Tensor out = torch::stable::empty({count}, type, std::nullopt, weights[0].device());
  void* to = out.mutable_data_ptr();
  for (int64_t i = 0; i < count; ++i)
    wide ? static_cast<double*>(to)[i] = lengths[i]
         : static_cast<float*>(to)[i] = static_cast<float>(lengths[i]);
  return {out, u_out, v_out};
}

static Tensors spectral_gradients(const Tensor& grad, const Tensors& weights, const Tensors& u,
                                  const Tensors& v) {
  const char* op = "spectral_gradients";
  Tensors gradients, keep_alive;
  if (weights.empty()) return gradients;
  const bool wide = weights[0].scalar_type() == ScalarType::Double;
  const int64_t size = wide ? 8 : 4;
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == weights[0].scalar_type(), op,
                  ": grad must be one number of the weights' dtype");
  const double scale = wide ? *grad.const_data_ptr<double>() : *grad.const_data_ptr<float>();
  std::vector<SpectralLayer> layers;
  std::vector<std::vector<char>> permuted;
  const std::vector<Group> groups = groups_of(op, weights, u);
  for (size_t g = 0; g < u.size(); ++g)
    for (int64_t i = 0; i < u[g].size(0); ++i) {
      const Tensor& w = weights[groups[g].first + i];
      const bool inner = has_inner_channels(w);
      gradients.push_back(
          torch::stable::empty(w.sizes(), w.scalar_type(), std::nullopt, w.device(), std::nullopt,
                               inner ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
      SpectralLayer layer;
      layer.rows = groups[g].rows;
      layer.columns = groups[g].columns;
      layer.wide = wide;
      layer.scale = scale;
      layer.u = const_cast<char*>(static_cast<const char*>(u[g].const_data_ptr())) + i * layer.rows * size;
      layer.v = const_cast<char*>(static_cast<const char*>(v[g].const_data_ptr())) + i * layer.columns * size;
      layer.gradient = gradients.back().mutable_data_ptr();
      if (inner) {
        permuted.emplace_back(static_cast<size_t>(layer.columns * size));
        const int64_t channels = w.size(1), pixels = layer.columns / channels;
        if (wide)
          permute(static_cast<const double*>(layer.v), reinterpret_cast<double*>(permuted.back().data()),
                  channels, pixels, true);
        else
          permute(static_cast<const float*>(layer.v), reinterpret_cast<float*>(permuted.back().data()),
                  channels, pixels, true);
        layer.v = permuted.back().data();
      }
      layers.push_back(layer);
    }
  for_each(static_cast<int64_t>(layers.size()),
           [&](int64_t i) { NVAE_CALL(spectral_outer, layers[i], 0, layers[i].rows); });
  return gradients;
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  m.impl("spectral_lengths", TORCH_BOX(&nvae::spectral_lengths));
  m.impl("spectral_gradients", TORCH_BOX(&nvae::spectral_gradients));
}
