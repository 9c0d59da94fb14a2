// nvae_fast::spectral_lengths and spectral_gradients on the CPU; the arithmetic is in spectral_norm.vec.cpp.
#include "spectral_norm.h"

#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "../memory.h"

namespace nvae {

using Tensors = std::vector<Tensor>;

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

// Runs work(i) for 0 <= i < count in all threads; a thread takes the next i when it is done with one, because
// layers differ a thousandfold in size.
template <class F>
static void for_each(int64_t count, F work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = count < 64 ? count : 64;
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) work(i);
  });
}

struct Group {
  int64_t first, rows, columns;
};

// Vectors (n, length) of group g.
static void check_vectors(const char* op, const char* name, size_t g, const Tensor& t, ScalarType type) {
  NVAE_CHECK(t.dim() == 2 && t.is_contiguous() && t.scalar_type() == type, op, ": ", name, "[", g,
             "] must be contiguous, of two dimensions and ", torch::headeronly::toString(type),
             " like the weights, got ", torch::headeronly::toString(t.scalar_type()), " of shape ",
             shape_text(t));
}

static std::vector<Group> groups_of(const char* op, const Tensors& weights, const Tensors& u) {
  std::vector<Group> groups;
  int64_t first = 0;
  const ScalarType type = weights[0].scalar_type();
  NVAE_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
             ": weights must be float32 or float64, got ", torch::headeronly::toString(type));
  for (const Tensor& vectors : u) {
    check_vectors(op, "u", groups.size(), vectors, type);
    const int64_t n = vectors.size(0), rows = vectors.size(1), count = static_cast<int64_t>(weights.size());
    NVAE_CHECK(n <= count - first, op, ": u must have one vector for each of ", count, " weights, got more");
    const int64_t columns = n && rows ? weights[first].numel() / rows : 0;
    groups.push_back({first, rows, columns});
    for (; n > 0 && first < groups.back().first + n; ++first) {
      const Tensor& w = weights[first];
      NVAE_CHECK(w.dim() > 0 && w.size(0) == rows && w.numel() == rows * columns && w.scalar_type() == type,
                 op, ": weights[", first, "] must be ", torch::headeronly::toString(type), " with ", rows,
                 " rows and ", columns, " columns, as its group is, got ",
                 torch::headeronly::toString(w.scalar_type()), " of shape ", shape_text(w));
    }
  }
  NVAE_CHECK(first == static_cast<int64_t>(weights.size()), op, ": u must have one vector for each of ",
             weights.size(), " weights, got ", first);
  return groups;
}

static std::tuple<Tensor, Tensors, Tensors> spectral_lengths(const Tensors& weights, const Tensors& u,
                                                             int64_t iterations, double eps) {
  const char* op = "spectral_lengths";
  NVAE_CHECK(!weights.empty(), op, ": expected at least one weight");
  NVAE_CHECK(iterations > 0, op, ": iterations must be > 0, got ", iterations);
  const std::vector<Group> groups = groups_of(op, weights, u);
  const ScalarType type = weights[0].scalar_type();
  const bool is_double = type == ScalarType::Double;
  const int64_t size = is_double ? 8 : 4, count = static_cast<int64_t>(weights.size());
  Tensors keep_alive, u_out, v_out;
  std::vector<double> lengths(weights.size(), 0.0);
  std::vector<SpectralLayer> layers;
  for (size_t g = 0; g < u.size(); ++g) {
    const int64_t n = u[g].size(0), rows = groups[g].rows, columns = groups[g].columns;
    u_out.push_back(allocate(u[g].sizes(), type, u[g]));
    v_out.push_back(allocate({n, columns}, type, u[g]));
    char* to = static_cast<char*>(u_out.back().mutable_data_ptr());
    if (n > 0 && rows > 0) std::memcpy(to, u[g].const_data_ptr(), static_cast<size_t>(n * rows * size));
    char* v = static_cast<char*>(v_out.back().mutable_data_ptr());
    for (int64_t i = 0; i < n; ++i) {
      const Tensor& w = weights[groups[g].first + i];
      keep_alive.push_back(has_inner_channels(w) ? w : as_contiguous(w));
      SpectralLayer layer;
      layer.matrix = keep_alive.back().const_data_ptr();
      layer.rows = rows;
      layer.columns = columns;
      layer.is_double = is_double;
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
    is_double ? reorder(static_cast<double*>(layer.v)) : reorder(static_cast<float*>(layer.v));
  });
  const Tensor out = allocate({count}, type, weights[0]);
  void* to = out.mutable_data_ptr();
  for (int64_t i = 0; i < count; ++i)
    is_double ? static_cast<double*>(to)[i] = lengths[i]
              : static_cast<float*>(to)[i] = static_cast<float>(lengths[i]);
  return {out, u_out, v_out};
}

static Tensors spectral_gradients(const Tensor& grad, const Tensors& weights, const Tensors& u,
                                  const Tensors& v) {
  const char* op = "spectral_gradients";
  Tensors gradients, keep_alive;
  if (weights.empty()) {
    NVAE_CHECK(u.empty() && v.empty(), op, ": u and v must be empty like weights, got ", u.size(), " and ",
               v.size(), " entries");
    return gradients;
  }
  const std::vector<Group> groups = groups_of(op, weights, u);
  const ScalarType type = weights[0].scalar_type();
  const bool is_double = type == ScalarType::Double;
  const int64_t size = is_double ? 8 : 4;
  NVAE_CHECK(grad.numel() == 1 && grad.scalar_type() == type, op,
             ": grad must be one element of the weights' dtype ", torch::headeronly::toString(type), ", got ",
             torch::headeronly::toString(grad.scalar_type()), " of shape ", shape_text(grad));
  NVAE_CHECK(v.size() == u.size(), op, ": v must have ", u.size(), " entries, as u, got ", v.size());
  for (size_t g = 0; g < v.size(); ++g) {
    check_vectors(op, "v", g, v[g], type);
    NVAE_CHECK(v[g].size(0) == u[g].size(0) && v[g].size(1) == groups[g].columns, op, ": v[", g,
               "] must have shape ", shape_text(std::vector<int64_t>{u[g].size(0), groups[g].columns}),
               ", got ", shape_text(v[g]));
  }
  const double scale = is_double ? *grad.const_data_ptr<double>() : *grad.const_data_ptr<float>();
  std::vector<SpectralLayer> layers;
  std::vector<std::vector<char>> permuted;
  for (size_t g = 0; g < u.size(); ++g)
    for (int64_t i = 0; i < u[g].size(0); ++i) {
      const Tensor& w = weights[groups[g].first + i];
      const bool inner = has_inner_channels(w);
      gradients.push_back(allocate(w.sizes(), type, w, inner));
      SpectralLayer layer;
      layer.rows = groups[g].rows;
      layer.columns = groups[g].columns;
      layer.is_double = is_double;
      layer.scale = scale;
      layer.u = const_cast<char*>(static_cast<const char*>(u[g].const_data_ptr())) + i * layer.rows * size;
      layer.v = const_cast<char*>(static_cast<const char*>(v[g].const_data_ptr())) + i * layer.columns * size;
      layer.gradient = gradients.back().mutable_data_ptr();
      if (inner) {
        permuted.emplace_back(static_cast<size_t>(layer.columns * size));
        const int64_t channels = w.size(1), pixels = layer.columns / channels;
        if (is_double)
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
  NVAE_IMPL(m, "spectral_lengths", &nvae::spectral_lengths);
  NVAE_IMPL(m, "spectral_gradients", &nvae::spectral_gradients);
}
