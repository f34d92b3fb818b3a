#include <algorithm>
#include <cmath>
#include <string>

#include "core/text.h"
#include "engine/batch.h"
#include "engine/block.h"
#include "engine/check_spec.h"
#include "engine/head.h"
#include "engine/router.h"
#include "engine/sequences.h"
#include "engine/workspace.h"
#include "ops/check.h"
#include "qtale/decoder_ops.h"
#include "qtale/engine.h"
#include "qtale/parallel.h"

namespace qtale {
namespace {

using engine::Batch;
using engine::Buffer;
using engine::LayerCache;
using engine::Sequence;

}  // namespace

class Decoder::Impl {
 public:
  explicit Impl(DecoderSpec given)
      : spec(checked(std::move(given))),
        routers(routers_of(spec)),
        sequences(kv_page_bytes(spec.num_kv_heads, spec.head_dim, spec.kv_dtype), spec.layers.size()) {}

  // Runs all layers and gives `head` the wanted rows after the last norm; undone where anything throws.
  void run(std::span<const Segment> segments, std::span<const std::int64_t> wanted, const std::function<void()>& poll,
           const std::function<void(const TensorView&)>& head);

  const DecoderSpec spec;
  const std::vector<std::optional<engine::LayerRouter>> routers;  // of each layer, into `spec`
  engine::Sequences sequences;
  float theta = 0.5F;
  std::int64_t forced = 2;
  std::optional<std::vector<bool>> depth;
  int threads = 0;
  CallReport report;
  engine::Workspace workspace;

 private:
  static DecoderSpec checked(DecoderSpec spec) {
    engine::check_spec(spec);
    return spec;
  }
  static std::vector<std::optional<engine::LayerRouter>> routers_of(const DecoderSpec& spec) {
    std::vector<std::optional<engine::LayerRouter>> routers(spec.layers.size());
    for (std::size_t i = 0; i < routers.size(); ++i)
      if (spec.layers[i].router) routers[i].emplace(*spec.layers[i].router, engine::rounding_of(spec, spec.layers[i]));
    return routers;
  }

