// SIMD vectors, and the functions of them that routing needs.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace {

template <typename T, int W> struct Lanes { typedef T type __attribute__((vector_size(W * sizeof(T)))); };
template <typename T> struct Bits;
template <> struct Bits<float> { using type = int32_t; };
template <> struct Bits<double> { using type = int64_t; };

template <typename T, int W, int... I>
inline typename Lanes<T, W / 2>::type lower(typename Lanes<T, W>::type v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, I...);
}
template <typename T, int W, int... I>
inline typename Lanes<T, W / 2>::type upper(typename Lanes<T, W>::type v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I + W / 2)...);
}
template <typename T, int W> inline typename Lanes<T, W / 2>::type folded(typename Lanes<T, W>::type v) {
  using Seq = std::make_integer_sequence<int, W / 2>;
  return lower<T, W>(v, Seq()) + upper<T, W>(v, Seq());
}
template <typename T, int W> inline typename Lanes<T, 4>::type to_four(typename Lanes<T, W>::type v) {
  if constexpr (W == 4) return v; else return to_four<T, W / 2>(folded<T, W>(v));
}
template <typename T, int W> inline T sum(typename Lanes<T, W>::type v) {
  const auto f = to_four<T, W>(v);
  return (f[0] + f[1]) + (f[2] + f[3]);
}
template <typename T, int W> inline T largest(typename Lanes<T, W>::type v) {
  if constexpr (W == 2) {
    return std::max(v[0], v[1]);
  } else {
    using Seq = std::make_integer_sequence<int, W / 2>;
    const auto a = lower<T, W>(v, Seq()), b = upper<T, W>(v, Seq());
    return largest<T, W / 2>(a > b ? a : b);
  }
}
// The sums of four vectors, as one vector of four.
template <typename T, int W>
inline typename Lanes<T, 4>::type sums(const typename Lanes<T, W>::type *v) {
  const auto a = to_four<T, W>(v[0]), b = to_four<T, W>(v[1]), c = to_four<T, W>(v[2]), d = to_four<T, W>(v[3]);
  const auto ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const auto cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

template <typename T, int W> struct Math {
  using V = typename Lanes<T, W>::type;
  using Int = typename Bits<T>::type;
  using IV = typename Lanes<Int, W>::type;
  static constexpr bool DOUBLE = sizeof(T) == 8;
  static constexpr int MANTISSA = DOUBLE ? 52 : 23, BIAS = DOUBLE ? 1023 : 127;

  static IV bits(V v) { IV i; std::memcpy(&i, &v, sizeof v); return i; }
  static V number(IV i) { V v; std::memcpy(&v, &i, sizeof v); return v; }

  // Taylor series on [-ln 2 / 2, ln 2 / 2]; results below the smallest normal number are 0.
  static V exp(V x) {
    constexpr T magic = DOUBLE ? T(6755399441055744.0) : T(12582912.0);  // 1.5 * 2^mantissa: rounds
    constexpr T high = DOUBLE ? T(6.93147180369123816490e-01) : T(0.693359375);
    constexpr T low = DOUBLE ? T(1.90821492927058770002e-10) : T(-2.12194440e-4);
    const V clamped = x < T(DOUBLE ? -708 : -87) ? V{} + T(DOUBLE ? -708 : -87) : x;
    const V shifted = clamped * T(1.44269504088896340736) + magic;
    const V n = shifted - magic;
    const V f = (clamped - n * high) - n * low;
    constexpr int degree = DOUBLE ? 13 : 7;
    T factorial = 1;
    for (int i = 2; i <= degree; i++) factorial *= T(i);
    V p = V{} + 1 / factorial;
    for (int i = degree; i >= 1; i--) {
      factorial /= T(i);
      p = p * f + 1 / factorial;
    }
    const V scale = number((__builtin_convertvector(n, IV) + Int(BIAS)) << MANTISSA);
    return x < T(DOUBLE ? -708 : -87) ? V{} : p * scale;
  }

  // A product of up to some 100 positive numbers that may leave the range of T, for its logarithm: x = 2^e m.
  struct Product {
    V mantissa = V{} + 1, wrong = {};
    IV exponent = {};

    void times(V x) {
      const IV i = bits(x);
      exponent += (i >> MANTISSA) - Int(BIAS - 1);
      mantissa *= number((i & ((Int(1) << MANTISSA) - 1)) | (Int(BIAS - 1) << MANTISSA));  // [1/2, 1)
      wrong += x - x;  // NaN and infinity stay NaN
    }

    // log m = 2 artanh((m - 1) / (m + 1)) with m near 1.
    V log() const {
      constexpr T high = DOUBLE ? T(6.93147180369123816490e-01) : T(0.693359375);
      constexpr T low = DOUBLE ? T(1.90821492927058770002e-10) : T(-2.12194440e-4);
      constexpr int terms = DOUBLE ? 11 : 5;
      const IV i = bits(mantissa);
      IV e = exponent + (i >> MANTISSA) - Int(BIAS - 1);
      V m = number((i & ((Int(1) << MANTISSA) - 1)) | (Int(BIAS - 1) << MANTISSA));
      const IV small = m < T(0.70710678118654752440);
      m = small ? m + m : m;
      e += small;  // a true comparison is -1
      const V s = (m - 1) / (m + 1), s2 = s * s;
      V p = V{} + T(2) / T(2 * terms + 1);
      for (int n = terms - 1; n >= 0; n--) p = p * s2 + T(2) / T(2 * n + 1);
      const V k = __builtin_convertvector(e, V);
      return k * high + (p * s + k * low) + wrong;
    }
  };

  static V log(V x) {
    Product product;
    product.times(x);
    return product.log();
  }

  // digamma(x) + … + digamma(x + N - 1) for x > 0: recurrence upward, then the asymptotic series at z >= 6 or 10.
  template <int N> static V digammas(V x) {
    constexpr int steps = std::max(N, DOUBLE ? 10 : 6), terms = DOUBLE ? 7 : 3;
    V passed = {};
    for (int i = 0; i < steps; i++) passed += T(std::min(i + 1, N)) / (x + T(i));
    const V z = x + T(steps), inverse = 1 / z, square = inverse * inverse;
    V series = {};
    for (int n = terms; n >= 1; n--) series = (series + T(bernoulli(n) / (2 * n))) * square;
    return T(N) * (log(z) - T(0.5) * inverse - series) - passed;
  }

  // The derivative of `digammas`.
  template <int N> static V trigammas(V x) {
    constexpr int steps = std::max(N, DOUBLE ? 10 : 6), terms = DOUBLE ? 7 : 3;
    V passed = {};
    for (int i = 0; i < steps; i++) {
      const V inverse = 1 / (x + T(i));
      passed += T(std::min(i + 1, N)) * inverse * inverse;
    }
    const V inverse = 1 / (x + T(steps)), square = inverse * inverse;
    V series = {};
    for (int n = terms; n >= 1; n--) series = (series + T(bernoulli(n))) * square;
    return T(N) * (inverse + T(0.5) * square + series * inverse) + passed;
  }

  // B_2n
  static constexpr double bernoulli(int n) {
    constexpr double numbers[] = {1.0 / 6, -1.0 / 30, 1.0 / 42, -1.0 / 30, 5.0 / 66, -691.0 / 2730, 7.0 / 6};
    return numbers[n - 1];
  }

  // sigmoid(z), sigmoid(-z), log sigmoid(z)
  struct Logistic { V on, off, log_on; };
  static Logistic logistic(V z) {
    const V e = exp(z > 0 ? -z : z);
    const V one = V{} + 1, share = one / (one + e), rest = e * share;
    const V u = one + e, log1p = u == one ? e : log(u) * e / (u - one);
    return {z > 0 ? share : rest, z > 0 ? rest : share, (z > 0 ? V{} : z) - log1p};
  }
};

// While one exists, numbers below the smallest normal one count as 0 on an x86 processor, which takes up to a
// hundred times as long for them. Densities of votes far from a parent give many.
class FlushDenormals {
#ifdef __SSE__
  static constexpr unsigned BOTH = 0x8040;  // of results and of operands
  const unsigned before = _mm_getcsr();

public:
  FlushDenormals() { _mm_setcsr(before | BOTH); }
  ~FlushDenormals() { _mm_setcsr(before); }
#endif
};
struct KeepDenormals { KeepDenormals() {} };

// Memory of one thread, in vectors.
template <typename V> struct Buffer {
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, std::free};
  V *data = nullptr;
  explicit Buffer(int64_t count) {
    const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(V) + 63) / 64 * 64;
    memory.reset(std::aligned_alloc(64, bytes));
    if (!memory) std::abort();
    data = static_cast<V *>(memory.get());
  }
  V &operator[](int64_t i) { return data[i]; }
};

}  // namespace
