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
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "decode_pieces.h"

namespace {

// Pieces that threads take one after another until none is left.
class Work {
 public:
  Work(Sizes sizes, Scoring scoring, const float* queries, std::vector<Piece> pieces)
      : sizes_(sizes),
        scoring_(scoring),
        queries_(queries),
        pieces_(std::move(pieces)),
        most_queries_(sizes.queries * MostHeads(pieces_)),
        partials_(new float[pieces_.size() * most_queries_ * (2 + sizes.value_dim)]) {}

  int64_t size() const { return pieces_.size(); }

  void Run() {
    std::vector<float> scores;
    for (int64_t number; (number = next_.fetch_add(1)) < size();) {
      scores.resize(most_queries_ * kPiece);
      AttendPiece(sizes_, scoring_, queries_, pieces_[number], scores.data(),
                  PartialOf(number));
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  // To be called after `Run`: others can be within their last piece only.
  void Wait() const {
    while (done_.load(std::memory_order_acquire) < size()) std::this_thread::yield();
  }

  // Writes the output (B·K, R, Hv); zero for a query with nothing to attend. A sink is
  // what the sums begin with.
  void Merge(int64_t batch, int64_t heads, float* output) {
    const int64_t width = sizes_.value_dim, queries = batch * heads * sizes_.queries;
    std::vector<float> maxima(queries, kHidden), totals(queries, 0.0f);
    const auto sink_of = [&](int64_t query) {
      const int64_t head = query / sizes_.queries % heads;
      return scoring_.sink[sizes_.QueryHead(head, query % sizes_.queries)];
    };
    std::fill_n(output, queries * width, 0.0f);
    for (int64_t query = 0; scoring_.sink && query < queries; ++query) {
      maxima[query] = sink_of(query);
    }
    ForPartials([&](const Partial& partial, int64_t own, int64_t query) {
      maxima[query] = std::max(maxima[query], partial.maximum[own]);
    });
    for (int64_t query = 0; scoring_.sink && query < queries; ++query) {
      if (sink_of(query) == kHidden) continue;
      totals[query] = std::exp(sink_of(query) - maxima[query]);
    }
    ForPartials([&](const Partial& partial, int64_t own, int64_t query) {
      if (partial.total[own] == 0) return;
      const float factor = std::exp(partial.maximum[own] - maxima[query]);
      totals[query] += factor * partial.total[own];
      for (int64_t column = 0; column < width; ++column) {
        output[query * width + column] += factor * partial.output[own * width + column];
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
    float* data = partials_.get() + number * most_queries_ * (2 + sizes_.value_dim);
    return {data, data + most_queries_, data + 2 * most_queries_};
  }

  template <typename Body>
  void ForPartials(Body body) {
    for (int64_t number = 0; number < size(); ++number) {
      const Piece& piece = pieces_[number];
      for (int64_t own = 0; own < piece.heads * sizes_.queries; ++own) {
        body(PartialOf(number), own, piece.pair * sizes_.queries + own);
      }
    }
  }

  const Sizes sizes_;
  const Scoring scoring_;
  const float* const queries_;  // (B·K, R, H)
  const std::vector<Piece> pieces_;
  const int64_t most_queries_;  // of a partial
  const std::unique_ptr<float[]> partials_;  // whole once all pieces are attended
  std::atomic<int64_t> next_{0}, done_{0};
};

ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query,
                  ffi::RemainingArgs operands, ffi::ResultBuffer<ffi::F32> output,
                  ffi::Span<const int64_t> offsets, ffi::Span<const int64_t> is_dense,
                  int64_t length, float soft_cap, bool has_bias, bool has_sink) {
  const auto shape = query.dimensions();
  const int64_t batch = shape[0], heads = shape[1];
  const Sizes sizes = {shape[2], length, shape[3], output->dimensions()[3]};
  size_t rest = 0;
  auto segments = TakeSegments(operands, offsets, is_dense, &rest);
  if (!segments.has_value()) return segments.error();
  const int32_t* query_positions = nullptr;
  int64_t query_stride = 0;
  const auto scoring = TakeScoring(operands, rest, soft_cap, has_bias, has_sink,
                                   &*segments, &query_positions, &query_stride);
  if (!scoring.has_value()) return scoring.error();
  std::vector<Piece> pieces;
  for (const Segment& segment : *segments) {
    AddPieces(segment, query_positions, query_stride, batch, heads, sizes, &pieces);
  }
  // A thread that comes late may find this call returned and its buffers gone: it
  // touches what `Run` needs to see that no piece is left, and no more.
  const auto work =
      std::make_shared<Work>(sizes, *scoring, query.typed_data(), std::move(pieces));
  const int64_t threads = std::min<int64_t>(pool.num_threads(), work->size());
  for (int64_t thread = 1; thread < threads; ++thread) {
    pool.Schedule([work] { work->Run(); });
  }
  work->Run();
  work->Wait();
  work->Merge(batch, heads, output->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DecodeAttention, Attend,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::Buffer<ffi::F32>>()               // query, (B, K, R, H)
        .RemainingArgs()                            // segments, then the scoring
        .Ret<ffi::Buffer<ffi::F32>>()               // (B, K, R, Hv)
        .Attr<ffi::Span<const int64_t>>("offsets")  // one a segment
        .Attr<ffi::Span<const int64_t>>("is_dense")
        .Attr<int64_t>("length")                    // T
        .Attr<float>("soft_cap")                    // 0 for none
        .Attr<bool>("has_bias")
        .Attr<bool>("has_sink"));
