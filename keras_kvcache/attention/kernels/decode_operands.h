// What the kernel is called with, and how it is cut into pieces.
#ifndef KERAS_KVCACHE_DECODE_OPERANDS_H_
#define KERAS_KVCACHE_DECODE_OPERANDS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#include "decode_products.h"
#include "decode_scores.h"

namespace {

namespace ffi = xla::ffi;

// What all pieces share. Queries are scaled.
struct Sizes {
  int64_t queries;    // R
  int64_t length;     // T
  int64_t head_dim;   // H
  int64_t value_dim;  // Hv

  // The query head of a query among the R of a key/value head.
  int64_t QueryHead(int64_t head, int64_t query) const {
    return head * (queries / length) + query / length;
  }
};

// A mask (1 | N, 1 | T, n) of one row of the batch, not 0 where a query may attend.
struct Mask {
  const uint8_t* data;
  int64_t head_stride, token_stride;  // 0 where the axis is 1

  const uint8_t* Of(const Sizes& sizes, int64_t head, int64_t query) const {
    return data + sizes.QueryHead(head, query) * head_stride +
           query % sizes.length * token_stride;
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
  int64_t offset;             // of the n among the S slots
  ffi::AnyBuffer mask;        // (1 | B, 1 | N, 1 | T, n)
  const int32_t* positions;   // (1 | B, n), null without a bias
  int64_t position_stride;    // 0 or n
};

// Slots of one key/value head, or of all K, that some query attends.
struct Piece {
  const Segment* segment;
  int64_t heads;  // 1 or K
  int64_t pair;   // the row's and the first of them, among the B·K
  int64_t head;   // the first of them among the K
  int64_t slot;   // the first in the segment
  int64_t count;
  Mask mask;
  Positions positions;

  Bias BiasOf(const Sizes& sizes, const Scoring& scoring, int64_t head,
              int64_t query) const {
    return Bias::Of(scoring, positions, sizes.QueryHead(head, query),
                    query % sizes.length);
  }
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
  for (int64_t query = 0; query < (same ? 1 : heads * sizes.queries); ++query) {
    const uint8_t* seen =
        mask.Of(sizes, first_head + query / sizes.queries, query % sizes.queries);
    begin = std::min(begin, FirstSeen(seen, count));
    end = std::max(end, LastSeen(seen, count));
  }
  return {std::min(begin, end), end};
}

// The segments of which an operation has the buffers: keys, values, each followed by
// scales if they are codes, and the mask; or the tensor of both and the mask.
ffi::ErrorOr<std::vector<Segment>> TakeSegments(ffi::RemainingArgs operands,
                                                ffi::Span<const int64_t> offsets,
                                                ffi::Span<const int64_t> dense,
                                                size_t* rest) {
  std::vector<Segment> segments;
  size_t next = 0;
  for (size_t number = 0; number < offsets.size(); ++number) {
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
    const bool is_dense = dense[number] != 0, is_coded = dtype == ffi::S8;
    const size_t half = is_coded ? 2 : 1, arrays = is_dense ? 1 : 2 * half;
    if ((is_dense && is_coded) || next + arrays >= operands.size()) {
      return ffi::Unexpected(ffi::Error::InvalidArgument("a segment isn't whole"));
    }
    const auto data = [&](size_t array) {
      return operands.get<ffi::AnyBuffer>(next + array)->untyped_data();
    };
    const auto scales = [&](size_t array) {
      return is_coded ? static_cast<const float*>(data(array)) : nullptr;
    };
    segments.push_back({dtype, is_dense, data(0), scales(1),
                        is_dense ? nullptr : data(half), scales(half + 1),
                        axes[is_dense ? 2 : 3], offsets[number],
                        *operands.get<ffi::AnyBuffer>(next + arrays), nullptr, 0});
    next += arrays + 1;
  }
  *rest = next;
  return segments;
}

// The scoring, whose operands come after those of the segments: the table of a bias,
// the positions of queries and those of each segment's slots; and the sink.
ffi::ErrorOr<Scoring> TakeScoring(ffi::RemainingArgs operands, size_t next,
                                  float soft_cap, bool has_bias, bool has_sink,
                                  std::vector<Segment>* segments,
                                  const int32_t** query_positions,
                                  int64_t* query_stride) {
  const size_t of_bias = has_bias ? 2 + segments->size() : 0;
  if (next + of_bias + has_sink != operands.size()) {
    return ffi::Unexpected(
        ffi::Error::InvalidArgument("operands of the scoring are missing"));
  }
  const auto take = [&] { return *operands.get<ffi::AnyBuffer>(next++); };
  Scoring scoring = {soft_cap, nullptr, 0, nullptr};
  if (has_bias) {
    const ffi::AnyBuffer table = take();
    scoring.table = static_cast<const float*>(table.untyped_data());
    scoring.distances = table.dimensions()[1];
    const ffi::AnyBuffer queries = take();
    *query_positions = static_cast<const int32_t*>(queries.untyped_data());
    *query_stride = queries.dimensions()[0] == 1 ? 0 : queries.dimensions()[1];
    for (Segment& segment : *segments) {
      const ffi::AnyBuffer slots = take();
      const auto axes = slots.dimensions();
      segment.positions = static_cast<const int32_t*>(slots.untyped_data());
      segment.position_stride = axes[0] == 1 ? 0 : axes[1];
    }
  }
  if (has_sink) scoring.sink = static_cast<const float*>(take().untyped_data());
  return scoring;
}

// Adds what is attended of a segment, a piece at a time.
void AddPieces(const Segment& segment, const int32_t* query_positions,
               int64_t query_stride, int64_t batch, int64_t heads, const Sizes& sizes,
               std::vector<Piece>* pieces) {
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
  for (int64_t pair = 0; pair < batch * heads; pair += together) {
    const int64_t head = pair % heads;
    for (int64_t number = 0; number < static_cast<int64_t>(seen.size()); ++number) {
      const int64_t first = number * most;
      Mask mask = {data + pair / heads * row_stride + first, head_stride,
                   token_stride};
      if (head == 0 || head_stride != 0) {
        seen[number] =
            SeenSlots(sizes, mask, head, together, std::min(most, slots - first));
      }
      const auto [begin, end] = seen[number];
      if (begin == end) continue;
      mask.data += begin;
      Positions positions = {};
      if (segment.positions != nullptr) {
        const int64_t row = pair / heads;
        positions = {query_positions + row * query_stride,
                     segment.positions + row * segment.position_stride + first + begin};
      }
      pieces->push_back({&segment, together, pair, head, first + begin, end - begin,
                         mask, positions});
    }
  }
}

}  // namespace

#endif  // KERAS_KVCACHE_DECODE_OPERANDS_H_
