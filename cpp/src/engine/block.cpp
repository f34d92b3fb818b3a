#include "engine/block.h"

#include <algorithm>

#include "engine/projection.h"

namespace qtale::engine {
namespace {

using Rows = std::span<const std::int32_t>;

TensorView indices_of(Rows rows) {
  return TensorView::vector(const_cast<std::int32_t*>(rows.data()), DType::s32, std::ssize(rows));
}

// Rows [begin, end) of a matrix.
TensorView some_rows(const TensorView& matrix, std::int64_t begin, std::int64_t end) {
  TensorView part = matrix;
  part.data = matrix.as<float>() + begin * matrix.strides[0];
  part.shape[0] = end - begin;
  return part;
}

// The part of ascending `rows` that lies in segment s.
Rows of_segment(Rows rows, const Batch& batch, std::size_t s) {
  const auto begin = std::lower_bound(rows.begin(), rows.end(), batch.starts[s]);
  const auto end = std::lower_bound(begin, rows.end(), batch.starts[s + 1]);
  return {begin, end};
}

class Block {
 public:
  Block(const BlockInput& input, Workspace& workspace) : in_(input), spec_(input.spec), memory_(workspace) {}

  void run() {
    const Rows cached = spec_.kv_rule == KvRule::keep ? Rows(in_.batch.all) : in_.executed;
    const TensorView qkv = project_qkv(cached);
    store_keys_and_values(qkv, cached);
    if (in_.wanted.empty()) return;
    const TensorView attended = attend(qkv, cached);
    add(attended, in_.layer.o, in_.layer.gate_up);
    feed_forward();
  }

 private:
  std::int64_t queries() const { return spec_.num_heads * spec_.head_dim; }
  std::int64_t keys() const { return spec_.num_kv_heads * spec_.head_dim; }
  std::int64_t all_rows() const { return in_.batch.rows(); }

  // The rows of the residual stream; without a copy where these are all.
  TensorView residual(Rows rows) {
    if (std::ssize(rows) == all_rows()) return in_.residual;
    const TensorView compact = memory_.matrix(Buffer::compact, std::ssize(rows), spec_.hidden_size);
    compact_rows(in_.residual, indices_of(rows), compact);
    return compact;
  }

  TensorView normed(Rows rows, const TensorView& weight) {
    const TensorView out = memory_.matrix(Buffer::normed, std::ssize(rows), spec_.hidden_size);
    rms_norm(residual(rows), weight, spec_.norm_eps, out);
    return out;
  }

  // Queries, keys and values after norms and rotation. Rows that only leave keys and values get no queries.
  TensorView project_qkv(Rows rows) {
    const TensorView qkv = memory_.matrix(Buffer::qkv, std::ssize(rows), queries() + 2 * keys());
    const TensorView x = normed(rows, in_.layer.input_norm);
    const bool queried = !in_.wanted.empty();
    const std::span<const Matrix> next = queried ? std::span<const Matrix>(in_.layer.o) : in_.next;
    multiply(x, in_.layer.qkv, qkv, spec_.compute, next, queried ? 0 : queries());
    if (queried) finish(columns(qkv, 0, queries()), in_.layer.q_norm, rows);
    finish(columns(qkv, queries(), keys()), in_.layer.k_norm, rows);
    return qkv;
  }

  void finish(const TensorView& part, const std::optional<TensorView>& norm, Rows rows) {
    const TensorView heads = heads_of(part, spec_.head_dim);
    if (norm) rms_norm(heads, *norm, spec_.norm_eps, heads);
    const TensorView table =
        TensorView::matrix(const_cast<float*>(in_.batch.rope.data()), DType::f32, all_rows(), spec_.head_dim);
    rope(heads, table, indices_of(rows));
  }

  void store_keys_and_values(const TensorView& qkv, Rows rows) {
    std::vector<std::int32_t> positions;
    std::int64_t begin = 0;
    for (std::size_t s = 0; s < in_.caches.size(); ++s) {
      LayerCache& cache = *in_.caches[s];
      if (in_.parents[s] != nullptr) cache.take_over(*in_.parents[s]);
      const Rows mine = of_segment(rows, in_.batch, s);
      if (mine.empty()) continue;
      positions.clear();
      for (const std::int32_t row : mine) positions.push_back(in_.batch.positions[static_cast<std::size_t>(row)]);
      const std::int64_t first = cache.extend(positions);
      const TensorView own = some_rows(qkv, begin, begin + std::ssize(mine));
      begin += std::ssize(mine);
      kv_append(heads_of(columns(own, queries(), keys()), spec_.head_dim),
                heads_of(columns(own, queries() + keys(), keys()), spec_.head_dim), cache.pages(), first,
                spec_.kv_dtype);
    }
  }

