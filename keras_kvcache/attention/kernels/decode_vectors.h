// Vectors of floats as wide as the processor's, and what is computed with them.
#ifndef KERAS_KVCACHE_DECODE_VECTORS_H_
#define KERAS_KVCACHE_DECODE_VECTORS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

constexpr int64_t kLine = 64;  // bytes that memory gives at a time

// Floats of a vector as wide as the processor's, as far as the flags tell.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kLanes)));

// What slots may hold, each with a vector of it and the way to a vector of floats.
template <typename T>
struct Element;

template <>
struct Element<float> {
  typedef Vector Lanes;
  static Vector Widen(Lanes lanes) { return lanes; }
};

template <>
struct Element<int8_t> {
  typedef int8_t Lanes __attribute__((vector_size(kLanes)));
  typedef int16_t Wider __attribute__((vector_size(2 * kLanes)));
  static Vector Widen(Lanes lanes) {
    // By way of int16, as GCC 12 would else take the lanes one by one.
    const Wider wider = __builtin_convertvector(lanes, Wider);
    return __builtin_convertvector(__builtin_convertvector(wider, IntVector), Vector);
  }
};

struct BFloat16 {
  uint16_t bits;  // the upper half of a float's
};

template <>
struct Element<BFloat16> {
  typedef uint16_t Lanes __attribute__((vector_size(2 * kLanes)));
  static Vector Widen(Lanes lanes) {
    const IntVector bits = __builtin_convertvector(lanes, IntVector) << 16;
    Vector vector;
    std::memcpy(&vector, &bits, sizeof bits);
    return vector;
  }
};

template <typename T>
inline Vector Load(const T* from, int64_t lanes = kLanes) {
  typename Element<T>::Lanes loaded = {};
  std::memcpy(&loaded, from, lanes * sizeof(T));
  return Element<T>::Widen(loaded);
}

inline void Store(float* to, Vector vector, int64_t lanes = kLanes) {
  std::memcpy(to, &vector, lanes * sizeof(float));
}

// The sum of a vector's lanes. Not inlined: GCC would keep what is summed in memory
// from the start, as only there it finds halves of vectors.
__attribute__((noinline)) float Sum(Vector vector) {
  typedef float Quarter __attribute__((vector_size(16)));
  Quarter quarters[kLanes / 4];
  std::memcpy(quarters, &vector, sizeof vector);
  for (int64_t half = kLanes / 8; half > 0; half /= 2) {
    for (int64_t quarter = 0; quarter < half; ++quarter) {
      quarters[quarter] += quarters[quarter + half];
    }
  }
  const Quarter sums = quarters[0];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// Calls `body(first, lanes)` for all of `width` numbers, a vector at a time.
template <typename Body>
inline void ForVectors(int64_t width, Body body) {
  int64_t first = 0;
  for (; first + kLanes <= width; first += kLanes) body(first, kLanes);
  if (first < width) body(first, width - first);
}

// Calls `body(first, count)` for all queries, of which it gets up to four at a time,
// their count known to the compiler, so that sums for all of them fit registers.
template <typename Body>
inline void ForQueries(int64_t queries, Body body) {
  int64_t first = 0;
  for (; first + 4 <= queries; first += 4) {
    body(first, std::integral_constant<int, 4>());
  }
  if (queries - first == 3) body(first, std::integral_constant<int, 3>());
  if (queries - first == 2) body(first, std::integral_constant<int, 2>());
  if (queries - first == 1) body(first, std::integral_constant<int, 1>());
}

// e to the power of x; 0 below -87, where float32 ends. For x up to 0 only, or
// little more. Two parts of ln 2 keep the remainder exact, and its power is a
// polynomial (Cephes' expf, https://netlib.org/cephes).
inline Vector Exp(Vector x) {
  const auto ends = x < -87.0f;
  x = ends ? Vector{} : x;
  const IntVector exponent = __builtin_convertvector(x * 1.44269504f - 0.5f, IntVector);
  const Vector whole = __builtin_convertvector(exponent, Vector);
  const Vector rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vector power = 1.9875691500e-4f * rest + 1.3981999507e-3f;
  power = power * rest + 8.3334519073e-3f;
  power = power * rest + 4.1665795894e-2f;
  power = power * rest + 1.6666665459e-1f;
  power = power * rest + 5.0000001201e-1f;
  power = power * rest * rest + rest + 1.0f;
  const IntVector bits = (exponent + 127) << 23;
  Vector two_to_whole;
  std::memcpy(&two_to_whole, &bits, sizeof bits);
  return ends ? Vector{} : power * two_to_whole;
}

inline Vector Tanh(Vector x) {
  const Vector power = Exp(-2.0f * (x < 0.0f ? -x : x));
  const Vector tanh = (1.0f - power) / (1.0f + power);
  return x < 0.0f ? -tanh : tanh;
}

// What is read next, of which a few lines at a time are fetched while the processor
// computes: it would else read nothing meanwhile.
class Ahead {
 public:
  Ahead(const void* begin, int64_t bytes)
      : next_(static_cast<const char*>(begin)), end_(next_ + bytes) {}

  void Fetch(int64_t bytes) {
    const char* until = std::min(next_ + bytes, end_);
    for (; next_ < until; next_ += kLine) __builtin_prefetch(next_);
  }

 private:
  const char* next_;
  const char* const end_;
};

}  // namespace

#endif  // KERAS_KVCACHE_DECODE_VECTORS_H_
