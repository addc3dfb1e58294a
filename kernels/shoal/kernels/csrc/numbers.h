// bfloat16 and float32 vectors of AVX-512, and the functions that are not in the instruction set.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace shoal {

using bf16 = std::uint16_t;

inline __m512 widen(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void narrow(bf16* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}

inline void narrow(bf16* p, __mmask16 which, __m512 x) {
  _mm256_mask_storeu_epi16(p, which, (__m256i)_mm512_cvtneps_pbh(x));
}

inline bf16 narrow(float x) {
  return static_cast<bf16>(_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0));
}

// Sixteen pairs of bfloat16 at `p`.
inline __m512bh pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// The pair at `p` in every lane.
inline __m512bh same_pair(const bf16* p) {
  return (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const std::int32_t*>(p));
}

// e^x to about 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]
// (Cephes' expf). 0 below -87, where float32 ends.
inline __m512 exp(__m512 x) {
  const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
  const __m512 bounded = _mm512_min_ps(x, _mm512_set1_ps(88.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), bounded);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
  y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_scalef_ps(some, y, n);
}

inline float exp(float x) { return _mm512_cvtss_f32(exp(_mm512_set1_ps(x))); }

// x / (1 + e^-x)
inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 e = exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(one, e));
}

}  // namespace shoal
