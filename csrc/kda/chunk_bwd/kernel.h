// The kernels of the chunkwise backward, behind the forward's prepare kernel: the two scans, the gradients of the
// chunks in two steps, and the sums.
#pragma once
#include "kda/chunk_bwd/keys.h"
#include "kda/chunk_bwd/reduce.h"
#include "kda/chunk_bwd/scan.h"
#include "kda/chunk_bwd/values.h"

namespace kda {

template <class Variant>
union ScanPairStorage {
  ScanStorage<Variant, ScanPass::kStates> states;
  ScanStorage<Variant, ScanPass::kReverse> reverse;
};

/// Block z: 64 columns of V of the gradients of the states, then of the states.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(ScanShape<Variant, ScanPass::kReverse>::kThreads, 1)
    chunk_bwd_scan_kernel(ChunkBwdParams const p) {
  using Storage = ScanPairStorage<Variant>;
  KDA_DYNAMIC_SHARED(Storage, storage);
  int const tiles = value_tiles(p.value_dim), tile = int(blockIdx.z) % tiles, warp = thread_index() / 32;
  ScanWork work;
  if (!find_scan_work<Variant>(work, p, blockIdx.x, p.first_head + int(blockIdx.y))) return;
  if (int(blockIdx.z) < tiles) {
    constexpr ScanPass kPass = ScanPass::kReverse;
    init_scan<Variant, kPass>(storage->reverse);
    if (is_consumer<Variant, kPass>())
      scan_gradients_of_states<Variant>(p, {{storage->reverse, warp, true}}, work, tile);
    else bring_chunks<Variant, kPass>({p, storage->reverse, tile * kValueTile, p.d_o}, work);
  } else {
    constexpr ScanPass kPass = ScanPass::kStates;
    init_scan<Variant, kPass>(storage->states);
    if (is_consumer<Variant, kPass>()) scan_states<Variant>(p, {storage->states, warp, true}, work, tile);
    else bring_chunks<Variant, kPass>({p, storage->states, tile * kValueTile, {}}, work);
  }
}

/// Block x: a cell; block y: a value head.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(ValueGradients<Variant>::kThreads, ValueGradients<Variant>::kBlocksPerSm)
    chunk_bwd_values_kernel(ChunkBwdParams const p) {
  using Storage = ValuesStorage<Variant>;
  KDA_DYNAMIC_SHARED(Storage, storage);
  int const value_head = p.first_head + int(blockIdx.y);
  ChunkOfHead chunk;
  if (!chunk_in_cell<Variant>(chunk, p, blockIdx.x, value_head)) return;
  ValueGradients<Variant>{p, *storage, {p, blockIdx.x, value_head}, chunk}.run();
}

/// Block x: a slice of the channels of a cell, which run at the same time; block y: a value head.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(KeysThread<Variant>::kThreads, Variant::config.wgmma ? 2 : 1)
    chunk_bwd_keys_kernel(__grid_constant__ ChunkBwdParams const p) {
  using Storage = KeysStorage<Variant>;
  constexpr int kSlices = KeysSlice<Variant>::kSlices, kChannels = Storage::kKeyTile;
  KDA_DYNAMIC_SHARED(Storage, storage);
  int const value_head = p.first_head + int(blockIdx.y), cell_index = blockIdx.x / kSlices,
            slice = blockIdx.x % kSlices;
  BackwardCell<Variant> const cell(p, cell_index, value_head);
  ChunkOfHead chunk;
  if (chunk_in_cell<Variant>(chunk, p, cell_index, value_head)) {
    KeyGradients<Variant>{{{p, *storage, {}, slice * kChannels}, p, cell, chunk}}.run();
    return;
  }
  for (int i = thread_index(); i <= kChannels; i += KeysThread<Variant>::kThreads)
    (i < kChannels ? cell.sums().ddt_bias[slice * kChannels + i] : cell.sums().dA_log[slice]) = 0.f;
}

}  // namespace kda
