// Largest error of the functions of csrc/vec_math.h, in units in the last place of the exact (float64)
// result. Built by tests/test_vec.py once per capability. Usage: vec_accuracy STEP: every STEP-th float32 bit
// pattern (1: all of them, a few minutes). Prints "name worst worst_input" a line; special values are checked
// exactly.
#include "philox.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace nvae::NVAE_ISA;

static float as_float(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}

// Spacing of float32 around |x|, as a float64.
static double spacing(double x) {
  int e;
  std::frexp(x, &e);
  return std::ldexp(1.0, (e < -125 ? -125 : e) - 24);
}

static double error(float got, double exact) {
  const float rounded = static_cast<float>(exact);
  if (std::isnan(exact)) return std::isnan(got) ? 0 : 1e30;
  if (std::isnan(got)) return 1e30;
  if (std::isinf(got) && std::isinf(rounded)) return std::signbit(got) == std::signbit(rounded) ? 0 : 1e30;
  if (std::isinf(got) || std::isinf(rounded)) {
    // One of them is just beyond the largest number.
    const double largest = 3.4028234663852886e38;
    double a = std::isinf(got) ? std::copysign(largest, got) : static_cast<double>(got);
    return std::fabs(a - exact) / spacing(largest);
  }
  if (exact == 0) return got == 0 && std::signbit(got) == std::signbit(exact) ? 0 : std::fabs(got) / 0x1p-149;
  return std::fabs(static_cast<double>(got) - exact) / spacing(exact);
}

template <class Ours, class Exact>
static void sweep(const char* name, uint64_t step, uint32_t from, uint32_t to, Ours ours, Exact exact) {
  double worst = 0;
  float where = 0;
  for (uint64_t b = from; b <= to; b += step * VecF::size) {
    float x[VecF::size], y[VecF::size];
    for (int i = 0; i < VecF::size; ++i) {
      uint64_t pattern = b + step * static_cast<uint64_t>(i);
      x[i] = as_float(static_cast<uint32_t>(pattern > to ? to : pattern));
    }
    ours(VecF::load(x)).store(y);
    for (int i = 0; i < VecF::size; ++i) {
      const double e = error(y[i], exact(static_cast<double>(x[i])));
      if (!(e <= worst)) worst = e, where = x[i];
    }
  }
  std::printf("%s %.4f %.9g\n", name, worst, where);
}

static void turns(uint64_t step) {
  double worst[2] = {0, 0};
  uint32_t where[2] = {0, 0};
  const double turn = 6.283185307179586476925286766559 / 4294967296.0;
  for (uint64_t b = 0; b < (1ull << 32); b += step * VecF::size) {
    uint32_t w[VecF::size];
    float c[VecF::size], s[VecF::size];
    for (int i = 0; i < VecF::size; ++i) w[i] = static_cast<uint32_t>(b + step * static_cast<uint64_t>(i));
    VecF cosine, sine;
    sincos_turn(Bits::load(w), cosine, sine);
    cosine.store(c);
    sine.store(s);
    for (int i = 0; i < VecF::size; ++i) {
      // Reduce the angle as the definition does; float64 sine and cosine of the remainder are exact enough.
      const uint32_t q = (w[i] + 0x20000000u) >> 30;
      const double phi = static_cast<double>(static_cast<int32_t>(w[i] - (q << 30))) * turn;
      const double a = std::cos(phi), d = std::sin(phi);
      const double exact_c[4] = {a, -d, -a, d}, exact_s[4] = {d, a, -d, -a};
      const double e[2] = {exact_c[q] == 0 ? std::fabs(c[i]) : error(c[i], exact_c[q]),
                           exact_s[q] == 0 ? std::fabs(s[i]) : error(s[i], exact_s[q])};
      for (int k = 0; k < 2; ++k)
        if (!(e[k] <= worst[k])) worst[k] = e[k], where[k] = w[i];
    }
  }
  std::printf("cos_turn %.4f %u\nsin_turn %.4f %u\n", worst[0], where[0], worst[1], where[1]);
}

