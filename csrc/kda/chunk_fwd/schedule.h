// How a call of the forward is launched, and why: decided here once, from shapes and the device alone.
#pragma once
#include "kda/chunk/record.h"
#include "kda/chunk_fwd/cost.h"

namespace kda {

inline constexpr double kWorkspaceShare = 1.5;  // of the bytes of q and k: records
inline constexpr double kSegmentShare = 0.25;   // of the records: states of segments, and never more than
inline constexpr int64_t kMostSegmentBytes = 32 << 20;

/// What lies where in the workspace: room to align, records of one round, two states per value head where there is more
/// than one round, counters of progress, states of segments. Never less for more tokens or sequences: how equal the
/// rounds are, and whether sequences are split, does not show.
struct ChunkFwdWorkspace {
  int64_t most_cells = 0;                        // of a round
  int64_t cell_bytes = 0;                        // of a cell and value head
  int64_t counters = 0;                          // of progress
  size_t carry = 0, progress = 0, segments = 0;  // offsets from the first aligned byte
  size_t bytes_per_segment = 0, segment_bytes = 0;

  size_t bytes() const { return kRecordAlignment + segments + segment_bytes; }
  int64_t most_segments() const { return int64_t(segment_bytes / bytes_per_segment); }
};

/// The work goes in rounds where the workspace would be large beside the inputs (kWorkspaceShare).
struct ChunkFwdRound {
  int64_t cells = 0;
  int32_t walkers = 1;   // of the prepare kernel, for each value head
  int64_t segments = 0;  // of the scan: blocks for each value head and tile of V, used or not
};

/// Why sequences are split, or are not.
enum class SplitReason {
  kInvariant,   // not: batch_invariant
  kNoSegments,  // not: one chunk, or heads and V fill the device
  kNoRoom,      // not: too short, or no room for the states of segments
  kWanted,      // as the device wants
  kCost,        // split_us and unsplit_us say which is quicker
};

/// The one value that says how a call is launched: obeyed by ChunkFwdVariant::launch, told by explain.
struct ChunkFwdSchedule {
  ChunkFwdWorkspace workspace;
  int64_t rounds = 1;
  ChunkFwdRound whole, last;  // all rounds but the last are alike

  // How the two kernels share the device.
  bool beside = false;      // the scan follows the prepare kernel record by record
  int64_t reserved = 0;     // multiprocessors left to the scan; 0: it gets them as the prepare kernel ends
  int teams = 1;            // in each block of the prepare kernel; all that fit, so that no other fits beside them
  bool last_first = false;  // the prepare kernel begins with the last cells

  // Whether sequences are split into segments, and why.
  int64_t segment_chunks = 0;  // 0: not split
  int64_t mean_segments = 1;   // of a sequence of mean length, in one round
  SplitReason reason = SplitReason::kNoSegments;

  // Predicted, in microseconds.
  double unsplit_us = 0, split_us = 0;               // of the call; of the best split, 0 if there is none
  double prepare_us = 0, scan_us = 0, total_us = 0;  // of the kernels, one after another; all, beside each other

