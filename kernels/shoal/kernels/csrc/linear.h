// Matrix products with packed bfloat16 weights and float32 sums.
//
// A weight [n, k] is packed in panels of 32 outputs: [panels][k / 2][32][2], so one vector holds
// a pair of inputs of 16 outputs and a panel is read once from front to back. A tile of up to 12
// rows by one panel keeps its sums in registers. The sum of an output is one chain over k,
// whatever the number of rows, so a row's result does not depend on what is computed beside it.
#pragma once
#include <algorithm>

#include "numbers.h"

namespace shoal {

constexpr int kPanel = 32;
constexpr int kRows = 12;        // of a tile: 24 sums, 2 weights and an input in 32 registers
constexpr int kRowBlock = 96;    // rows whose inputs stay in the second-level cache

enum class Into : int {
  kBfloat16 = 0,  // y = x W^T + b
  kFloat32 = 1,
  kAdd = 2,       // y += x W^T + b in float32
  kGated = 3,     // y = silu(gate) * up; panels hold 16 gate and 16 up outputs
};

struct Linear {
  const bf16* weight;  // packed
  const float* bias;   // [n], or null
  int n;               // outputs; of a gated layer gate and up together
  int k;               // inputs, even
};

template <int R>
inline void multiply(const bf16* x, std::int64_t stride, const bf16* w, int k, __m512 (&sum)[R][2]) {
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int i = 0; i < k; i += 2, w += 2 * kPanel) {
    const __m512bh w0 = pairs(w), w1 = pairs(w + kPanel);
    if (R <= 4) _mm_prefetch(reinterpret_cast<const char*>(w) + 2048, _MM_HINT_T0);
    if (R <= 4) _mm_prefetch(reinterpret_cast<const char*>(w) + 2112, _MM_HINT_T0);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512bh in = same_pair(x + r * stride + i);
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], w0, in);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], w1, in);
    }
  }
}

// Writes 16 sums of one row to y[column..], of which those below `n` exist.
inline void write(Into into, void* y, std::int64_t at, int left, __m512 sum) {
  const __mmask16 which = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
  if (into == Into::kBfloat16) {
    narrow(static_cast<bf16*>(y) + at, which, sum);
    return;
  }
  float* out = static_cast<float*>(y) + at;
  if (into == Into::kAdd) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(which, out));
  _mm512_mask_storeu_ps(out, which, sum);
}

// Writes a tile's sums, one panel of R rows.
template <int R>
inline void finish(const float* bias, int n, Into into, void* y, std::int64_t row, int panel, __m512 (&sum)[R][2]) {
  const int column = panel * kPanel;
  for (int r = 0; r < R; ++r) {
    if (into == Into::kGated) {
      if (bias) {
        sum[r][0] = _mm512_add_ps(sum[r][0], _mm512_loadu_ps(bias + column));
        sum[r][1] = _mm512_add_ps(sum[r][1], _mm512_loadu_ps(bias + column + 16));
      }
      const __m512 gated = _mm512_mul_ps(silu(sum[r][0]), sum[r][1]);
      write(Into::kBfloat16, y, (row + r) * (n / 2) + column / 2, 16, gated);
      continue;
    }
    for (int half = 0; half < 2; ++half) {
      const int first = column + 16 * half, left = n - first;
      if (left <= 0) break;
      if (bias) {
        const __mmask16 which = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        sum[r][half] = _mm512_add_ps(sum[r][half], _mm512_maskz_loadu_ps(which, bias + first));
      }
      write(into, y, (row + r) * n + first, left, sum[r][half]);
    }
  }
}

template <int R>
inline void tile(const Linear& layer, Into into, const bf16* x, void* y, std::int64_t row, int panel) {
  __m512 sum[R][2];
  multiply<R>(x + row * layer.k, layer.k, layer.weight + static_cast<std::int64_t>(panel) * kPanel * layer.k,
              layer.k, sum);
  finish<R>(layer.bias, layer.n, into, y, row, panel, sum);
}

template <int R = kRows - 1>
inline void last_tile(int rows, const Linear& layer, Into into, const bf16* x, void* y, std::int64_t row, int panel) {
  if constexpr (R > 0) {
    if (rows == R) return tile<R>(layer, into, x, y, row, panel);
    last_tile<R - 1>(rows, layer, into, x, y, row, panel);
  }
}

// The member's share of `rows` rows: x [rows, k] -> y [rows, n], or [rows, n / 2] where gated.
inline void linear(const Linear& layer, Into into, const bf16* x, void* y, std::int64_t rows, int member, int members) {
  const int panels = (layer.n + kPanel - 1) / kPanel;
  const int first = static_cast<int>(static_cast<std::int64_t>(panels) * member / members);
  const int end = static_cast<int>(static_cast<std::int64_t>(panels) * (member + 1) / members);
  for (std::int64_t block = 0; block < rows; block += kRowBlock) {
    const std::int64_t stop = std::min<std::int64_t>(rows, block + kRowBlock);
    for (int panel = first; panel < end; ++panel) {
      std::int64_t row = block;
      for (; row + kRows <= stop; row += kRows) tile<kRows>(layer, into, x, y, row, panel);
      last_tile(static_cast<int>(stop - row), layer, into, x, y, row, panel);
    }
  }
}

}  // namespace shoal
