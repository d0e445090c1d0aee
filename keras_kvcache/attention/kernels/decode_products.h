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

// Scores (Queries, count), kPiece apart, of queries (Queries, H) with keys (H, count),
// `stride` apart. Four numbers of the keys are read side by side, which are four long
// runs in memory, and sums are loaded and stored once for all four. The next four runs
// are fetched meanwhile, as a processor foresees no run before it began.
template <int Queries, typename T>
void Score(const float* queries, int64_t head_dim, const T* keys, int64_t stride,
           int64_t count, float* scores) {
  constexpr int64_t kPerLine = kLine / sizeof(T);
  for (int query = 0; query < Queries; ++query) {
    std::fill_n(scores + query * kPiece, count, 0.0f);
  }
  int64_t h = 0;
  for (; h + 4 <= head_dim; h += 4) {
    const T* key = keys + h * stride;
    // The last four have no next ones, and are there already.
    const T* next = h + 8 <= head_dim ? key + 4 * stride : key;
    ForVectors(count, [&](int64_t slot, int64_t lanes) {
      for (int run = 0; run < 4 && slot % kPerLine == 0; ++run) {
        __builtin_prefetch(next + run * stride + slot);
      }
      const Vector key0 = Load(key + slot, lanes);
      const Vector key1 = Load(key + stride + slot, lanes);
      const Vector key2 = Load(key + 2 * stride + slot, lanes);
      const Vector key3 = Load(key + 3 * stride + slot, lanes);
      for (int query = 0; query < Queries; ++query) {
        const float* q = queries + query * head_dim + h;
        float* sum = scores + query * kPiece + slot;
        Store(sum,
              Load(sum, lanes) + q[0] * key0 + q[1] * key1 + q[2] * key2 + q[3] * key3,
              lanes);
      }
    });
  }
  for (; h < head_dim; ++h) {
    ForVectors(count, [&](int64_t slot, int64_t lanes) {
      const Vector key = Load(keys + h * stride + slot, lanes);
      for (int query = 0; query < Queries; ++query) {
        float* sum = scores + query * kPiece + slot;
        Store(sum, Load(sum, lanes) + queries[query * head_dim + h] * key, lanes);
      }
    });
  }
}

// Scores (Queries, count), kDensePiece apart, of queries (Queries, H) with keys
// (count, H), `stride` apart.
template <int Queries, typename T>
void ScoreDense(const float* queries, int64_t head_dim, const T* keys, int64_t stride,
                int64_t count, float* scores) {
  for (int64_t slot = 0; slot < count; ++slot) {
    const T* key = keys + slot * stride;
    Vector sums[Queries] = {};
    ForVectors(head_dim, [&](int64_t h, int64_t lanes) {
      const Vector entries = Load(key + h, lanes);
      for (int query = 0; query < Queries; ++query) {
        sums[query] += Load(queries + query * head_dim + h, lanes) * entries;
      }
    });
    for (int query = 0; query < Queries; ++query) {
      scores[query * kDensePiece + slot] = Sum(sums[query]);
    }
  }
}

// Adds to columns of the sums (Queries, Hv) values (count, Hv), `stride` apart, with
// weights (Queries, count), `Apart` apart. The sums stay in registers meanwhile.
template <int Queries, int Vectors, int64_t Apart, typename T>
void MixColumns(const float* weights, const T* values, int64_t stride, int64_t count,
                float* output, int64_t value_dim, int64_t lanes) {
  Vector sums[Queries][Vectors] = {};
  for (int64_t slot = 0; slot < count; ++slot) {
    Vector value[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      value[v] = Load(values + slot * stride + v * kLanes, lanes);
    }
    for (int query = 0; query < Queries; ++query) {
      const float weight = weights[query * Apart + slot];
      for (int v = 0; v < Vectors; ++v) sums[query][v] += weight * value[v];
    }
  }
  for (int query = 0; query < Queries; ++query) {
    for (int v = 0; v < Vectors; ++v) {
      float* sum = output + query * value_dim + v * kLanes;
      Store(sum, Load(sum, lanes) + sums[query][v], lanes);
    }
  }
}

template <int Queries, int64_t Apart, typename T>
void Mix(const float* weights, const T* values, int64_t stride, int64_t count,
         float* output, int64_t value_dim) {
  int64_t column = 0;
  for (; column + 4 * kLanes <= value_dim; column += 4 * kLanes) {
    MixColumns<Queries, 4, Apart>(weights, values + column, stride, count,
                               output + column, value_dim, kLanes);
  }
  ForVectors(value_dim - column, [&](int64_t first, int64_t lanes) {
    MixColumns<Queries, 1, Apart>(weights, values + column + first, stride, count,
                               output + column + first, value_dim, lanes);
  });
}

// Computes the sums (Hv) of `Mix` for one query again if they aren't finite: a slot of
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
