// Vectors of one instruction set: the only place where the instruction sets differ.
//
// Included once per instruction set, by csrc/cpu/isa/*.cpp, after that file has set the compilation target and defined
// ADASPLASH2_ISA, and ADASPLASH2_AVX2 and ADASPLASH2_AVX512 where they hold. (g++ 12 does not define __AVX2__ and the
// like under #pragma GCC target, so asking for those would silently build baseline vectors.) Everything lives in the
// namespace adasplash2::cpu::ADASPLASH2_ISA, so nothing is shared between the builds by accident. Arithmetic is plain
// operators on GCC vector types; functions exist for what operators cannot say.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define ADASPLASH2_INLINE inline __attribute__((always_inline))

namespace adasplash2::cpu::ADASPLASH2_ISA {

#if defined(ADASPLASH2_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(ADASPLASH2_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What a tensor's elements are accumulated in: double for double, float for everything else.
template <class Element>
using Accumulator = std::conditional_t<std::is_same_v<Element, double>, double, float>;

template <class Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <class Real>
using Vector = typename VectorOf<Real>::Vector;
template <class Real>
using Bits = typename VectorOf<Real>::Bits;

template <class Real>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Real));

template <class Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

// ---- loads and stores, converting
// -------------------------------------------------------------------------------------

template <class Real>
ADASPLASH2_INLINE Vector<Real> broadcast(Real x) {
  return x - Vector<Real>{};  // not 0 + x, which is an addition: it would turn -0 into 0
}

template <class Real>
ADASPLASH2_INLINE Vector<Real> load(const Real* p) {
  Vector<Real> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

ADASPLASH2_INLINE Vector<float> load(const BFloat16* p) {
  // Not the plain code below, of which GCC 12 makes two halves: gathers of bfloat16 rows took 2.4 times as long.
#if defined(ADASPLASH2_AVX512)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(ADASPLASH2_AVX2)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  typedef uint16_t Half16 __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  Half16 half;
  std::memcpy(&half, p, sizeof(half));
  const Word word = __builtin_convertvector(half, Word) << 16;
  Vector<float> v;
  std::memcpy(&v, &word, sizeof(v));
  return v;
#endif
}

ADASPLASH2_INLINE Vector<float> load(const Float16* p) {
#if defined(ADASPLASH2_AVX512)
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(ADASPLASH2_AVX2)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vector<float> v;
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    _Float16 x;
    std::memcpy(&x, p + lane, sizeof(x));
    v[lane] = static_cast<float>(x);
  }
  return v;
#endif
}

template <class Real>
ADASPLASH2_INLINE void store(Real* p, Vector<Real> v) {
  std::memcpy(p, &v, sizeof(v));
}

ADASPLASH2_INLINE void store(BFloat16* p, Vector<float> v) {  // round to nearest even, NaN stays NaN
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Half16 __attribute__((vector_size(kVectorBytes / 2)));
  Word word;
  std::memcpy(&word, &v, sizeof(v));
  const Word rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  const Half16 half = __builtin_convertvector(v == v ? rounded : Word{} + 0x7fc0, Half16);
  std::memcpy(p, &half, sizeof(half));
}

ADASPLASH2_INLINE void store(Float16* p, Vector<float> v) {
#if defined(ADASPLASH2_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(ADASPLASH2_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    const _Float16 x = static_cast<_Float16>(v[lane]);
    std::memcpy(p + lane, &x, sizeof(x));
  }
#endif
}

template <class Element>
ADASPLASH2_INLINE Accumulator<Element> load_one(const Element* p) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    const uint32_t word = static_cast<uint32_t>(p->bits) << 16;
    float x;
    std::memcpy(&x, &word, sizeof(x));
    return x;
  } else if constexpr (std::is_same_v<Element, Float16>) {
#if defined(ADASPLASH2_AVX2)
    return _cvtsh_ss(p->bits);
#else
    _Float16 x;
    std::memcpy(&x, p, sizeof(x));
    return static_cast<float>(x);
#endif
  } else {
    return *p;
  }
}

// ---- lane arithmetic
// --------------------------------------------------------------------------------------------------

