// Attention over a paged cache of keys and values in bfloat16.
//
// The tile of a block and head holds keys as [block / 16][dim / 2][16][2] and values as
// [block / 2][dim][2]: sixteen keys, or sixteen elements of two values, fill a vector, and both
// products are chains of pairwise multiply-adds without a sum across lanes. Keys are taken in
// spans; between spans the softmax is corrected (Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018). Spans start at multiples of kSpan, so a row's result does not
// depend on what is computed beside it.
#pragma once
#include <algorithm>

#include "numbers.h"

namespace shoal {

constexpr int kSpan = 256;      // keys between two corrections
constexpr int kHeadRows = 12;   // rows (queries times heads of one key head) that attend together
constexpr int kMaxHeadDim = 256;

struct CacheView {
  bf16* data;  // [blocks][kv_heads][keys, values][block_size * head_dim]
  int kv_heads, block_size, head_dim;

  std::int64_t tile() const { return static_cast<std::int64_t>(block_size) * head_dim; }
  bf16* keys(std::int64_t block, int head) const { return data + (block * kv_heads + head) * 2 * tile(); }
  bf16* values(std::int64_t block, int head) const { return keys(block, head) + tile(); }
};

struct Sight {  // what the rows of one tile may see: keys [from, to)
  std::int64_t from[kHeadRows], to[kHeadRows];
};

template <int R, int G>
inline void score(const bf16* const* queries, const bf16* const* groups, int dim, float scale, float (*scores)[kSpan], int at) {
  __m512 sum[R][G];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) sum[r][g] = _mm512_setzero_ps();
  for (int i = 0; i < dim; i += 2) {
    __m512bh key[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) key[g] = pairs(groups[g] + i * 16);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512bh query = same_pair(queries[r] + i);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) sum[r][g] = _mm512_dpbf16_ps(sum[r][g], key[g], query);
    }
  }
  const __m512 factor = _mm512_set1_ps(scale);
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) _mm512_storeu_ps(&scores[r][at + 16 * g], _mm512_mul_ps(sum[r][g], factor));
}

template <int R, int D>
inline void blend(const bf16 (*weights)[kSpan], const bf16* const* groups, int keys, int dim, const float* keep,
                  float (*out)[kMaxHeadDim], int at) {
  __m512 sum[R][D];
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) sum[r][d] = _mm512_mul_ps(_mm512_set1_ps(keep[r]), _mm512_loadu_ps(&out[r][at + 16 * d]));
  for (int key = 0; key < keys; key += 2) {
    const bf16* row = groups[key / 16] + (key % 16) * dim + 2 * at;
    __m512bh value[D];
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) value[d] = pairs(row + 32 * d);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512bh weight = same_pair(&weights[r][key]);
#pragma GCC unroll 4
      for (int d = 0; d < D; ++d) sum[r][d] = _mm512_dpbf16_ps(sum[r][d], value[d], weight);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) _mm512_storeu_ps(&out[r][at + 16 * d], sum[r][d]);
}

// One tile: R rows, all of one key head, over the blocks of one sequence.
// queries, out: a pointer to each row's head_dim elements.
template <int R>
inline void attend(const bf16* const* queries, bf16* const* out, const Sight& sight, const CacheView& cache,
                   const std::int64_t* table, int head, float scale) {
  constexpr int kGroups = R <= 3 ? 4 : R <= 6 ? 2 : 1;
  constexpr int kDims = R <= 6 ? 4 : 2;
  const int dim = cache.head_dim;
  alignas(64) float scores[R][kSpan];
  alignas(64) bf16 weights[R][kSpan];
  alignas(64) float sums[R][kMaxHeadDim];
  float highest[R], total[R], keep[R];
  std::int64_t from = sight.from[0], to = sight.to[0];
  for (int r = 0; r < R; ++r) {
    from = std::min(from, sight.from[r]);
    to = std::max(to, sight.to[r]);
    highest[r] = -1e30f;
    total[r] = 0.0f;
    for (int d = 0; d < dim; d += 16) _mm512_storeu_ps(&sums[r][d], _mm512_setzero_ps());
  }
  for (std::int64_t begin = from / kSpan * kSpan; begin < to; begin += kSpan) {
    const int keys = static_cast<int>((std::min<std::int64_t>(kSpan, to - begin) + 15) / 16 * 16);
    const bf16* key_groups[kSpan / 16];
    const bf16* value_groups[kSpan / 16];
    for (int group = 0; group < keys / 16; ++group) {
      const std::int64_t key = begin + 16 * group;
      const std::int64_t block = table[key / cache.block_size];
      const std::int64_t inside = key % cache.block_size * dim;
      key_groups[group] = cache.keys(block, head) + inside;
      value_groups[group] = cache.values(block, head) + inside;
    }
    int group = 0;
    for (; group + kGroups <= keys / 16; group += kGroups)
      score<R, kGroups>(queries, key_groups + group, dim, scale, scores, 16 * group);
    for (; group < keys / 16; ++group) score<R, 1>(queries, key_groups + group, dim, scale, scores, 16 * group);
    for (int r = 0; r < R; ++r) {
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const int low = static_cast<int>(std::max<std::int64_t>(0, sight.from[r] - begin));
      const int high = static_cast<int>(std::min<std::int64_t>(keys, sight.to[r] - begin));
      __m512 most = _mm512_set1_ps(highest[r]);
      for (int key = 0; key < keys; key += 16) {
        __m512 s = _mm512_load_ps(&scores[r][key]);
        if (key < low || key + 16 > high) {
          const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(key));
          const __mmask16 seen = _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(high)) &
                                 _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(low));
          s = _mm512_mask_mov_ps(_mm512_set1_ps(-3e38f), seen, s);
          _mm512_store_ps(&scores[r][key], s);
        }
        most = _mm512_max_ps(most, s);
      }
      const float now = _mm512_reduce_max_ps(most);
      keep[r] = exp(highest[r] - now);
      highest[r] = now;
      __m512 sum = _mm512_setzero_ps();
      for (int key = 0; key < keys; key += 16) {
        const __m512 e = exp(_mm512_sub_ps(_mm512_load_ps(&scores[r][key]), _mm512_set1_ps(now)));
        sum = _mm512_add_ps(sum, e);
        narrow(&weights[r][key], e);
      }
      total[r] = total[r] * keep[r] + _mm512_reduce_add_ps(sum);
    }
    int at = 0;
    for (; at + 16 * kDims <= dim; at += 16 * kDims) blend<R, kDims>(weights, value_groups, keys, dim, keep, sums, at);
    for (; at < dim; at += 16) blend<R, 1>(weights, value_groups, keys, dim, keep, sums, at);
  }
  for (int r = 0; r < R; ++r) {
    const __m512 share = _mm512_set1_ps(1.0f / total[r]);
    for (int d = 0; d < dim; d += 16) narrow(out[r] + d, _mm512_mul_ps(_mm512_loadu_ps(&sums[r][d]), share));
  }
}

template <int R = kHeadRows>
inline void attend(int rows, const bf16* const* queries, bf16* const* out, const Sight& sight, const CacheView& cache,
                   const std::int64_t* table, int head, float scale) {
  if constexpr (R > 0) {
    if (rows == R) return attend<R>(queries, out, sight, cache, table, head, scale);
    attend<R - 1>(rows, queries, out, sight, cache, table, head, scale);
  }
}

}  // namespace shoal