  std::vector<std::int64_t> enter(std::span<const Segment> segments);
  void check_tokens(const Segment& segment, std::int64_t start) const;
  TensorView run_layers(std::span<const Segment> segments, const Batch& batch, std::span<const std::int32_t> wanted,
                        const std::function<void()>& poll);
  void run_layer(std::size_t index, const Batch& batch, std::span<const Segment> segments,
                 std::span<const std::int32_t> wanted, const TensorView& x);
  std::span<const Matrix> multiplied_after(std::size_t index) const;
  std::vector<std::int32_t> executed_rows(std::size_t index, const Batch& batch, const TensorView& x);
  void undo(std::span<const Segment> segments, std::span<const std::int64_t> starts);
};

void Decoder::Impl::check_tokens(const Segment& segment, std::int64_t start) const {
  const auto count = std::ssize(segment.tokens);
  if (start + count > spec.context)
    fail_input("Decoder: {} tokens after {} exceed the context of {}; shorten the text or load with a longer context.",
               count, start, spec.context);
  if (segment.text_length != 0 && (segment.text_length < start + count || segment.text_length > spec.context))
    fail_input("Decoder: a text of {} tokens cannot hold {} after {}; use up to the context of {}, or 0.",
               segment.text_length, count, start, spec.context);
  for (const std::int32_t token : segment.tokens)
    if (token < 0 || token >= spec.vocab_size)
      fail_input("Decoder: token id {} is outside of the vocabulary; use 0 to {}.", token, spec.vocab_size - 1);
}

// Checks the segments and gives the length of each sequence where its tokens enter. Sequences count their new tokens
// from here on.
std::vector<std::int64_t> Decoder::Impl::enter(std::span<const Segment> segments) {
  std::vector<std::int64_t> starts;
  try {
    for (std::size_t s = 0; s < segments.size(); ++s) {
      const Segment& segment = segments[s];
      Sequence& sequence = sequences.at(segment.sequence);
      for (std::size_t other = 0; other < s; ++other)
        if (segments[other].sequence == segment.sequence)
          fail_input("Decoder: sequence {} has two segments in one call; join them.", segment.sequence);
      std::int64_t start = sequence.length;
      if (segment.parent >= 0) {
        if (start != 0 || segment.parent == segment.sequence)
          fail_input("Decoder: sequence {} is not empty, so it cannot take over sequence {}.", segment.sequence,
                     segment.parent);
        start = sequences.at(segment.parent).length;
      }
      check_tokens(segment, start);
      starts.push_back(start);
      sequence.length = start + std::ssize(segment.tokens);
    }
  } catch (...) {
    undo(segments.first(starts.size()), starts);
    throw;
  }
  return starts;
}

void Decoder::Impl::undo(std::span<const Segment> segments, std::span<const std::int64_t> starts) {
  for (std::size_t s = 0; s < segments.size(); ++s)
    engine::Sequences::truncate(sequences.at(segments[s].sequence), segments[s].parent >= 0 ? 0 : starts[s]);
}

void Decoder::Impl::run(std::span<const Segment> segments, std::span<const std::int64_t> wanted,
                        const std::function<void()>& poll, const std::function<void(const TensorView&)>& head) {
  const std::vector<std::int64_t> starts = enter(segments);
  try {
    const Batch batch = engine::make_batch(segments, starts, spec);
    std::vector<std::int32_t> rows;
    for (const std::int64_t row : wanted) {
      if (row < 0 || row >= batch.rows() || (!rows.empty() && row <= rows.back()))
        fail_input("Decoder: row {} cannot be kept; name rows of the {} given tokens in ascending order.", row,
                   batch.rows());
      rows.push_back(static_cast<std::int32_t>(row));
    }
    head(run_layers(segments, batch, rows, poll));
  } catch (...) {
    undo(segments, starts);
    throw;
  }
}

TensorView Decoder::Impl::run_layers(std::span<const Segment> segments, const Batch& batch,
                                     std::span<const std::int32_t> wanted, const std::function<void()>& poll) {
  report = {batch.rows(), {}};
  const TensorView x = workspace.matrix(Buffer::residual, batch.rows(), spec.hidden_size);
  const auto rows_of = [](std::span<const std::int32_t> rows) {
    return TensorView::vector(const_cast<std::int32_t*>(rows.data()), DType::s32, std::ssize(rows));
  };
  compact_rows(spec.embedding, rows_of(batch.tokens), x);
  for (std::size_t layer = 0; layer < spec.layers.size(); ++layer) {
    if (poll) poll();
    run_layer(layer, batch, segments, wanted, x);
  }
  const TensorView last = workspace.matrix(Buffer::compact, std::ssize(wanted), spec.hidden_size);
  compact_rows(x, rows_of(wanted), last);
  rms_norm(last, spec.final_norm, spec.norm_eps, last);
  return last;
}

void Decoder::Impl::run_layer(std::size_t index, const Batch& batch, std::span<const Segment> segments,
                              std::span<const std::int32_t> wanted, const TensorView& x) {
  std::vector<LayerCache*> caches, parents;
  for (const Segment& segment : segments) {
    caches.push_back(&sequences.at(segment.sequence).layers[index]);
    parents.push_back(segment.parent < 0 ? nullptr : &sequences.at(segment.parent).layers[index]);
  }
  const std::vector<std::int32_t>& executed = report.executed.emplace_back(executed_rows(index, batch, x));
  // What the last layer gives to rows that nobody asks for is never read.
  std::vector<std::int32_t> read;
  if (index + 1 == spec.layers.size())
    std::set_intersection(executed.begin(), executed.end(), wanted.begin(), wanted.end(), std::back_inserter(read));
  const std::span<const std::int32_t> outputs = index + 1 == spec.layers.size() ? read : executed;
  engine::run_block({spec, spec.layers[index], batch, caches, parents, executed, outputs, x, multiplied_after(index)},
                    workspace);
}

// The first weights that are read after a layer; none where the tokens decide that, or where a layer that does not run
// keeps keys and values.
std::span<const Matrix> Decoder::Impl::multiplied_after(std::size_t index) const {
  while (++index < spec.layers.size()) {
    if (depth ? (*depth)[index] : !routers[index]) return spec.layers[index].qkv;
    if (!depth || spec.kv_rule == KvRule::keep) return {};
  }
  return {&spec.head, 1};
}

std::vector<std::int32_t> Decoder::Impl::executed_rows(std::size_t index, const Batch& batch, const TensorView& x) {
  const std::optional<engine::LayerRouter>& router = routers[index];
  if (depth) return (*depth)[index] ? batch.all : std::vector<std::int32_t>{};
  if (!router) return batch.all;
  const std::vector<float> probabilities = router->execution_probabilities(x, workspace);
  std::vector<std::int32_t> rows;
  for (std::size_t r = 0; r < probabilities.size(); ++r)
    if (batch.positions[r] < forced || probabilities[r] >= theta) rows.push_back(static_cast<std::int32_t>(r));
  return rows;
}

Decoder::Decoder(DecoderSpec spec) : impl_(std::make_unique<Impl>(std::move(spec))) {}
Decoder::~Decoder() = default;

std::int64_t Decoder::add_sequence() { return impl_->sequences.add(); }
void Decoder::remove_sequence(std::int64_t sequence) { impl_->sequences.remove(sequence); }
std::int64_t Decoder::length(std::int64_t sequence) const { return impl_->sequences.at(sequence).length; }

void Decoder::truncate(std::int64_t sequence, std::int64_t length) {
  engine::Sequences::truncate(impl_->sequences.at(sequence), length);
}

void Decoder::forward(std::span<const Segment> segments, std::span<const std::int64_t> keep, const TensorView& logits,
                      const std::function<void()>& poll) {
  ops::check_dtype("Decoder", "logits", logits, DType::f32);
  ops::check_shape("Decoder", "logits", logits, std::ssize(keep), impl_->spec.vocab_size);
  const ThreadLimit limit(impl_->threads);
  impl_->run(segments, keep, poll, [&](const TensorView& x) { engine::multiply_head(x, impl_->spec, logits, poll); });
}

std::vector<Score> Decoder::score(std::span<const Segment> segments, std::span<const std::int64_t> keep,
                                  std::span<const std::int32_t> targets, const std::function<void()>& poll) {
  if (keep.size() != targets.size())
    fail_input("score: {} rows are kept, but {} targets given; each row takes one.", keep.size(), targets.size());
  for (const std::int32_t target : targets)
    if (target < 0 || target >= impl_->spec.vocab_size)
      fail_input("score: target {} is outside of the vocabulary; use 0 to {}.", target, impl_->spec.vocab_size - 1);
  std::vector<std::int64_t> rows, row_of;
  for (const std::int64_t row : keep) {
    if (rows.empty() || rows.back() != row) rows.push_back(row);
    row_of.push_back(std::ssize(rows) - 1);
  }
  const ThreadLimit limit(impl_->threads);
  std::vector<Score> scores;
  impl_->run(segments, rows, poll, [&](const TensorView& x) {
    scores = engine::score_rows(x, impl_->spec, row_of, targets, impl_->workspace, poll);
  });
  return scores;
}

void Decoder::set_theta(float theta) {
  if (!(theta >= 0.0F && theta <= 1.0F)) fail_input("theta: {} is no probability; use 0 to 1.", theta);
  impl_->theta = theta;
}

void Decoder::set_forced_tokens(std::int64_t count) {
  if (count < 0) fail_input("forced tokens: {} is no count; use 0 or more.", count);
  impl_->forced = count;
}

void Decoder::set_depth(std::optional<std::vector<bool>> runs) {
  if (runs && runs->size() != impl_->spec.layers.size())
    fail_input("set_depth: {} decisions are given for {} layers.", runs->size(), impl_->spec.layers.size());
  impl_->depth = std::move(runs);
}

void Decoder::set_num_threads(int count) {
  if (count < 0) fail_input("set_num_threads: {} is no count; use 0 for the default or 1 and more.", count);
  impl_->threads = count;
}

const CallReport& Decoder::report() const { return impl_->report; }

std::int64_t Decoder::router_bytes() const {
  std::int64_t bytes = 0;
  for (const auto& router : impl_->routers) bytes += router ? router->bytes() : 0;
  return bytes;
}

std::vector<std::int64_t> Decoder::kv_bytes() const {
  std::vector<std::int64_t> bytes;
  const engine::PagePool& pool = impl_->sequences.pool();
  for (std::size_t layer = 0; layer < impl_->spec.layers.size(); ++layer)
    bytes.push_back(pool.pages(layer) * pool.page_bytes());
  return bytes;
}

std::vector<std::int64_t> Decoder::kv_bytes(std::span<const std::int64_t> sequences) const {
  std::vector<double> pages(impl_->spec.layers.size());
  for (const std::int64_t sequence : sequences) {
    const Sequence& held = impl_->sequences.at(sequence);
    for (std::size_t layer = 0; layer < pages.size(); ++layer) pages[layer] += held.layers[layer].pages_held();
  }
  std::vector<std::int64_t> bytes;
  for (const double count : pages)
    bytes.push_back(std::llround(count * static_cast<double>(impl_->sequences.pool().page_bytes())));
  return bytes;
}

}  // namespace qtale