// NaN in either operand: x86's maximum returns the second one, so max(x, floor) turns a NaN x into floor.
template <class Real>
ADASPLASH2_INLINE Vector<Real> max(Vector<Real> a, Vector<Real> b) {
  // Not a > b ? a : b, of which GCC 12 makes a comparison and a blend.
#if defined(ADASPLASH2_AVX512)
  if constexpr (std::is_same_v<Real, float>) return (Vector<Real>)_mm512_max_ps((__m512)a, (__m512)b);
  else return (Vector<Real>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(ADASPLASH2_AVX2)
  if constexpr (std::is_same_v<Real, float>) return (Vector<Real>)_mm256_max_ps((__m256)a, (__m256)b);
  else return (Vector<Real>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  if constexpr (std::is_same_v<Real, float>) return (Vector<Real>)_mm_max_ps((__m128)a, (__m128)b);
  else return (Vector<Real>)_mm_max_pd((__m128d)a, (__m128d)b);
#endif
}

template <class Real>
ADASPLASH2_INLINE Vector<Real> square_root(Vector<Real> v) {
#if defined(ADASPLASH2_AVX512)
  if constexpr (std::is_same_v<Real, float>) return (Vector<Real>)_mm512_sqrt_ps((__m512)v);
  else return (Vector<Real>)_mm512_sqrt_pd((__m512d)v);
#elif defined(ADASPLASH2_AVX2)
  if constexpr (std::is_same_v<Real, float>) return (Vector<Real>)_mm256_sqrt_ps((__m256)v);
  else return (Vector<Real>)_mm256_sqrt_pd((__m256d)v);
#else
  if constexpr (std::is_same_v<Real, float>) return (Vector<Real>)_mm_sqrt_ps((__m128)v);
  else return (Vector<Real>)_mm_sqrt_pd((__m128d)v);
#endif
}

// The larger number, or NaN if either is.
template <class Real>
ADASPLASH2_INLINE Real max_or_nan(Real a, Real b) {
  return a != a || b <= a ? a : b;
}

template <class Real, class Reduce>
ADASPLASH2_INLINE Real reduce(Vector<Real> v, Reduce combine) {  // a fixed tree: the same bits on every call
  Real lanes[kLanes<Real>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<Real> / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] = combine(lanes[lane], lanes[lane + width]);
  }
  return lanes[0];
}

template <class Real>
ADASPLASH2_INLINE Real reduce_add(Vector<Real> v) {
#if defined(ADASPLASH2_AVX512)
  if constexpr (std::is_same_v<Real, float>) return _mm512_reduce_add_ps((__m512)v);
  else return _mm512_reduce_add_pd((__m512d)v);
#else
  return reduce<Real>(v, [](Real a, Real b) { return a + b; });
#endif
}

template <class Real>
ADASPLASH2_INLINE Real reduce_max(Vector<Real> v) {
#if defined(ADASPLASH2_AVX512)
  if constexpr (std::is_same_v<Real, float>) return _mm512_reduce_max_ps((__m512)v);
  else return _mm512_reduce_max_pd((__m512d)v);
#else
  return reduce<Real>(v, [](Real a, Real b) { return a > b ? a : b; });
#endif
}

// Bit per lane of !(a <= b): the lane is above, or NaN.
template <class Real>
ADASPLASH2_INLINE uint32_t above(Vector<Real> a, Vector<Real> b) {
#if defined(ADASPLASH2_AVX512)
  if constexpr (std::is_same_v<Real, float>) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ);
  else return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NLE_UQ);
#elif defined(ADASPLASH2_AVX2)
  if constexpr (std::is_same_v<Real, float>)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ));
  else return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_NLE_UQ));
#else
  if constexpr (std::is_same_v<Real, float>) return _mm_movemask_ps(_mm_cmpnle_ps((__m128)a, (__m128)b));
  else return _mm_movemask_pd(_mm_cmpnle_pd((__m128d)a, (__m128d)b));
#endif
}

