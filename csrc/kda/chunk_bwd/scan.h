// The two scans of the backward, which do not depend on each other and run in one grid: the states before every chunk,
// as the forward has them, and the gradients of the states after every chunk, from the last chunk to the first.
//
//     dU^T = dO^T A_qk + dS^T K~^T          dS^T <- dS^T Diag(Gamma_C) + dO^T (scale Gamma.Q) - dU^T W
//
// With W = T (Gamma.K) the gradient of the state needs no solve: (Gamma.K)^T dX = W^T dU.
#pragma once
#include "kda/chunk/scan.h"
#include "kda/chunk_bwd/cell.h"
#include "kda/chunk_bwd/params.h"

namespace kda {

template <class Variant>
struct ReverseConsumer : ScanConsumer<Variant, ScanPass::kReverse> {
  using Base = ScanConsumer<Variant, ScanPass::kReverse>;
  using Base::kChunk, Base::kKeySlices, Base::kSliceTile, Base::left, Base::products, Base::state, Base::x;
  using typename Base::E, typename Base::Stage;
  tile::LeftFragment<E> output[kChunk / 16];  // dO^T, as operand

  /// One chunk. Nothing is on its way at the end.
  KDA_DEVICE void step(int stage, uint32_t parity) {
    this->wait_for_record(stage, parity);
    Stage const& in = this->s.stage[stage];
    products.read(state);
    if constexpr (Base::Shape::kAsync) this->decay(in);
#pragma unroll
    for (int i = 0; i < kChunk / 16; ++i) output[i] = tile::load_left_transposed<E>(in.u, i * 16, this->row());
    products.start_rows(state, x, in.record.k_tilde.template columns<kSliceTile>(this->key()));
    if constexpr (!Base::Shape::kAsync) this->decay(in);
    if (this->completes_output()) products.start_outer(x, output, in.record.a_qk);
    products.start_outer(state, output, in.record.gamma_q.template columns<kSliceTile>(this->key()));
    products.template wait<1>();
    if constexpr (kKeySlices > 1) this->add_slices((stage + Base::Shape::kStages * int(parity)) % 2);
#pragma unroll
    for (int c = 0; c < kChunk / 8; c += 2) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[c].x[e] = -x[c].x[e], x[c + 1].x[e] = -x[c + 1].x[e];
      left[c / 2] = tile::left_from<E>(x[c], x[c + 1]);
    }
    products.start_outer(state, left, in.record.w.template columns<kSliceTile>(this->key()));
    products.template wait<0>();
  }
};

/// A warp's slice of S^T or dS^T, into the cell.
template <class E, int kKeyTiles, class Tile>
KDA_DEVICE void keep_state(tile::Accumulator const (&state)[kKeyTiles], Tile& tile, int row, int channel) {
#pragma unroll
  for (int d = 0; d < kKeyTiles; ++d) tile::store_accumulator<E>(tile, row, channel + d * 8, state[d]);
}

/// The producer warps of either scan: at each step they bring one chunk and announce one that is there, the later the
/// more stages there are.
template <class Variant, ScanPass kPass>
KDA_DEVICE void bring_chunks(ScanProducer<Variant, kPass> producer, ScanWork const& work) {
  using Barrier = ScanBarrier<Variant, kPass>;
  constexpr int kStages = ScanShape<Variant, kPass>::kStages, kLag = kStages > 1 ? kStages - 1 : 1;
  for (int64_t i = 0; i < work.chunks + kLag; ++i) {
    if (i >= kLag) producer.template announce<kLag - 1>(int((i - kLag) % kStages));
    if (i >= work.chunks) {
      cp_async_commit();  // nothing, so that groups count chunks to the end
      continue;
    }
    int const stage = int(i % kStages);
    int64_t const index = kPass == ScanPass::kReverse ? work.chunks - 1 - i : i;
    if (i >= kStages) Barrier::wait(Barrier::empty(stage));
    if constexpr (kPass == ScanPass::kStates) {
      ChunkFlags<Variant::config.chunk>& to = producer.s.stage[stage];
      auto const& from =
          BackwardCell<Variant>(producer.p, work.sequence.first_cell + index, work.value_head).inverse().flags;
      int const at = producer.thread * 16;
      if (at < int(sizeof(to)))
        cp_async_16(reinterpret_cast<char*>(&to) + at, reinterpret_cast<char const*>(&from) + at);
    }
    producer.load_rows(chunk_of_head<Variant>(producer.p, work.sequence, index, work.value_head), stage);
    producer.load(work.sequence.first_cell + index, work.value_head, stage, 1);
  }
}

