// Attention of few queries over the slots of a cache, on a CPU.
//
// A decode step reads every filled slot once and computes little with it. So all
// cores should read, in long runs, and nothing but what is attended. The slots are
// cut into pieces, each is attended by itself, and the pieces are merged by their
// maxima and sums: flash decoding (Dao et al., 2023,
// https://pytorch.org/blog/flash-decoding/) with the online softmax of Milakov and
// Gimelshein (2018, https://arxiv.org/abs/1805.02867).
//
// B batch, N query heads, K key/value heads, T query tokens, R = N / K * T queries
// that share a key/value head, H and Hv sizes of a key and a value, n slots.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Slots of a piece: small enough that its scores stay in a core's cache and that all
// cores find work early, large enough that handing it out costs nothing beside it.
constexpr int64_t kPiece = 512;
// Slots of a piece of a dense tensor, each with all heads.
constexpr int64_t kDensePiece = 64;
// Slots of a dense tensor that are gone through head by head, while the next are
// fetched: as many as fit a core's nearest cache.
constexpr int64_t kDenseBlock = 8;

constexpr int64_t kLine = 64;  // bytes that memory gives at a time
// Bytes fetched for each score that becomes a weight: what memory gives meanwhile.
constexpr int64_t kAhead = 16;

constexpr float kHidden = -std::numeric_limits<float>::infinity();

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

