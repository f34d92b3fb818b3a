// One decoder block over the rows that execute it.
#pragma once

#include <span>
#include <vector>

#include "engine/batch.h"
#include "engine/kv_cache.h"
#include "engine/workspace.h"
#include "qtale/decoder_ops.h"
#include "qtale/engine.h"

namespace qtale::engine {

// What a block needs of a call. Rows are listed in ascending order, so those of a segment are neighbours.
struct BlockInput {
  const DecoderSpec& spec;
  const DecoderLayer& layer;
  const Batch& batch;
  std::span<LayerCache* const> caches;     // of each segment, in this layer
  std::span<LayerCache* const> parents;    // to take over first, or nullptr
  std::span<const std::int32_t> executed;  // rows that run the block
  std::span<const std::int32_t> wanted;    // those of them whose output somebody reads
  TensorView residual;                     // [rows, hidden], changed in place
  std::span<const Matrix> next;            // what is multiplied after the block, where that is sure
};

// What attention and the router of a layer may round when they multiply: what its Linears round in any case.
Compute rounding_of(const DecoderSpec& spec, const DecoderLayer& layer);

void run_block(const BlockInput& input, Workspace& workspace);

}  // namespace qtale::engine
