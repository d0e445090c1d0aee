// How products become scores, and scores weights.
#ifndef KERAS_KVCACHE_DECODE_SCORES_H_
#define KERAS_KVCACHE_DECODE_SCORES_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "decode_vectors.h"

namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Bytes fetched for each score that becomes a weight: what memory gives meanwhile.
constexpr int64_t kAhead = 16;

// How products become scores.
struct Scoring {
  float soft_cap;      // 0 for none
  const float* table;  // (N, distances), what is added; null for none
  int64_t distances;
  const float* sink;   // (N,), null for none
};

// Where the queries of a row of the batch and the slots of a piece stand.
struct Positions {
  const int32_t* queries;  // (T,), null without a bias
  const int32_t* slots;    // (count,)
};

// What is added to the scores of one query.
struct Bias {
  const float* table;  // (distances,) of its head; null for none
  int32_t farthest;    // distances - 1
  int32_t position;    // the query's
  const int32_t* slots;

  static Bias Of(const Scoring& scoring, const Positions& positions, int64_t query_head,
                 int64_t token) {
    if (scoring.table == nullptr) return {};
    return {scoring.table + query_head * scoring.distances,
            static_cast<int32_t>(scoring.distances - 1), positions.queries[token],
            positions.slots};
  }

  Vector At(int64_t slot, int64_t lanes) const {
    IntVector distances = {};
    std::memcpy(&distances, slots + slot, lanes * sizeof(int32_t));
    distances = position - distances;
    distances = distances < 0 ? IntVector{} : distances;
    distances = distances > farthest ? IntVector{} + farthest : distances;
    Vector bias = {};
    for (int64_t lane = 0; lane < lanes; ++lane) bias[lane] = table[distances[lane]];
    return bias;
  }
};

// Products become weights: scaled (null: not), capped, biased, hidden and raised to
// powers of e. NaN among them is left in the total. A part of the values is fetched
// meanwhile.
void Softmax(float* scores, const float* key_scales, const float* value_scales,
             const uint8_t* mask, int64_t count, float soft_cap, const Bias& bias,
             float* maximum, float* total, Ahead* ahead) {
  const Vector hidden = Vector{} + kHidden;
  Vector maxima = hidden, sums = {};
  ForVectors(count, [&](int64_t slot, int64_t lanes) {
    Vector score = Load(scores + slot, lanes);
    if (key_scales != nullptr) score *= Load(key_scales + slot, lanes);
    if (soft_cap > 0) score = soft_cap * Tanh(score / soft_cap);
    if (bias.table != nullptr) score += bias.At(slot, lanes);
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

}  // namespace

#endif  // KERAS_KVCACHE_DECODE_SCORES_H_
