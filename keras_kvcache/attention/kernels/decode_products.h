// Products of queries with keys and of weights with values, layout by layout.
#ifndef KERAS_KVCACHE_DECODE_PRODUCTS_H_
#define KERAS_KVCACHE_DECODE_PRODUCTS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "decode_vectors.h"

namespace {

// Slots of a piece: small enough that its scores stay in a core's cache and that all
// cores find work early, large enough that handing it out costs nothing beside it.
constexpr int64_t kPiece = 512;
// Slots of a piece of a dense tensor, each with all heads.
constexpr int64_t kDensePiece = 64;

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

}  // namespace

#endif  // KERAS_KVCACHE_DECODE_PRODUCTS_H_
