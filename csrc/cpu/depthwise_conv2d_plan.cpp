// Plans of depthwise_conv2d. Along one axis, with p = K / 2:
//
//   forward   y[i] takes h[i stride + (u - p) dilation]           with tap u
//             upsampled: y[2I + e] takes h[I + m]                 with the sum of u, (e + (u - p) dilation) /
//             2 = m, rounded down
//   backward  x[r] takes dy[(r - (u - p) dilation) / stride]      with tap u, where that is a whole number:
//             stride 2 has a phase for even and one for odd r
//             upsampled: x[r] takes dy[2r + q]                    with the sum of u, (p - u) dilation = q or
//             q - 1
//
// so that upsampling costs (K + 1)^2 / 4 taps an output pixel instead of K^2 (not with dilation).
#include "depthwise_conv2d_plan.h"

#include <algorithm>

namespace nvae {
namespace {

struct AxisTap {
  int offset, first, last;  // scanned offset; range of u
};
struct Axis {
  int phases = 1, scale = 1, step = 1;
  std::vector<AxisTap> taps[2];  // by phase, ascending offsets at equal distances `step`
};

int floor_half(int n) { return n >= 0 ? n / 2 : (n - 1) / 2; }

// `interleave`: a dilated axis with stride 1 becomes two phases, so that adjacent pixels of a phase take
// pixels two apart. Rows do not need it: they may be anywhere.
Axis make_axis(const DepthwiseGeometry& g, bool backward, bool interleave) {
  Axis axis;
  const int k = g.kernel, p = k / 2, d = g.dilation;
  if (g.upsample == 2 && !backward) {
    axis.phases = 2;
    for (int e = 0; e < 2; ++e)
      for (int u = 0; u < k; ++u) {
        const int m = floor_half(e + (u - p) * d);
        if (u > 0 && axis.taps[e].back().offset == m)
          axis.taps[e].back().last = u;
        else
          axis.taps[e].push_back({m, u, u});
      }
  } else if (g.upsample == 2) {
    axis.scale = 2;
    for (int q = -p * d; q <= p * d + 1; ++q) {
      AxisTap tap{q, k, -1};
      for (int u = 0; u < k; ++u)
        if ((p - u) * d == q || (p - u) * d == q - 1) {
          tap.first = std::min(tap.first, u);
          tap.last = u;
        }
      axis.taps[0].push_back(tap);
    }
  } else if (g.stride == 2 && backward) {
    axis.phases = 2;
    for (int e = 0; e < 2; ++e)
      for (int u = k - 1; u >= 0; --u)
        if ((e + (p - u) * d) % 2 == 0) axis.taps[e].push_back({(e + (p - u) * d) / 2, u, u});
  } else {
    axis.phases = interleave && d == 2 && g.stride == 1 ? 2 : 1;
    // Stride and dilation 2 together: every pixel of h that counts is at an even position.
    axis.step = interleave ? d : 1;
    axis.scale = interleave && d == 2 ? 1 : g.stride;
    for (int e = 0; e < axis.phases; ++e)
      for (int i = 0; i < k; ++i) {
        const int u = backward ? k - 1 - i : i;
        axis.taps[e].push_back({e + (backward ? p - u : u - p) * d, u, u});
      }
  }
  return axis;
}

bool any_live(const DepthwiseGeometry& g, const AxisTap& row, const AxisTap& column) {
  for (int u = row.first; u <= row.last; ++u)
    for (int v = column.first; v <= column.last; ++v)
      if (g.live[static_cast<size_t>(u * g.kernel + v)]) return true;
  return false;
}

}  // namespace

DepthwisePlanner::DepthwisePlanner(const DepthwiseGeometry& g, bool backward, int columns,
                                   int64_t scanned_width, int64_t stationary_width) {
  const Axis rows = make_axis(g, backward, false), cols = make_axis(g, backward, true);
  plan.row_phases = rows.phases;
  plan.col_phases = cols.phases;
  plan.row_scale = rows.scale;
  plan.col_scale = cols.scale;
  plan.step = cols.step;
  for (int e = 0; e < rows.phases; ++e)
    for (int f = 0; f < cols.phases; ++f) {
      auto segments = std::make_unique<std::vector<DepthwiseSegment>>();
      const std::vector<AxisTap>&us = rows.taps[e], &vs = cols.taps[f];
      const auto window = [&](size_t k) {  // the live columns of row k: first, and one past the last
        size_t first = 0, last = vs.size();
        while (first < last && !any_live(g, us[k], vs[first])) ++first;
        while (last > first && !any_live(g, us[k], vs[last - 1])) --last;
        return std::make_pair(first, last);
      };
      for (size_t k = 0; k < us.size();) {
        const auto live = window(k);
        size_t end = k + 1;
        while (end < us.size() && window(end) == live) ++end;
        const int length = static_cast<int>(live.second - live.first);
        const int chunks = (length + columns - 1) / columns;  // as equal as they come
        for (int i = 0, l = 0; i < chunks; ++i) {
          const int n = (length - l + chunks - i - 1) / (chunks - i);
          const size_t start = live.first + static_cast<size_t>(l);
          rows_.push_back(std::make_unique<std::vector<int>>());
          for (size_t row = k; row < end; ++row) {
            rows_.back()->push_back(us[row].offset);
            for (int j = 0; j < n; ++j) {
              const AxisTap& column = vs[start + static_cast<size_t>(j)];
              folds.push_back({us[row].first, us[row].last, column.first, column.last});
            }
          }
          segments->push_back(
              {rows_.back()->data(), static_cast<int>(end - k), n, vs[start].offset, plan.taps});
          plan.taps += static_cast<int>(end - k) * n;
          const int64_t pixels = (stationary_width - f + plan.col_phases - 1) / plan.col_phases;
          const int64_t rightmost =
              vs[start].offset + (std::max<int64_t>(pixels - 1, 0) * plan.col_scale + n - 1) * plan.step;
          plan.left = std::max(plan.left, -vs[start].offset);
          plan.right = std::max(plan.right, static_cast<int>(rightmost - (scanned_width - 1)));
          plan.first_row = std::min(plan.first_row, us[k].offset);
          plan.last_row = std::max(plan.last_row, us[end - 1].offset);
          l += n;
        }
        k = end;
      }
      phases_.push_back({e, f, segments->data(), static_cast<int>(segments->size())});
      segments_.push_back(std::move(segments));
    }
  plan.phases = phases_.data();
}

}  // namespace nvae