/// The consumer warps of either scan: before(cell) and after(cell) around each step.
template <class Variant, ScanPass kPass, class Consumer, class Before, class After>
KDA_DEVICE void scan_chunks(ChunkBwdParams const& p, Consumer& consumer, ScanWork const& work, Before before,
                            After after) {
  using Barrier = ScanBarrier<Variant, kPass>;
  constexpr int kStages = ScanShape<Variant, kPass>::kStages;
  /// Cells are counted in 32 bits. With these widths no variant spills in the loop (csrc/tools/check_sass.py).
  using Index = std::conditional_t<sizeof(typename Variant::Element) == 4, int64_t, int32_t>;
  Index const count = Index(work.chunks), first_cell = Index(work.sequence.first_cell);
  int stage = 0;
  uint32_t parity = 0;
  for (Index i = 0; i < count; ++i) {
    Index const index = kPass == ScanPass::kReverse ? count - 1 - i : i;
    BackwardCell<Variant> const cell(p, first_cell + index, work.value_head);
    before(cell);
    consumer.step(stage, parity);
    if (i + kStages < count) Barrier::arrive(Barrier::empty(stage));
    after(cell);
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
}

/// S_0 and U of every chunk.
template <class Variant>
KDA_DEVICE void scan_states(ChunkBwdParams const& p, ScanConsumer<Variant, ScanPass::kStates> consumer,
                            ScanWork const& work, int tile) {
  using E = typename Variant::Element;
  using Cell = BackwardCell<Variant>;
  StateSlice const slice = consumer.slice(tile * kValueTile);
  int64_t const slot = p.initial_state.data ? p.initial_state.slots.of(work.n) : -1;
  load_state(consumer.state, state_in_slot(p.initial_state, p, slot, work.value_head), p, slice);
  scan_chunks<Variant, ScanPass::kStates>(
      p, consumer, work,
      [&](Cell const& cell) { keep_state<E>(consumer.state, cell.state(tile), consumer.row(), consumer.key()); },
      [&](Cell const& cell) {
        if (consumer.completes_output()) keep_state<E>(consumer.x, cell.u(tile), consumer.row(), 0);
      });
}

/// dS_C of every chunk, and the gradient of the initial state.
template <class Variant>
KDA_DEVICE void scan_gradients_of_states(ChunkBwdParams const& p, ReverseConsumer<Variant> consumer,
                                         ScanWork const& work, int tile) {
  using E = typename Variant::Element;
  using Cell = BackwardCell<Variant>;
  StateSlice const slice = consumer.slice(tile * kValueTile);
  int64_t const slot = p.d_final_state.data ? p.d_final_state.slots.of(work.n) : -1;
  load_state(consumer.state, state_in_slot(p.d_final_state, p, slot, work.value_head), p, slice);
  scan_chunks<Variant, ScanPass::kReverse>(
      p, consumer, work,
      [&](Cell const& cell) { keep_state<E>(consumer.state, cell.d_state(tile), consumer.row(), consumer.key()); },
      [](Cell const&) {});
  if (p.d_initial_state.data)
    store_state(consumer.state,
                state_in_slot(p.d_initial_state, p, p.d_initial_state.slots.of(work.n), work.value_head), p, slice);
}

}  // namespace kda
