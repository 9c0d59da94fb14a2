// The per-capability kernels of philox.vec.cpp.
#pragma once
#include <cstdint>

#include "../capability.h"
#include "../types.h"

namespace nvae {

// Elements first .. first + count - 1 of the stream, contiguous.
NVAE_PER_ISA(void philox_fill(uint64_t seed, uint64_t first, int64_t count, Dtype dtype, void* out))

// A channels_last map (n, c, pixels) cut into tiles that are independent of one another; `tile` makes some of
// them.
struct ChannelsLastTiles {
  int64_t n, c, pixels;
  int64_t group, span;    // channels and pixels of a tile
  int64_t groups, spans;  // tiles along each
  static constexpr int64_t kBuffer =
      5120;  // floats a tile may take: it is made in order, then transposed in cache
  ChannelsLastTiles(int64_t n, int64_t c, int64_t pixels);
  int64_t count() const { return n * groups * spans; }
};
NVAE_PER_ISA(void philox_tiles(uint64_t seed, const ChannelsLastTiles& tiles, int64_t begin, int64_t end,
                               Dtype dtype, void* out))

// Words of blocks first_block .. first_block + count - 1 with third counter word `stream`: (count, 4),
// widened.
NVAE_PER_ISA(void philox_blocks(uint64_t seed, uint32_t stream, uint64_t first_block, int64_t count,
                                int64_t* out))

}  // namespace nvae
