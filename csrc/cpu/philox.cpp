// nvae_fast::philox_normal, philox_words and split_seed on the CPU: threads here, arithmetic in
// philox.vec.cpp.
#include "philox.h"

#include <vector>

#include "../memory.h"

namespace nvae {

// Elements a thread should have at least: about 15 us of work, so that starting it pays.
static constexpr int64_t kGrain = 32768;
static constexpr uint32_t kSplit = 0x53504C54u;

ChannelsLastTiles::ChannelsLastTiles(int64_t n_, int64_t c_, int64_t pixels_)
    : n(n_), c(c_), pixels(pixels_) {
  constexpr int64_t kRow = 128, kMostChannels = 32;
  if (pixels <= kRow) {
    span = pixels;
    spans = 1;
    group = pixels ? 4096 / pixels / 4 * 4 : c;
  } else {
    span = kRow;
    spans = (pixels + kRow - 1) / kRow;
    const int64_t parts =
        (c + kMostChannels - 1) / kMostChannels;  // even parts, each a multiple of four channels
    group = parts ? ((c + parts - 1) / parts + 3) / 4 * 4 : 4;
  }
  groups = (c + group - 1) / group;
}

static Tensor philox_normal(const std::vector<int64_t>& size, const Tensor& seed, ScalarType type,
                            bool channels_last) {
  const Dtype dtype = dtype_of("philox_normal", "dtype", type);
  const uint64_t key = seed_of("philox_normal", seed);
  for (const int64_t extent : size)
    NVAE_CHECK(extent >= 0, "philox_normal: size must have no negative extent, got ", shape_text(size));
  NVAE_CHECK(!channels_last || size.size() == 4, "philox_normal: channels_last needs four dimensions, got ",
             size.size());
  Tensor out = allocate({size.data(), size.size()}, type, seed, channels_last);
  const int64_t count = out.numel();
  if (count == 0) return out;
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const bool same_order = !channels_last || size[1] == 1 || size[2] * size[3] == 1;
  if (same_order) {
    // Cut at multiples of 64 elements: whole batches for every vector width.
    parallel_for(0, (count + 63) / 64, kGrain / 64, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * 64, last = end * 64 < count ? end * 64 : count;
      NVAE_CALL(philox_fill, key, static_cast<uint64_t>(first), last - first, dtype,
                data + first * bytes_of(dtype));
    });
  } else {
    const ChannelsLastTiles tiles(size[0], size[1], size[2] * size[3]);
    const int64_t grain = kGrain / (tiles.group * tiles.span) + 1;
    parallel_for(0, tiles.count(), grain, [&](int64_t begin, int64_t end) {
      NVAE_CALL(philox_tiles, key, tiles, begin, end, dtype, data);
    });
  }
  return out;
}

static Tensor words(const Tensor& seed, int64_t count, int64_t first, uint32_t stream, const char* op) {
  const uint64_t key = seed_of(op, seed);
  NVAE_CHECK(count >= 0 && first >= 0, op, ": the number of blocks and the first one must be >= 0, got ",
             count, " and ", first);
  Tensor out = allocate({count, 4}, ScalarType::Long, seed);
  int64_t* data = out.mutable_data_ptr<int64_t>();
  parallel_for(0, count, kGrain / 4, [&](int64_t begin, int64_t end) {
    NVAE_CALL(philox_blocks, key, stream, static_cast<uint64_t>(first) + static_cast<uint64_t>(begin),
              end - begin, data + 4 * begin);
  });
  return out;
}

static Tensor philox_words(const Tensor& seed, int64_t n_blocks, int64_t first_block) {
  return words(seed, n_blocks, first_block, 0, "philox_words");
}

static Tensor split_seed(const Tensor& seed, int64_t n) {
  const Tensor from = words(seed, n, 0, kSplit, "split_seed");
  Tensor out = allocate({n}, ScalarType::Long, seed);
  const int64_t* word = from.const_data_ptr<int64_t>();
  int64_t* data = out.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) data[i] = word[4 * i] | ((word[4 * i + 1] & 0x7fffffff) << 32);
  return out;
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "philox_normal", &nvae::philox_normal);
  NVAE_IMPL(m, "philox_words", &nvae::philox_words);
  NVAE_IMPL(m, "split_seed", &nvae::split_seed);
}
