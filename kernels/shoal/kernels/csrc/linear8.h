// Matrix products with int8 weights, a scale for every 64 inputs of an output, and bfloat16 inputs.
//
// An input is rounded to 16 bits with a scale for every 64 of a row, finer than bfloat16 itself, and
// taken apart into two unsigned bytes: x = scale (256 high + low - 32768). Two chains of byte
// products (VNNI) give exact integer sums of a group; scales are applied once a group. So nothing
// but the weights is rounded to 8 bits, and memory moves half of what it does in bfloat16.
//
// Weights are packed [panels][k / 4][32][4], scales and sums [panels][k / 64][32].
#pragma once
#include <cstring>
#include <vector>

#include "linear.h"

namespace shoal {

constexpr int kGroup = 64;
constexpr int kRows8 = 6;  // of a tile: 24 integer sums, 2 weights and 2 inputs in 32 registers

struct Linear8 {
  const std::int8_t* codes;
  const float* scales;
  const std::int32_t* sums;  // 32768 times the sum of a group's codes
  const float* bias;
  int n, k;  // k is a multiple of kGroup
};

struct Inputs8 {  // rows of a block
  std::vector<std::uint8_t> high, low;  // [rows, k]
  std::vector<float> scales;            // [rows, k / kGroup]
};

inline void split(const bf16* x, int k, std::uint8_t* high, std::uint8_t* low, float* scales) {
  for (int i = 0; i < k; i += kGroup, ++scales) {
    __m512 most = _mm512_setzero_ps();
    for (int j = 0; j < kGroup; j += 16) most = _mm512_max_ps(most, _mm512_abs_ps(widen(x + i + j)));
    const float largest = _mm512_reduce_max_ps(most);
    *scales = largest / 32767.0f;
    const __m512 inverse = _mm512_set1_ps(largest > 0.0f ? 32767.0f / largest : 0.0f);
    for (int j = 0; j < kGroup; j += 16) {
      const __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(widen(x + i + j), inverse)), _mm512_set1_epi32(32768));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i + j), _mm512_cvtepi32_epi8(code));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i + j), _mm512_cvtepi32_epi8(_mm512_srli_epi32(code, 8)));
    }
  }
}

inline __m512i four(const std::uint8_t* p) {
  std::int32_t value;
  std::memcpy(&value, p, sizeof value);
  return _mm512_set1_epi32(value);
}

// sum += four products of unsigned and signed bytes in every lane. The intrinsic makes GCC 12 move
// its sums in and out of memory.
inline void multiply_bytes(__m512i& sum, __m512i inputs, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(inputs), "v"(weights));
}

template <int R>
inline void tile8(const Linear8& layer, Into into, const Inputs8& in, void* y, std::int64_t first, std::int64_t row, int panel) {
  const int groups = layer.k / kGroup;
  const std::int64_t at = static_cast<std::int64_t>(panel) * kPanel * groups;
  const std::int8_t* codes = layer.codes + at * kGroup;
  __m512 total[R][2];
  for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
  for (int group = 0; group < groups; ++group) {
    __m512i high[R][2], low[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) high[r][0] = high[r][1] = low[r][0] = low[r][1] = _mm512_setzero_si512();
    for (int i = group * kGroup; i < (group + 1) * kGroup; i += 4, codes += 4 * kPanel) {
      const __m512i w0 = _mm512_loadu_si512(codes), w1 = _mm512_loadu_si512(codes + 64);
      if (R <= 2) _mm_prefetch(reinterpret_cast<const char*>(codes) + 2048, _MM_HINT_T0);
      if (R <= 2) _mm_prefetch(reinterpret_cast<const char*>(codes) + 2112, _MM_HINT_T0);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const std::int64_t place = (row + r - first) * layer.k + i;
        const __m512i h = four(in.high.data() + place), l = four(in.low.data() + place);
        multiply_bytes(high[r][0], h, w0);
        multiply_bytes(high[r][1], h, w1);
        multiply_bytes(low[r][0], l, w0);
        multiply_bytes(low[r][1], l, w1);
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const std::int64_t column = at + group * kPanel + 16 * half;
      const __m512 scale = _mm512_loadu_ps(layer.scales + column);
      const __m512i offset = _mm512_loadu_si512(layer.sums + column);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512i sum = _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(high[r][half], 8), low[r][half]), offset);
        const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(in.scales[(row + r - first) * groups + group]));
        total[r][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, total[r][half]);
      }
    }
  }
  finish<R>(layer.bias, layer.n, into, y, row, panel, total);
}

template <int R = kRows8 - 1>
inline void last_tile8(int rows, const Linear8& layer, Into into, const Inputs8& in, void* y, std::int64_t first, std::int64_t row, int panel) {
  if constexpr (R > 0) {
    if (rows == R) return tile8<R>(layer, into, in, y, first, row, panel);
    last_tile8<R - 1>(rows, layer, into, in, y, first, row, panel);
  }
}

// The member's share of `rows` rows, as `linear`. Every member takes the inputs apart for itself.
inline void linear8(const Linear8& layer, Into into, const bf16* x, void* y, std::int64_t rows, int member, int members) {
  thread_local Inputs8 in;
  const int panels = (layer.n + kPanel - 1) / kPanel, groups = layer.k / kGroup;
  const int begin = static_cast<int>(static_cast<std::int64_t>(panels) * member / members);
  const int end = static_cast<int>(static_cast<std::int64_t>(panels) * (member + 1) / members);
  for (std::int64_t first = 0; first < rows; first += kRowBlock) {
    const std::int64_t stop = std::min<std::int64_t>(rows, first + kRowBlock);
    const auto bytes = static_cast<std::size_t>(stop - first) * layer.k;
    if (in.high.size() < bytes) {
      in.high.resize(bytes);
      in.low.resize(bytes);
    }
    if (in.scales.size() < bytes / kGroup) in.scales.resize(bytes / kGroup);
    for (std::int64_t row = first; row < stop; ++row) {
      const std::int64_t at = (row - first) * layer.k;
      split(x + row * layer.k, layer.k, in.high.data() + at, in.low.data() + at, in.scales.data() + (row - first) * groups);
    }
    for (int panel = begin; panel < end; ++panel) {
      std::int64_t row = first;
      for (; row + kRows8 <= stop; row += kRows8) tile8<kRows8>(layer, into, in, y, first, row, panel);
      last_tile8(static_cast<int>(stop - row), layer, into, in, y, first, row, panel);
    }
  }
}

}  // namespace shoal