// Conversions to and from 16 bits and float64, whole vectors and tails, against the scalar definitions in
// vec.h.
static int conversions(uint64_t step) {
  int wrong = 0;
  uint64_t b = 0;
  while (b < (1ull << 32)) {
    float x[VecF::size];
    nvae::bf16 h[VecF::size];
    nvae::f16 g[VecF::size];
    double d[VecF::size];
    for (int i = 0; i < VecF::size; ++i, b += step) x[i] = as_float(static_cast<uint32_t>(b));
    const int n = static_cast<int>(b / step % VecF::size) + 1;
    std::memset(h, 0x5a, sizeof h);
    std::memset(g, 0x5a, sizeof g);
    VecF v = VecF::load(x);
    v.store(h, n);
    v.store(g, n);
    v.store(d);
    for (int i = 0; i < VecF::size; ++i) {
      const bool nan = x[i] != x[i];
      wrong += h[i].bits != (i < n ? bf16_from_float(x[i]) : 0x5a5a);
      wrong += g[i].bits != (i < n ? f16_from_float(x[i]) : 0x5a5a);
      wrong += !nan && d[i] != static_cast<double>(x[i]);
    }
  }
  for (uint32_t p = 0; p < 65536; p += VecF::size) {
    nvae::bf16 h[VecF::size];
    nvae::f16 g[VecF::size];
    float y[VecF::size], z[VecF::size];
    for (uint32_t i = 0; i < VecF::size; ++i) h[i].bits = g[i].bits = static_cast<uint16_t>(p + i);
    const int n = static_cast<int>(p / VecF::size % VecF::size) + 1;
    VecF::load(h, n).store(y);
    VecF::load(g).store(z);
    for (int i = 0; i < VecF::size; ++i) {
      const float a = i < n ? bf16_to_float(h[i].bits) : 0.f, c = f16_to_float(g[i].bits);
      wrong += !(y[i] == a || (y[i] != y[i] && a != a));
      wrong += !(z[i] == c || (z[i] != z[i] && c != c));
    }
  }
  return wrong;
}

// A run of normals across element 2^34, where the upper half of the block number changes, at every alignment,
// against the words of single blocks. No tensor that fits in memory reaches it.
static int stream() {
  const uint64_t seed = 0x0123456789abcdefu, boundary = 1ull << 34;
  int wrong = 0;
  for (uint64_t before = 1; before < 400; before += 37) {
    float got[700];
    const uint64_t first = boundary - before;
    NormalStream(seed).fill(first, 700, got);
    for (uint64_t i = 0; i < 700; ++i) {
      const uint64_t block = (first + i) / 4;
      Bits w[4];
      VecF z[4];
      float lanes[VecF::size];
      philox_words(Words64(block), Words64(block), PhiloxKey(seed, static_cast<uint32_t>(block >> 32)), w);
      normals4(w, z);
      z[(first + i) % 4].store(lanes);
      wrong += got[i] != lanes[0];
    }
  }
  return wrong;
}

int main(int argc, char** argv) {
  const uint64_t step = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 4099;
  const uint32_t all = 0xffffffffu;
  sweep("exp", step, 0, all, [](VecF x) { return exp(x); }, [](double x) { return std::exp(x); });
  sweep("log", step, 0, all, [](VecF x) { return log(x); }, [](double x) { return std::log(x); });
  sweep(
      "log_positive", step, 0x00800000u, 0x7f7fffffu, [](VecF x) { return log_positive(x); },
      [](double x) { return std::log(x); });
  sweep("tanh", step, 0, all, [](VecF x) { return tanh(x); }, [](double x) { return std::tanh(x); });
  sweep(
      "sigmoid", step, 0, all, [](VecF x) { return sigmoid(x); },
      [](double x) { return 1 / (1 + std::exp(-x)); });
  // Negative numbers down to -86, where exp_negative stops.
  sweep(
      "exp_negative", step, 0x80000000u, 0xc2ac0000u, [](VecF x) { return exp_negative(x); },
      [](double x) { return std::exp(x); });
  sweep(
      "expm1", step, 0x80000000u, 0xc2ac0000u,
      [](VecF x) {
        VecF minus_one;
        exp_negative(x, minus_one);
        return minus_one;
      },
      [](double x) { return std::expm1(x); });
  sweep(
      "log1p_positive", step, 0, 0x7f7fffffu, [](VecF x) { return log1p_positive(x); },
      [](double x) { return std::log1p(x); });
  turns(step);
  std::printf("stream %d 0\n", stream());
  std::printf("conversions %d 0\n", conversions(step));
  return 0;
}
