// Which scanned pixel is multiplied by which tap: the plans behind csrc/cpu/depthwise_conv2d.h.
#pragma once
#include <memory>
#include <vector>

#include "depthwise_conv2d.h"

namespace nvae {

struct DepthwiseGeometry {
  int kernel = 1, stride = 1, dilation = 1, upsample = 1;
  std::vector<bool> live;  // kernel * kernel: taps that exist
};

// Where tap u of a tap of the plan comes from: the sum of weight[u][v] over u0 <= u <= u1, v0 <= v <= v1.
struct DepthwiseFold {
  int u0, u1, v0, v1;
};

// Owns what `plan` points to. Not copied: the plan points into it.
struct DepthwisePlanner {
  DepthwisePlan plan;
  std::vector<DepthwiseFold> folds;  // one for each of plan.taps

  // `columns`: the longest row of a segment; `scanned_width`, `stationary_width`: of the maps.
  DepthwisePlanner(const DepthwiseGeometry& g, bool backward, int columns, int64_t scanned_width,
                   int64_t stationary_width);
  DepthwisePlanner(const DepthwisePlanner&) = delete;
  DepthwisePlanner& operator=(const DepthwisePlanner&) = delete;

 private:
  std::vector<DepthwisePhase> phases_;
  std::vector<std::unique_ptr<std::vector<DepthwiseSegment>>> segments_;
  std::vector<std::unique_ptr<std::vector<int>>> rows_;
};

}  // namespace nvae