  // Attention of the wanted rows, which are rows of qkv as `cached` lists them.
  TensorView attend(const TensorView& qkv, Rows cached) {
    const TensorView q = wanted_queries(qkv, cached);
    const std::int64_t rows = q.shape[0];
    std::vector<std::int32_t> begins, ends;
    std::vector<AttentionRun> runs;
    for (std::size_t s = 0; s < in_.caches.size(); ++s) {
      const Rows mine = of_segment(in_.wanted, in_.batch, s);
      if (mine.empty()) continue;
      runs.push_back({std::ssize(begins), std::ssize(mine), in_.caches[s]->pages()});
      for (const std::int32_t row : mine) {
        const std::int32_t position = in_.batch.positions[static_cast<std::size_t>(row)];
        const auto all = in_.caches[s]->positions();
        const auto end = std::upper_bound(all.begin(), all.end(), position);
        const std::int64_t oldest = in_.layer.window > 0 ? position - in_.layer.window + 1 : 0;
        const auto begin = std::lower_bound(all.begin(), end, static_cast<std::int32_t>(oldest));
        begins.push_back(static_cast<std::int32_t>(begin - all.begin()));
        ends.push_back(static_cast<std::int32_t>(end - all.begin()));
      }
    }
    const TensorView out = memory_.matrix(Buffer::attention, rows, queries());
    attention(heads_of(q, spec_.head_dim), runs, indices_of(begins), indices_of(ends), spec_.num_kv_heads,
              spec_.kv_dtype, spec_.attention_scale, heads_of(out, spec_.head_dim), rounding_of(spec_, in_.layer));
    return out;
  }

  TensorView wanted_queries(const TensorView& qkv, Rows cached) {
    const TensorView q = columns(qkv, 0, queries());
    if (in_.wanted.size() == cached.size()) return q;
    std::vector<std::int32_t> places;
    std::size_t place = 0;
    for (const std::int32_t row : in_.wanted) {
      while (cached[place] != row) ++place;
      places.push_back(static_cast<std::int32_t>(place));
    }
    const TensorView compact = memory_.matrix(Buffer::compact, std::ssize(places), queries());
    compact_rows(q, indices_of(places), compact);
    return compact;
  }

  // residual += x times the projection.
  void add(const TensorView& x, const Projection& projection, std::span<const Matrix> next) {
    if (std::ssize(in_.wanted) == all_rows() && multiply_add(x, projection, in_.residual, spec_.compute)) return;
    const TensorView delta = memory_.matrix(Buffer::delta, x.shape[0], spec_.hidden_size);
    multiply(x, projection, delta, spec_.compute, next);
    scatter_add_rows(delta, indices_of(in_.wanted), nullptr, in_.residual);
  }

  void feed_forward() { add(activate(normed(in_.wanted, in_.layer.post_norm)), in_.layer.down, in_.next); }

  // silu(gate) * up; rounded at once where the product that follows would do it.
  TensorView activate(const TensorView& x) {
    const std::int64_t rows = x.shape[0], size = spec_.intermediate_size;
    const DType dtype = is_dense(in_.layer.down) ? DType::bf16 : DType::f32;
    const TensorView gated = memory_.matrix(Buffer::activated, rows, size, dtype);
    if (multiply_gated(x, in_.layer.gate_up, gated, spec_.compute)) return gated;
    const TensorView gate_up = memory_.matrix(Buffer::gate_up, rows, 2 * size);
    multiply(x, in_.layer.gate_up, gate_up, spec_.compute, in_.layer.down);
    const TensorView activated = memory_.matrix(Buffer::activated, rows, size);
    silu_mul(gate_up, activated);
    return activated;
  }

  const BlockInput& in_;
  const DecoderSpec& spec_;
  Workspace& memory_;
};

}  // namespace

Compute rounding_of(const DecoderSpec& spec, const DecoderLayer& layer) {
  const bool packed = is_packed(layer.qkv) && is_packed(layer.o);
  return packed || spec.compute == Compute::bfloat16 ? spec.compute : Compute::floating;
}

void run_block(const BlockInput& input, Workspace& workspace) { Block(input, workspace).run(); }

}  // namespace qtale::engine