  ChunkFwdRound const& round(int64_t i) const { return i + 1 < rounds ? whole : last; }
};

inline int64_t chunk_fwd_counters(ChunkFwdCall const& call, int64_t cells) {
  int64_t const all = progress_counters(cells * call.value_heads, call.value_heads, call.value_dim);
  return divide_up(all, 4) * 4;  // segments begin at 16 bytes
}

inline ChunkFwdWorkspace lay_out_workspace(ChunkFwdVariant const& variant, ChunkFwdCall const& call,
                                           DeviceTraits const& device) {
  ChunkPlan const& plan = call.plan;
  int64_t const cells = plan.cells(), heads = call.value_heads, rows = plan.cu_seqlens ? 1 : plan.sequences;
  ChunkFwdWorkspace w;
  w.cell_bytes = int64_t(variant.cell_bytes(call.value_dim));
  w.bytes_per_segment = size_t(heads) * size_t(segment_floats(call.value_dim, variant.key_tile)) * sizeof(float);

  int64_t const inputs =
      2 * rows * plan.tokens * heads * call.key_dim * variant.element_bytes();  // q, k of value heads
  int64_t const allowed = std::max(int64_t(kWorkspaceShare * double(inputs)), device.small_workspace);
  int64_t const counters = 4 * chunk_fwd_counters(call, 0) + 16,  // bytes, and room to round
      per_cell = heads * (w.cell_bytes + 4 * kCountersPerRecord);
  w.most_cells = std::min(std::max<int64_t>((allowed - counters) / per_cell, 1), cells);
  w.counters = chunk_fwd_counters(call, w.most_cells);

  size_t const states = w.most_cells < cells ? 2 * size_t(heads) : 0;
  w.carry = size_t(w.most_cells * heads * w.cell_bytes);
  w.progress = w.carry + states * size_t(state_floats(call.value_dim, variant.key_tile)) * sizeof(float);
  w.segments = w.progress + size_t(w.counters) * sizeof(uint32_t);
  // No segments where the heads of one sequence fill half of the device: a split costs more than twice the arithmetic.
  bool const fills = 2 * heads * value_tiles(call.value_dim) > device.multiprocessors;
  if (call.batch_invariant || cells < 2 || (fills && !device.wanted_segments)) return w;
  int64_t const share = std::min(int64_t(kSegmentShare * double(w.carry)), kMostSegmentBytes);
  int64_t const most = std::max(share, device.small_workspace) / int64_t(w.bytes_per_segment);
  w.segment_bytes = size_t(std::min(most, round_segments(plan, w.most_cells, 1))) * w.bytes_per_segment;
  return w;
}

/// How the kernels share the device, where sequences are not split.
struct ChunkFwdUnsplit {
  int64_t round_cells = 0;
  int64_t reserved = 0;
  int32_t walkers = 0;  // 0: as many as PrepareVariant::walk says
  int teams = 1;
  double us = 0;
};

/// Where kernels can run beside each other, the scan follows the prepare kernel; it gets multiprocessors of its own if
/// that pays. `equal_cells`: of a round, if it does not.
inline ChunkFwdUnsplit schedule_unsplit(ChunkFwdCost const& cost, int64_t most_cells, int64_t equal_cells) {
  DeviceTraits const& device = cost.device;
  int64_t const heads = cost.call.value_heads, cells = cost.call.plan.cells();
  if (cells == 0) return {};
  int64_t const scan = cost.scan_blocks(), others = device.multiprocessors - scan;
  ChunkFwdUnsplit best{equal_cells, 0, 0, 1, cost.sequential_us(divide_up(cells, equal_cells))};
  if (!device.overlaps_kernels || 4 * scan > 3 * device.multiprocessors) return best;
  int const teams = cells * heads > others ? cost.variant.prepare.teams : 1;
  if (teams > 1 && !cost.variant.wgmma) return best;  // for these no kernel with blocks of several teams is compiled
  int64_t const most_walkers = std::min(std::max<int64_t>(others * teams / heads, 1), most_cells);
  for (int64_t walkers = most_walkers; 2 * walkers > most_walkers; --walkers) {  // fewer may come out even
    int64_t const rounds = divide_up(cells, most_cells / walkers * walkers),
                  round = std::min(most_cells, divide_up(divide_up(cells, rounds), walkers) * walkers),
                  turns = (rounds - 1) * (round / walkers) + divide_up(cells - (rounds - 1) * round, walkers);
    double const us = cost.beside_us(rounds, turns, teams);
    if (us < best.us) best = {round, scan, int32_t(walkers), teams, us};
  }
  return best;
}

/// Lengths in cu_seqlens are taken as equal.
inline void choose_split(ChunkFwdSchedule& s, ChunkFwdCost const& cost, int64_t round_cells, double unsplit_us) {
  ChunkPlan const& plan = cost.call.plan;
  int const wanted = cost.device.wanted_segments;
  s.reason = cost.call.batch_invariant    ? SplitReason::kInvariant
             : !s.workspace.segment_bytes ? SplitReason::kNoSegments
                                          : SplitReason::kNoRoom;
  int64_t const chunks = std::min(cost.mean_chunks(), round_cells);
  if (chunks == 0) return;
  int64_t const rounds = divide_up(plan.cells(), round_cells);
  int64_t const sequences = std::max<int64_t>(1, std::min<int64_t>(plan.sequences, round_cells / chunks));
  s.unsplit_us = unsplit_us;
  int64_t best_chunks = 0, best_segments = 1;
  for (int64_t l = 1; l < chunks; l *= 2) {
    int64_t const n = divide_up(chunks, l);
    if (round_segments(plan, round_cells, l) > s.workspace.most_segments() || (wanted && n > wanted)) continue;
    double const us = cost.split_us(rounds, sequences, n, l);
    if (best_chunks == 0 || (us < s.split_us && !wanted)) best_chunks = l, best_segments = n, s.split_us = us;
  }
  if (!best_chunks) return;
  s.reason = wanted ? SplitReason::kWanted : SplitReason::kCost;
  if (wanted || s.split_us < ScanCost::kWorthwhile * s.unsplit_us)
    s.segment_chunks = best_chunks, s.mean_segments = best_segments;
}

inline ChunkFwdSchedule schedule_chunk_fwd(ChunkFwdVariant const& variant, ChunkFwdCall const& call,
                                           DeviceTraits const& device) {
  ChunkPlan const& plan = call.plan;
  ChunkFwdCost const cost{variant, call, device};
  ChunkFwdSchedule s;
  s.workspace = lay_out_workspace(variant, call, device);
  int64_t const cells = plan.cells(), most_cells = s.workspace.most_cells;
  int64_t const equal_cells = cells ? divide_up(cells, divide_up(cells, most_cells)) : 0;
  ChunkFwdUnsplit const unsplit = schedule_unsplit(cost, most_cells, equal_cells);
  choose_split(s, cost, equal_cells, unsplit.us);
  bool const split = s.segment_chunks;

  s.beside = device.overlaps_kernels && !split;
  if (!split) s.reserved = unsplit.reserved, s.teams = unsplit.teams;
  s.last_first = !split && !s.reserved && plan.sequences == 1;
  int64_t const round_cells = split ? equal_cells : unsplit.round_cells;
  auto const round_of = [&](int64_t n) {
    int32_t const walkers = s.reserved ? int32_t(std::min<int64_t>(unsplit.walkers, n))
                                       : variant.prepare.walk(n, call.value_heads, device).walkers;
    return ChunkFwdRound{n, walkers, round_segments(plan, n, split ? s.segment_chunks : unsplit_chunks(plan))};
  };
  s.rounds = cells ? divide_up(cells, round_cells) : 1;
  s.whole = round_of(round_cells), s.last = round_of(cells - (s.rounds - 1) * round_cells);

  if (cells == 0) return s;
  int64_t const rounds = divide_up(cells, equal_cells);
  s.total_us = split ? s.split_us : s.unsplit_us;
  s.prepare_us = double(rounds) * cost.prepare_us(rounds);
  s.scan_us = split ? s.split_us - s.prepare_us : double(rounds) * cost.scan_us(rounds);
  return s;
}

}  // namespace kda