// A square of kLanes vectors, by log2(kLanes) rounds of a perfect shuffle of its two halves.
template <class Real>
ADASPLASH2_INLINE void transpose(Vector<Real>* rows) {
  constexpr int kLane = kLanes<Real>;
  Bits<Real> low, high;  // a0 b0 a1 b1 ... of the first and of the second halves of a and b
  for (int lane = 0; lane < kLane; ++lane) {
    low[lane] = lane / 2 + lane % 2 * kLane;
    high[lane] = low[lane] + kLane / 2;
  }
#pragma GCC unroll 4
  for (int round = kLane; round > 1; round /= 2) {
    Vector<Real> shuffled[kLane];
#pragma GCC unroll 8
    for (int i = 0; i < kLane / 2; ++i) {
      shuffled[2 * i] = __builtin_shuffle(rows[i], rows[i + kLane / 2], low);
      shuffled[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLane / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLane; ++i) rows[i] = shuffled[i];
  }
}

#if defined(ADASPLASH2_AVX2) && !defined(ADASPLASH2_AVX512)

// Of an 8-bit mask: the numbers of its set bits first, a byte each.
struct CompressOrder {
  uint64_t lanes[256];
  constexpr CompressOrder() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0, count = 0; lane < 8; ++lane) {
        if ((mask >> lane & 1) != 0) lanes[mask] |= uint64_t(lane) << 8 * count++;
      }
    }
  }
};
alignas(64) inline constexpr CompressOrder kCompressOrder;
// Of a 4-bit mask: every bit twice.
inline constexpr uint8_t kTwiceEach[16] = {0x00, 0x03, 0x0c, 0x0f, 0x30, 0x33, 0x3c, 0x3f,
                                           0xc0, 0xc3, 0xcc, 0xcf, 0xf0, 0xf3, 0xfc, 0xff};

ADASPLASH2_INLINE __m128i compressed_lanes(uint32_t mask) {  // as bytes
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompressOrder.lanes + mask));
}

ADASPLASH2_INLINE Vector<float> compress(Vector<float> v, uint32_t mask) {
  return (Vector<float>)_mm256_permutevar8x32_ps((__m256)v, _mm256_cvtepu8_epi32(compressed_lanes(mask)));
}

ADASPLASH2_INLINE Vector<double> compress(Vector<double> v, uint32_t mask) {
  return (Vector<double>)compress((Vector<float>)v, kTwiceEach[mask]);
}

#endif

// Writes the lanes of (score, first_column + lane) that are set in `mask` to the front of score[], column[] and returns
// how many. May write kLanes elements whatever the mask.
//
// NOTE: With AVX2 not lane by lane as without it. To index a vector's lanes GCC 12 put it into memory, and with it the
// accumulators of the scan, in its innermost loop too: twice the time of the whole scan (Zen 3, 2026-11-29).
template <class Real>
ADASPLASH2_INLINE int append_compressed(Real* score, int32_t* column, uint32_t mask, Vector<Real> v,
                                        int32_t first_column) {
#if defined(ADASPLASH2_AVX512)
  // Compress into a register, then store it whole: compressing stores are slow on some machines.
  if constexpr (std::is_same_v<Real, float>) {
    const __m512i columns = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32(first_column));
    _mm512_storeu_ps(score, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), (__m512)v));
    _mm512_storeu_si512(column, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), columns));
  } else {
    const __m256i columns =
        _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first_column));
    _mm512_storeu_pd(score, _mm512_maskz_compress_pd(static_cast<__mmask8>(mask), (__m512d)v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(column),
                        _mm256_maskz_compress_epi32(static_cast<__mmask8>(mask), columns));
  }
  return __builtin_popcount(mask);
#elif defined(ADASPLASH2_AVX2)
  store(score, compress(v, mask));
  if constexpr (std::is_same_v<Real, float>) {
    const __m256i lanes = _mm256_cvtepu8_epi32(compressed_lanes(mask));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(column), _mm256_add_epi32(lanes, _mm256_set1_epi32(first_column)));
  } else {
    const __m128i lanes = _mm_cvtepu8_epi32(compressed_lanes(mask));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(column), _mm_add_epi32(lanes, _mm_set1_epi32(first_column)));
  }
  return __builtin_popcount(mask);
#else
  Real lanes[kLanes<Real>];
  std::memcpy(lanes, &v, sizeof(v));
  int count = 0;
  for (; mask != 0; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    score[count] = lanes[lane];
    column[count++] = first_column + lane;
  }
  return count;
#endif
}

