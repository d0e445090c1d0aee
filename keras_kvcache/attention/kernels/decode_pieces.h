// The attention of one piece.
#ifndef KERAS_KVCACHE_DECODE_PIECES_H_
#define KERAS_KVCACHE_DECODE_PIECES_H_

#include <algorithm>
#include <cstdint>

#include "decode_operands.h"
#include "decode_products.h"
#include "decode_scores.h"

namespace {

// Slots of a dense tensor that are gone through head by head, while the next are
// fetched: as many as fit a core's nearest cache.
constexpr int64_t kDenseBlock = 8;

// The attention of one piece, not yet divided by the sum of weights, for the R
// queries of each of its heads.
struct Partial {
  float* maximum;  // (heads · R,), the largest score
  float* total;    // (heads · R,), the sum of exp(score - maximum)
  float* output;   // (heads · R, Hv), the sum of exp(score - maximum) · value
};

template <typename T>
void AttendHeadMajor(const Sizes& sizes, const Scoring& scoring, const float* queries,
                     const Piece& piece, float* scores, const Partial& partial) {
  const Segment& segment = *piece.segment;
  const int64_t slots = segment.tensor_slots;
  const int64_t slot = piece.pair * slots + piece.slot;  // among those of all heads
  const T* keys = static_cast<const T*>(segment.keys) +
                  piece.pair * sizes.head_dim * slots + piece.slot;
  const T* values = static_cast<const T*>(segment.values) + slot * sizes.value_dim;
  const bool coded = segment.key_scales != nullptr;
  ForQueries(sizes.queries, [&](int64_t query, auto count) {
    Score<count>(queries + query * sizes.head_dim, sizes.head_dim, keys, slots,
                 piece.count, scores + query * kPiece);
  });
  Ahead ahead(values, piece.count * sizes.value_dim * sizeof(T));
  for (int64_t query = 0; query < sizes.queries; ++query) {
    Softmax(scores + query * kPiece,
            coded ? segment.key_scales + slot : nullptr,
            coded ? segment.value_scales + slot : nullptr,
            piece.mask.Of(sizes, piece.head, query), piece.count, scoring.soft_cap,
            piece.BiasOf(sizes, scoring, piece.head, query), partial.maximum + query,
            partial.total + query, &ahead);
  }
  std::fill_n(partial.output, sizes.queries * sizes.value_dim, 0.0f);
  ForQueries(sizes.queries, [&](int64_t query, auto count) {
    Mix<count, kPiece>(scores + query * kPiece, values, sizes.value_dim, piece.count,
                      partial.output + query * sizes.value_dim, sizes.value_dim);
  });
  for (int64_t query = 0; query < sizes.queries; ++query) {
    MixAgain(scores + query * kPiece, values, sizes.value_dim, piece.count,
             partial.output + query * sizes.value_dim, sizes.value_dim);
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
void AttendDense(const Sizes& sizes, const Scoring& scoring, const float* queries,
                 const Piece& piece, float* scores, const Partial& partial) {
  const Segment& segment = *piece.segment;
  const int64_t heads = piece.heads, head_dim = sizes.head_dim;
  const int64_t width = heads * head_dim;
  const int64_t key_slot = piece.pair / heads * 2 * segment.tensor_slots +
                           segment.offset + piece.slot;
  const int64_t value_slot = key_slot + segment.tensor_slots;
  const T* keys = static_cast<const T*>(segment.keys) + key_slot * width;
  const T* values = static_cast<const T*>(segment.keys) + value_slot * width;
  ForBlocks(keys, width, piece.count, [&](const T* key, int64_t slot, int64_t slots) {
    for (int64_t head = 0; head < heads; ++head) {
      ForQueries(sizes.queries, [&](int64_t first, auto count) {
        const int64_t query = head * sizes.queries + first;
        ScoreDense<count>(queries + query * head_dim, head_dim, key + head * head_dim,
                         width, slots, scores + query * kDensePiece + slot);
      });
    }
  });
  Ahead ahead(values, piece.count * width * sizeof(T));
  for (int64_t query = 0; query < heads * sizes.queries; ++query) {
    const int64_t head = query / sizes.queries, of_head = query % sizes.queries;
    Softmax(scores + query * kDensePiece, nullptr, nullptr,
            piece.mask.Of(sizes, head, of_head), piece.count, scoring.soft_cap,
            piece.BiasOf(sizes, scoring, head, of_head), partial.maximum + query,
            partial.total + query, &ahead);
  }
  std::fill_n(partial.output, heads * sizes.queries * head_dim, 0.0f);
  ForBlocks(values, width, piece.count,
            [&](const T* value, int64_t slot, int64_t slots) {
    for (int64_t head = 0; head < heads; ++head) {
      ForQueries(sizes.queries, [&](int64_t first, auto count) {
        const int64_t query = head * sizes.queries + first;
        Mix<count, kDensePiece>(scores + query * kDensePiece + slot,
                                value + head * head_dim, width, slots,
                                partial.output + query * head_dim, head_dim);
      });
    }
  });
  for (int64_t query = 0; query < heads * sizes.queries; ++query) {
    MixAgain(scores + query * kDensePiece, values + query / sizes.queries * head_dim,
             width, piece.count, partial.output + query * head_dim, head_dim);
  }
}

template <typename T>
void AttendPieceOf(const Sizes& sizes, const Scoring& scoring, const float* queries,
                   const Piece& piece, float* scores, const Partial& partial) {
  if (piece.segment->is_dense) {
    return AttendDense<T>(sizes, scoring, queries, piece, scores, partial);
  }
  AttendHeadMajor<T>(sizes, scoring, queries, piece, scores, partial);
}

void AttendPiece(const Sizes& sizes, const Scoring& scoring, const float* queries,
                 const Piece& piece, float* scores, const Partial& partial) {
  const float* own = queries + piece.pair * sizes.queries * sizes.head_dim;
  switch (piece.segment->dtype) {
    case ffi::F32:
      return AttendPieceOf<float>(sizes, scoring, own, piece, scores, partial);
    case ffi::S8:
      return AttendHeadMajor<int8_t>(sizes, scoring, own, piece, scores, partial);
    default:  // BF16, or S16 for the bits of it
      return AttendPieceOf<BFloat16>(sizes, scoring, own, piece, scores, partial);
  }
}

}  // namespace

#endif  // KERAS_KVCACHE_DECODE_PIECES_H_