// Calls `body(first, count)` for all rows, of which it gets up to four at a time,
// their count known to the compiler, so that sums for all of them fit registers.
template <typename Body>
inline void ForRows(int64_t rows, Body body) {
  int64_t first = 0;
  for (; first + 4 <= rows; first += 4) {
    body(first, std::integral_constant<int, 4>());
  }
  if (rows - first == 3) body(first, std::integral_constant<int, 3>());
  if (rows - first == 2) body(first, std::integral_constant<int, 2>());
  if (rows - first == 1) body(first, std::integral_constant<int, 1>());
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

// Scores (Rows, count), kPiece apart, of queries (Rows, H) with keys (H, count),
// `stride` apart. Keys are read four rows side by side, which makes four long runs
// in memory, and the sums are loaded and stored for every fourth row only. The next
// four runs are fetched meanwhile, as a processor foresees no run before it began.
template <int Rows, typename T>
void Score(const float* query, int64_t head_dim, const T* keys, int64_t stride,
           int64_t count, float* scores) {
  constexpr int64_t kPerLine = kLine / sizeof(T);
  for (int row = 0; row < Rows; ++row) {
    std::fill_n(scores + row * kPiece, count, 0.0f);
  }
  int64_t h = 0;
  for (; h + 4 <= head_dim; h += 4) {
    const T* key = keys + h * stride;
    // The last four have no next ones, and are there already.
    const T* next = h + 8 <= head_dim ? key + 4 * stride : key;
    ForVectors(count, [&](int64_t slot, int64_t lanes) {
      for (int row = 0; row < 4 && slot % kPerLine == 0; ++row) {
        __builtin_prefetch(next + row * stride + slot);
      }
      const Vector key0 = Load(key + slot, lanes);
      const Vector key1 = Load(key + stride + slot, lanes);
      const Vector key2 = Load(key + 2 * stride + slot, lanes);
      const Vector key3 = Load(key + 3 * stride + slot, lanes);
      for (int row = 0; row < Rows; ++row) {
        const float* q = query + row * head_dim + h;
        float* sum = scores + row * kPiece + slot;
        Store(sum,
              Load(sum, lanes) + q[0] * key0 + q[1] * key1 + q[2] * key2 + q[3] * key3,
              lanes);
      }
    });
  }
  for (; h < head_dim; ++h) {
    ForVectors(count, [&](int64_t slot, int64_t lanes) {
      const Vector key = Load(keys + h * stride + slot, lanes);
      for (int row = 0; row < Rows; ++row) {
        float* sum = scores + row * kPiece + slot;
        Store(sum, Load(sum, lanes) + query[row * head_dim + h] * key, lanes);
      }
    });
  }
}

// Scores (Rows, count), kDensePiece apart, of queries (Rows, H) with keys (count, H),
// `stride` apart.
template <int Rows, typename T>
void ScoreDense(const float* query, int64_t head_dim, const T* keys, int64_t stride,
                int64_t count, float* scores) {
  for (int64_t slot = 0; slot < count; ++slot) {
    const T* key = keys + slot * stride;
    Vector sums[Rows] = {};
    ForVectors(head_dim, [&](int64_t h, int64_t lanes) {
      const Vector entries = Load(key + h, lanes);
      for (int row = 0; row < Rows; ++row) {
        sums[row] += Load(query + row * head_dim + h, lanes) * entries;
      }
    });
    for (int row = 0; row < Rows; ++row) {
      scores[row * kDensePiece + slot] = Sum(sums[row]);
    }
  }
}

// Adds to columns of the sums (Rows, Hv) values (count, Hv), `stride` apart, with
// weights (Rows, count), `Apart` apart. The sums stay in registers meanwhile.
template <int Rows, int Vectors, int64_t Apart, typename T>
void MixColumns(const float* weights, const T* values, int64_t stride, int64_t count,
                float* output, int64_t value_dim, int64_t lanes) {
  Vector sums[Rows][Vectors] = {};
  for (int64_t slot = 0; slot < count; ++slot) {
    Vector value[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      value[v] = Load(values + slot * stride + v * kLanes, lanes);
    }
    for (int row = 0; row < Rows; ++row) {
      const float weight = weights[row * Apart + slot];
      for (int v = 0; v < Vectors; ++v) sums[row][v] += weight * value[v];
    }
  }
  for (int row = 0; row < Rows; ++row) {
    for (int v = 0; v < Vectors; ++v) {
      float* sum = output + row * value_dim + v * kLanes;
      Store(sum, Load(sum, lanes) + sums[row][v], lanes);
    }
  }
}

template <int Rows, int64_t Apart, typename T>
void Mix(const float* weights, const T* values, int64_t stride, int64_t count,
         float* output, int64_t value_dim) {
  int64_t column = 0;
  for (; column + 4 * kLanes <= value_dim; column += 4 * kLanes) {
    MixColumns<Rows, 4, Apart>(weights, values + column, stride, count,
                               output + column, value_dim, kLanes);
  }
  ForVectors(value_dim - column, [&](int64_t first, int64_t lanes) {
    MixColumns<Rows, 1, Apart>(weights, values + column + first, stride, count,
                               output + column + first, value_dim, lanes);
  });
}

// Computes the sums (Hv) of `Mix` for one row again if they aren't finite: a slot of
// weight 0 may hold NaN or infinity, and 0 times that is NaN.
template <typename T>
void MixAgain(const float* weights, const T* values, int64_t stride, int64_t count,
              float* output, int64_t value_dim) {
  const auto is_finite = [](float number) { return std::isfinite(number); };
  if (std::all_of(output, output + value_dim, is_finite)) return;
  std::fill_n(output, value_dim, 0.0f);
  for (int64_t slot = 0; slot < count; ++slot) {
    if (weights[slot] == 0.0f) continue;
    Mix<1, 0>(weights + slot, values + slot * stride, stride, 1, output, value_dim);
  }
}

// What all pieces share. Queries are scaled.
struct Sizes {
  int64_t rows;       // R
  int64_t length;     // T
  int64_t head_dim;   // H
  int64_t value_dim;  // Hv
  float soft_cap;     // 0 for none
};

// A mask (1 | N, 1 | T, n) of one row of the batch, not 0 where a query may attend.
struct Mask {
  const uint8_t* data;
  int64_t head_stride, token_stride;  // 0 where the axis is 1

  const uint8_t* Of(const Sizes& sizes, int64_t head, int64_t row) const {
    const int64_t query_head = head * (sizes.rows / sizes.length) + row / sizes.length;
    return data + query_head * head_stride + row % sizes.length * token_stride;
  }
};

// The buffers of a segment. What entries are is known by `dtype` alone. A dense one
// is some slots of a tensor that has the keys and the values of all heads, H = Hv.
struct Segment {
  ffi::DataType dtype;
  bool is_dense;
  const void* keys;           // (B, K, H, n), or all of (B, 2, S, K, H)
  const float* key_scales;    // (B, K, 1, n); null without codes, as if dense
  const void* values;         // (B, K, n, Hv); unused if dense
  const float* value_scales;  // (B, K, n, 1); null without codes
  int64_t tensor_slots;       // n or S
  int64_t start;              // of the n among the S slots
  ffi::AnyBuffer mask;        // (1 | B, 1 | N, 1 | T, n)
};

// Slots of one key/value head, or of all K, that some query attends.
struct Piece {
  const Segment* segment;
  int64_t heads;  // 1 or K
  int64_t group;  // the first of them among the B·K
  int64_t head;   // the first of them among the K
  int64_t slot;   // the first in the segment
  int64_t count;
  Mask mask;
};

// The attention of one piece, not yet divided by the sum of weights, for the R
// queries of each of its heads.
struct Partial {
  float* maximum;  // (heads · R,), the largest score
  float* total;    // (heads · R,), the sum of exp(score - maximum)
  float* output;   // (heads · R, Hv), the sum of exp(score - maximum) · value
};

// Scores become weights: scaled (null: not), capped, hidden and raised to powers of e.
// NaN among them is left in the total. A part of the values is fetched meanwhile.
void Softmax(float* scores, const float* key_scales, const float* value_scales,
             const uint8_t* mask, int64_t count, float soft_cap, float* maximum,
             float* total, Ahead* ahead) {
  const Vector hidden = Vector{} + kHidden;
  Vector maxima = hidden, sums = {};
  ForVectors(count, [&](int64_t slot, int64_t lanes) {
    Vector score = Load(scores + slot, lanes);
    if (key_scales != nullptr) score *= Load(key_scales + slot, lanes);
    if (soft_cap > 0) score = soft_cap * Tanh(score / soft_cap);
    // Not 0 where seen, 0 in lanes past the last slot.
    const Vector seen = Load(reinterpret_cast<const int8_t*>(mask) + slot, lanes);
    score = seen != 0.0f ? score : hidden;
    maxima = score > maxima ? score : maxima;
    Store(scores + slot, score, lanes);
  });
  *maximum = kHidden;
  for (int lane = 0; lane < kLanes; ++lane) *maximum = std::max(*maximum, maxima[lane]);
  // Where all is hidden any number does: no weight is left.
  const float origin = *maximum == kHidden ? 0.0f : *maximum;
  ForVectors(count, [&](int64_t slot, int64_t lanes) {
    ahead->Fetch(kAhead * lanes);
    Vector score = hidden;
    std::memcpy(&score, scores + slot, lanes * sizeof(float));
    const Vector weight = Exp(score - origin);
    Store(scores + slot, weight, lanes);
    sums += weight;
  });
  *total = Sum(sums);
  if (value_scales == nullptr) return;
  ForVectors(count, [&](int64_t slot, int64_t lanes) {
    const Vector weight = Load(scores + slot, lanes);
    // A slot of weight 0 may have any scale, NaN too.
    Store(scores + slot,
          weight != 0.0f ? weight * Load(value_scales + slot, lanes) : Vector{}, lanes);
  });
}

template <typename T>
void AttendHeadMajor(const Sizes& sizes, const float* query, const Piece& piece,
                     float* scores, const Partial& partial) {
  const Segment& segment = *piece.segment;
  const int64_t slots = segment.tensor_slots;
  const int64_t slot = piece.group * slots + piece.slot;  // among those of all heads
  const T* keys = static_cast<const T*>(segment.keys) +
                  piece.group * sizes.head_dim * slots + piece.slot;
  const T* values = static_cast<const T*>(segment.values) + slot * sizes.value_dim;
  const bool coded = segment.key_scales != nullptr;
  ForRows(sizes.rows, [&](int64_t row, auto rows) {
    Score<rows>(query + row * sizes.head_dim, sizes.head_dim, keys, slots, piece.count,
                scores + row * kPiece);
  });
  Ahead ahead(values, piece.count * sizes.value_dim * sizeof(T));
  for (int64_t row = 0; row < sizes.rows; ++row) {
    Softmax(scores + row * kPiece,
            coded ? segment.key_scales + slot : nullptr,
            coded ? segment.value_scales + slot : nullptr,
            piece.mask.Of(sizes, piece.head, row), piece.count, sizes.soft_cap,
            partial.maximum + row, partial.total + row, &ahead);
  }
  std::fill_n(partial.output, sizes.rows * sizes.value_dim, 0.0f);
  ForRows(sizes.rows, [&](int64_t row, auto rows) {
    Mix<rows, kPiece>(scores + row * kPiece, values, sizes.value_dim, piece.count,
                      partial.output + row * sizes.value_dim, sizes.value_dim);
  });
  for (int64_t row = 0; row < sizes.rows; ++row) {
    MixAgain(scores + row * kPiece, values, sizes.value_dim, piece.count,
             partial.output + row * sizes.value_dim, sizes.value_dim);
  }
}

// Calls `body(entries, slot, slots)` for blocks of slots, `width` entries each, while
// the next block is fetched: heads are not gone through in the order of memory, which
// alone a processor foresees.
template <typename T, typename Body>
void ForBlocks(const T* entries, int64_t width, int64_t count, Body body) {
  for (int64_t slot = 0; slot < count; slot += kDenseBlock) {
    const int64_t slots = std::min(kDenseBlock, count - slot);
    const T* block = entries + slot * width;
    const int64_t ahead = std::min(kDenseBlock, count - slot - slots) * width;
    Ahead(block + slots * width, ahead * sizeof(T)).Fetch(ahead * sizeof(T));
    body(block, slot, slots);
  }
}

template <typename T>
void AttendDense(const Sizes& sizes, const float* query, const Piece& piece,
                 float* scores, const Partial& partial) {
  const Segment& segment = *piece.segment;
  const int64_t heads = piece.heads, head_dim = sizes.head_dim;
  const int64_t width = heads * head_dim;
  const int64_t key_slot = piece.group / heads * 2 * segment.tensor_slots +
                           segment.start + piece.slot;
  const int64_t value_slot = key_slot + segment.tensor_slots;
  const T* keys = static_cast<const T*>(segment.keys) + key_slot * width;
  const T* values = static_cast<const T*>(segment.keys) + value_slot * width;
  ForBlocks(keys, width, piece.count, [&](const T* key, int64_t slot, int64_t slots) {
    for (int64_t head = 0; head < heads; ++head) {
      ForRows(sizes.rows, [&](int64_t first, auto rows) {
        const int64_t row = head * sizes.rows + first;
        ScoreDense<rows>(query + row * head_dim, head_dim, key + head * head_dim,
                         width, slots, scores + row * kDensePiece + slot);
      });
    }
  });
  Ahead ahead(values, piece.count * width * sizeof(T));
  for (int64_t row = 0; row < heads * sizes.rows; ++row) {
    Softmax(scores + row * kDensePiece, nullptr, nullptr,
            piece.mask.Of(sizes, row / sizes.rows, row % sizes.rows), piece.count,
            sizes.soft_cap, partial.maximum + row, partial.total + row, &ahead);
  }
  std::fill_n(partial.output, heads * sizes.rows * head_dim, 0.0f);
  ForBlocks(values, width, piece.count,
            [&](const T* value, int64_t slot, int64_t slots) {
    for (int64_t head = 0; head < heads; ++head) {
      ForRows(sizes.rows, [&](int64_t first, auto rows) {
        const int64_t row = head * sizes.rows + first;
        Mix<rows, kDensePiece>(scores + row * kDensePiece + slot,
                               value + head * head_dim, width, slots,
                               partial.output + row * head_dim, head_dim);
      });
    }
  });
  for (int64_t row = 0; row < heads * sizes.rows; ++row) {
    MixAgain(scores + row * kDensePiece, values + row / sizes.rows * head_dim, width,
             piece.count, partial.output + row * head_dim, head_dim);
  }
}

template <typename T>
void AttendPieceOf(const Sizes& sizes, const float* query, const Piece& piece,
                   float* scores, const Partial& partial) {
  if (piece.segment->is_dense) {
    return AttendDense<T>(sizes, query, piece, scores, partial);
  }
  AttendHeadMajor<T>(sizes, query, piece, scores, partial);
}

void AttendPiece(const Sizes& sizes, const float* queries, const Piece& piece,
                 float* scores, const Partial& partial) {
  const float* query = queries + piece.group * sizes.rows * sizes.head_dim;
  switch (piece.segment->dtype) {
    case ffi::F32:
      return AttendPieceOf<float>(sizes, query, piece, scores, partial);
    case ffi::S8:
      return AttendHeadMajor<int8_t>(sizes, query, piece, scores, partial);
    default:  // BF16, or S16 for the bits of it
      return AttendPieceOf<BFloat16>(sizes, query, piece, scores, partial);
  }
}

// Pieces that threads take one after another until none is left.
class Work {
 public:
  Work(Sizes sizes, const float* queries, std::vector<Piece> pieces)
      : sizes_(sizes),
        queries_(queries),
        pieces_(std::move(pieces)),
        rows_(sizes.rows * MostHeads(pieces_)),
        partials_(new float[pieces_.size() * rows_ * (2 + sizes.value_dim)]) {}

  int64_t size() const { return pieces_.size(); }

  void Run() {
    std::vector<float> scores;
    for (int64_t number; (number = next_.fetch_add(1)) < size();) {
      scores.resize(rows_ * kPiece);
      AttendPiece(sizes_, queries_, pieces_[number], scores.data(), PartialOf(number));
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  // To be called after `Run`: others can be within their last piece only.
  void Wait() const {
    while (done_.load(std::memory_order_acquire) < size()) std::this_thread::yield();
  }

  // Writes the output (groups, R, Hv); zero for a query with nothing to attend.
  void Merge(int64_t groups, float* output) {
    const int64_t width = sizes_.value_dim;
    std::vector<float> maxima(groups * sizes_.rows, kHidden);
    std::vector<float> totals(groups * sizes_.rows, 0.0f);
    std::fill_n(output, groups * sizes_.rows * width, 0.0f);
    ForPartials([&](const Partial& partial, int64_t row, int64_t query) {
      maxima[query] = std::max(maxima[query], partial.maximum[row]);
    });
    ForPartials([&](const Partial& partial, int64_t row, int64_t query) {
      if (partial.total[row] == 0) return;
      const float factor = std::exp(partial.maximum[row] - maxima[query]);
      totals[query] += factor * partial.total[row];
      for (int64_t column = 0; column < width; ++column) {
        output[query * width + column] += factor * partial.output[row * width + column];
      }
    });
    for (size_t query = 0; query < totals.size(); ++query) {
      if (totals[query] == 0) continue;
      for (int64_t column = 0; column < width; ++column) {
        output[query * width + column] /= totals[query];
      }
    }
  }

 private:
  static int64_t MostHeads(const std::vector<Piece>& pieces) {
    int64_t most = 0;
    for (const Piece& piece : pieces) most = std::max(most, piece.heads);
    return most;
  }

  Partial PartialOf(int64_t number) {
    float* data = partials_.get() + number * rows_ * (2 + sizes_.value_dim);
    return {data, data + rows_, data + 2 * rows_};
  }

  template <typename Body>
  void ForPartials(Body body) {
    for (int64_t number = 0; number < size(); ++number) {
      const Piece& piece = pieces_[number];
      for (int64_t row = 0; row < piece.heads * sizes_.rows; ++row) {
        body(PartialOf(number), row, piece.group * sizes_.rows + row);
      }
    }
  }

  const Sizes sizes_;
  const float* const queries_;  // (groups, R, H)
  const std::vector<Piece> pieces_;
  const int64_t rows_;  // of the largest partial
  const std::unique_ptr<float[]> partials_;  // whole once all pieces are attended
  std::atomic<int64_t> next_{0}, done_{0};
};

// The first of `count` bytes that isn't 0, eight at a time; `count` if there is none.
int64_t FirstSeen(const uint8_t* seen, int64_t count) {
  int64_t slot = 0;
  for (uint64_t eight; slot + 8 <= count; slot += 8) {
    std::memcpy(&eight, seen + slot, 8);
    if (eight != 0) break;
  }
  while (slot < count && !seen[slot]) ++slot;
  return slot;
}

// The same for the end: past the last byte that isn't 0; 0 if there is none.
int64_t LastSeen(const uint8_t* seen, int64_t count) {
  int64_t slot = count;
  for (uint64_t eight; slot >= 8; slot -= 8) {
    std::memcpy(&eight, seen + slot - 8, 8);
    if (eight != 0) break;
  }
  while (slot > 0 && !seen[slot - 1]) --slot;
  return slot;
}

// Which of `count` slots any query of some heads may attend, from the first to past
// the last; both equal if there is none.
std::pair<int64_t, int64_t> SeenSlots(const Sizes& sizes, const Mask& mask,
                                      int64_t first_head, int64_t heads,
                                      int64_t count) {
  int64_t begin = count, end = 0;
  const bool same = mask.head_stride == 0 && mask.token_stride == 0;
  for (int64_t row = 0; row < (same ? 1 : heads * sizes.rows); ++row) {
    const uint8_t* seen =
        mask.Of(sizes, first_head + row / sizes.rows, row % sizes.rows);
    begin = std::min(begin, FirstSeen(seen, count));
    end = std::max(end, LastSeen(seen, count));
  }
  return {std::min(begin, end), end};
}

// The segments of which an operation has the buffers: keys, values, each followed by
// scales if they are codes, and the mask; or the tensor of both and the mask.
ffi::ErrorOr<std::vector<Segment>> TakeSegments(ffi::RemainingArgs operands,
                                                ffi::Span<const int64_t> starts) {
  std::vector<Segment> segments;
  size_t next = 0;
  for (const int64_t start : starts) {
    const auto keys = operands.get<ffi::AnyBuffer>(next);
    if (!keys.has_value()) return ffi::Unexpected(keys.error());
    const auto dtype = keys->element_type();
    // Some hold bfloat16 as whole numbers of its bits.
    if (dtype != ffi::F32 && dtype != ffi::S8 && dtype != ffi::BF16 &&
        dtype != ffi::S16) {
      return ffi::Unexpected(
          ffi::Error::InvalidArgument("keys must be float32, bfloat16 or int8"));
    }
    const auto axes = keys->dimensions();
    const bool is_dense = axes.size() == 5, is_coded = dtype == ffi::S8;
    const size_t half = is_coded ? 2 : 1, arrays = is_dense ? 1 : 2 * half;
    if ((is_dense && is_coded) || next + arrays >= operands.size()) {
      return ffi::Unexpected(ffi::Error::InvalidArgument("a segment isn't whole"));
    }
    const auto data = [&](size_t number) {
      return operands.get<ffi::AnyBuffer>(next + number)->untyped_data();
    };
    const auto scales = [&](size_t number) {
      return is_coded ? static_cast<const float*>(data(number)) : nullptr;
    };
    segments.push_back({dtype, is_dense, data(0), scales(1),
                        is_dense ? nullptr : data(half), scales(half + 1),
                        axes[is_dense ? 2 : 3], start,
                        *operands.get<ffi::AnyBuffer>(next + arrays)});
    next += arrays + 1;
  }
  return segments;
}

// Adds what is attended of a segment, a piece at a time.
void AddPieces(const Segment& segment, int64_t batch, int64_t heads,
               const Sizes& sizes, std::vector<Piece>* pieces) {
  const auto axes = segment.mask.dimensions();
  const int64_t slots = axes[3];
  const int64_t token_stride = axes[2] == 1 ? 0 : slots;
  const int64_t head_stride = axes[1] == 1 ? 0 : axes[2] * slots;
  const int64_t row_stride = axes[0] == 1 ? 0 : axes[1] * axes[2] * slots;
  const auto* data = static_cast<const uint8_t*>(segment.mask.untyped_data());
  const int64_t together = segment.is_dense ? heads : 1;
  const int64_t most = segment.is_dense ? kDensePiece : kPiece;
  // What is seen of each `most` slots, for all heads where they have one mask.
  std::vector<std::pair<int64_t, int64_t>> seen((slots + most - 1) / most);
  for (int64_t group = 0; group < batch * heads; group += together) {
    const int64_t head = group % heads;
    for (int64_t number = 0; number < static_cast<int64_t>(seen.size()); ++number) {
      const int64_t first = number * most;
      Mask mask = {data + group / heads * row_stride + first, head_stride,
                   token_stride};
      if (head == 0 || head_stride != 0) {
        seen[number] =
            SeenSlots(sizes, mask, head, together, std::min(most, slots - first));
      }
      const auto [begin, end] = seen[number];
      if (begin == end) continue;
      mask.data += begin;
      pieces->push_back(
          {&segment, together, group, head, first + begin, end - begin, mask});
    }
  }
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query,
                  ffi::RemainingArgs operands, ffi::ResultBuffer<ffi::F32> output,
                  ffi::Span<const int64_t> starts, int64_t length,
                  float soft_cap) {
  const auto shape = query.dimensions();
  const int64_t batch = shape[0], heads = shape[1];
  const Sizes sizes = {shape[2], length, shape[3], output->dimensions()[3], soft_cap};
  const auto segments = TakeSegments(operands, starts);
  if (!segments.has_value()) return segments.error();
  std::vector<Piece> pieces;
  for (const Segment& segment : *segments) {
    AddPieces(segment, batch, heads, sizes, &pieces);
  }
  // A thread that comes late may find this call returned and its buffers gone: it
  // touches what `Run` needs to see that no piece is left, and no more.
  const auto work =
      std::make_shared<Work>(sizes, query.typed_data(), std::move(pieces));
  const int64_t threads = std::min<int64_t>(pool.num_threads(), work->size());
  for (int64_t thread = 1; thread < threads; ++thread) {
    pool.Schedule([work] { work->Run(); });
  }
  work->Run();
  work->Wait();
  work->Merge(batch * heads, output->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DecodeAttention, Attend,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::Buffer<ffi::F32>>()               // query, (B, K, R, H)
        .RemainingArgs()                            // `Segment` after `Segment`
        .Ret<ffi::Buffer<ffi::F32>>()               // (B, K, R, Hv)
        .Attr<ffi::Span<const int64_t>>("starts")   // one a segment
        .Attr<int64_t>("length")                    // T
        .Attr<float>("soft_cap"));                  // 0 for none