// The same for lists: keeps the (score, column) pairs of the lanes set in `mask`.
template <class Real>
ADASPLASH2_INLINE int keep_compressed(Real* score, int32_t* column, uint32_t mask, Vector<Real> v,
                                      const int32_t* columns) {
#if defined(ADASPLASH2_AVX512)
  if constexpr (std::is_same_v<Real, float>) {
    const __m512i kept = _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), _mm512_loadu_si512(columns));
    _mm512_storeu_ps(score, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), (__m512)v));
    _mm512_storeu_si512(column, kept);
  } else {
    const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns));
    _mm512_storeu_pd(score, _mm512_maskz_compress_pd(static_cast<__mmask8>(mask), (__m512d)v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(column),
                        _mm256_maskz_compress_epi32(static_cast<__mmask8>(mask), loaded));
  }
  return __builtin_popcount(mask);
#elif defined(ADASPLASH2_AVX2)
  store(score, compress(v, mask));
  if constexpr (std::is_same_v<Real, float>) {
    const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(column), (__m256i)compress((Vector<float>)loaded, mask));
  } else {
    const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns));
    const __m128i lanes = _mm_cvtepu8_epi32(compressed_lanes(mask));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(column), (__m128i)_mm_permutevar_ps((__m128)loaded, lanes));
  }
  return __builtin_popcount(mask);
#else
  Real lanes[kLanes<Real>];
  std::memcpy(lanes, &v, sizeof(v));
  int count = 0;
  for (; mask != 0; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    const int32_t kept = columns[lane];
    score[count] = lanes[lane];
    column[count++] = kept;
  }
  return count;
#endif
}

// ---- powers
// -----------------------------------------------------------------------------------------------------------

// log2 x for x > 0 (finite, but not meaningful, elsewhere). For float: the artanh series on [sqrt(1/2), sqrt(2))
// (|t| < 0.172, first dropped term below 4e-10). For double: libm, lane by lane.
template <class Real>
ADASPLASH2_INLINE Vector<Real> log2_positive(Vector<Real> x) {
  if constexpr (std::is_same_v<Real, double>) {
    Vector<double> y;
    for (int lane = 0; lane < kLanes<double>; ++lane) y[lane] = x[lane] > 0 ? std::log2(x[lane]) : 0.0;
    return y;
  } else {
    Bits<float> bits;
    std::memcpy(&bits, &x, sizeof(x));
    const Bits<float> shifted = bits - 0x3f3504f3;  // bits of sqrt(1/2)
    const Bits<float> exponent = shifted >> 23;
    const Bits<float> mantissa_bits = (shifted & 0x007fffff) + 0x3f3504f3;
    Vector<float> m;
    std::memcpy(&m, &mantissa_bits, sizeof(m));
    const Vector<float> t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
    const Vector<float> series = (((t2 * 0.32059890f + 0.41219858f) * t2 + 0.57707802f) * t2 + 0.96179669f) * t2;
    return __builtin_convertvector(exponent, Vector<float>) + (t * 2.88539008f + t * series);
  }
}

// x^e for x in [0, 1], e > 0; 0^e = 0. For float: exp2(e log2 x) with a degree 6 polynomial for exp2 (2e-8);
// relative error <= 2^-23 * (2 + |e log2 x|). For double: libm, lane by lane.
template <class Real>
ADASPLASH2_INLINE Vector<Real> power(Vector<Real> x, Real e) {
  if constexpr (std::is_same_v<Real, double>) {
    Vector<double> y;
    for (int lane = 0; lane < kLanes<double>; ++lane) y[lane] = x[lane] > 0 ? std::pow(x[lane], e) : 0.0;
    return y;
  } else {
    const Vector<float> log2_power = log2_positive<float>(x) * e;
    const Vector<float> y = log2_power < -126.0f ? broadcast(-126.0f) : log2_power;
    const Vector<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vector<float> rounded = y + magic;
    const Vector<float> f = y - (rounded - magic);
    Vector<float> p = f * 1.5403530e-4f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    Bits<float> scale;
    std::memcpy(&scale, &rounded, sizeof(scale));
    Bits<float> result_bits;
    std::memcpy(&result_bits, &p, sizeof(p));
    result_bits += scale << 23;
    Vector<float> result;
    std::memcpy(&result, &result_bits, sizeof(result));
    // Below 2^-126 (and x = 0, whose log2 came out finite) the probability is zero in float.
    return (x > 0.0f) & (log2_power >= -126.0f) ? result : broadcast(0.0f);
  }
}

}  // namespace adasplash2::cpu::ADASPLASH2_ISA
