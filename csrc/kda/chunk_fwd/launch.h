// What the host knows of one compiled variant.
#pragma once
#include <algorithm>
#include <cstddef>
#include <vector>

#include "kda/chunk/shape.h"
#include "kda/chunk_fwd/params.h"
#include "kda/chunk/record.h"
#include "kda/dtype.h"
#include "platform/launch.h"

namespace kda {

inline constexpr double kWorkspaceShare = 1.5;  // of the bytes of q and k: records
inline constexpr double kSegmentShare = 0.25;   // of the records: states of segments, and never more than
inline constexpr int64_t kMostSegmentBytes = 32 << 20;
inline constexpr size_t kRecordAlignment = 1024;

/// What a variant takes, in microseconds on an H100 (bench/log): fitted to measurements of bf16_k128_sm90,
/// fp16_k128_sm90, fp32_k128, bf16_k64_sm90 and bf16_k256; the others are taken to be like these. What has to be moved
/// takes what it takes at copy_tb_s().
struct ScanCost {
  double turn, turn_alone;            // a chunk of a block of prepare: as many per SM as fit, one
  double replay, summarise;           // a chunk of a block
  static constexpr double kJoin = 5;  // a segment
  static constexpr double kLaunch = 5;
  static constexpr double kWorthwhile = 0.9;  // of the time without a split

  ScanCost(Dtype dtype, int key_tile) {
    if (dtype == Dtype::kFloat32) {  // three products; chunks of 32 (K = 64) or 16 tokens
      turn = key_tile == 256 ? 60 : 41, replay = key_tile == 256 ? 4 : 2.8;
    } else {  // in fp16 the gates are mostly too steep for one anchor per 16 tokens
      turn = (dtype == Dtype::kFloat16 ? 1.9 : 1) * (key_tile == 64 ? 14 : 15), replay = key_tile == 64 ? 0.9 : 1.1;
    }
    turn_alone = turn * 2 / 3, summarise = replay * 7 / 11;
  }
};

/// Of a call, predicted, in microseconds: its kernels, one after another, and all, which may run beside each other.
struct ChunkFwdPrediction {
  double prepare, scan, total;
};

/// Whether sequences are split into segments, and why.
struct ScanSplit {
  int64_t segment_chunks = 0;  // 0: not split
  int64_t segments = 1;        // of a sequence of mean length, in one part of the work
  // Predicted for the call; of the best split, 0 if there is none.
  double unsplit_us = 0, split_us = 0;
};

/// The shape of a call.
struct ChunkFwdCall {
  ChunkPlan plan;
  int value_heads, key_dim, value_dim;
  bool batch_invariant;

  explicit ChunkFwdCall(ChunkFwdParams const& p)
      : plan(p.plan),
        value_heads(p.value_heads),
        key_dim(p.key_dim),
        value_dim(p.value_dim),
        batch_invariant(p.batch_invariant) {}
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// No more segments than this have chunks in a part of so many slots. Between the first and the last slot, d slots and
/// m sequences apart, lie (d - m) / L + m segments, and less than one each for where the chunk and its sequence begin.
inline int64_t part_segments(ChunkPlan const& plan, int64_t part_slots, int64_t segment_chunks) {
  int64_t const all = plan.with_chunk(segment_chunks * plan.chunk).slots();
  if (part_slots == 0) return plan.sequences;
  int64_t const further = std::min<int64_t>(plan.sequences, part_slots) - 1;
  return std::min(all, 1 + (part_slots - 1 + (further + 2) * (segment_chunks - 1)) / segment_chunks);
}

struct ChunkFwdVariant {
  char const* name;
  Dtype dtype;
  int chunk, key_tile;
  bool wgmma;                             // needs compute capability 9.0
  size_t record_bytes, value_tile_bytes;  // workspace per slot and value head, and per tile of V there
  size_t prepare_shared_bytes, scan_shared_bytes;
  int prepare_threads;  // of a team
  int prepare_teams;    // that a multiprocessor of compute capability 9.0 holds
  int scan_threads;
  std::vector<KernelLaunch> (*kernels)();
  void (*launch)(ChunkFwdParams, cudaStream_t);

  /// Of one chunk of one value head in the workspace.
  size_t cell_bytes(int value_dim) const { return record_bytes + value_tiles(value_dim) * value_tile_bytes; }
  size_t shared_bytes() const { return std::max(prepare_shared_bytes, scan_shared_bytes); }

  /// The work goes in parts where the workspace would be large beside the inputs (kWorkspaceShare).
  int64_t part_slots(ChunkFwdCall const& call) const {
    int64_t const slots = call.plan.slots();
    return slots ? divide_up(slots, divide_up(slots, most_slots(call))) : 0;
  }

  /// How the kernels of a call share the device, where sequences are not split. Where kernels can run beside each
  /// other, the scan follows the prepare kernel record by record; it gets multiprocessors of its own if that pays.
  struct Schedule {
    int64_t part_slots = 0;
    int64_t reserved = 0;  // multiprocessors left to the scan; 0: it gets them as the prepare kernel ends
    int32_t walkers = 0;   // of the prepare kernel for each value head; 0: prepare_walk
    int teams = 1;         // in each of its blocks; all that fit, so that no other fits beside them
    double us = 0;         // predicted
  };
  Schedule schedule(ChunkFwdCall const& call) const {
    int64_t const scan = scan_blocks(call), left = multiprocessors() - scan, slots = call.plan.slots();
    if (slots == 0) return {};
    Schedule best{part_slots(call), 0, 0, 1, sequential_us(call)};
    if (!overlaps_kernels() || 4 * scan > 3 * multiprocessors()) return best;
    int const teams = slots * call.value_heads > left ? prepare_teams : 1;
    if (teams > 1 && !wgmma) return best;  // for these no kernel with blocks of several teams is compiled
    int64_t const most = most_slots(call),
                  most_walkers = std::min(std::max<int64_t>(left * teams / call.value_heads, 1), most);
    for (int64_t walkers = most_walkers; 2 * walkers > most_walkers; --walkers) {  // fewer may come out even
      int64_t const parts = divide_up(slots, most / walkers * walkers),
                    part = std::min(most, divide_up(divide_up(slots, parts), walkers) * walkers),
                    turns = (parts - 1) * (part / walkers) + divide_up(slots - (parts - 1) * part, walkers);
      double const us = beside_us(call, parts, turns, teams);
      if (us < best.us) best = {part, scan, int32_t(walkers), teams, us};
    }
    return best;
  }
  /// Blocks of an unsplit scan that run together.
  int64_t scan_blocks(ChunkFwdCall const& call) const {
    return std::min(call.plan.slots(), int64_t(call.plan.sequences)) * call.value_heads * value_tiles(call.value_dim);
  }

  // The workspace: room to align, records of one part, two states per value head where there is more than one part,
  // counters of progress, states of segments. Never less for more tokens or sequences: how equal the parts are, and
  // whether sequences are split, does not show.
  size_t workspace_bytes(ChunkFwdCall const& call) const {
    return kRecordAlignment + segments_offset(call) + segment_bytes(call);
  }
  size_t carry_offset(ChunkFwdCall const& call) const { return size_t(most_slots(call)) * slot_bytes(call); }
  size_t progress_offset(ChunkFwdCall const& call) const {
    size_t const states = most_slots(call) < call.plan.slots() ? 2 * size_t(call.value_heads) : 0;
    return carry_offset(call) + states * size_t(state_floats(call.value_dim, key_tile)) * sizeof(float);
  }
  int64_t progress_counters(ChunkFwdCall const& call) const { return progress_counters(call, most_slots(call)); }
  size_t segments_offset(ChunkFwdCall const& call) const {
    return progress_offset(call) + size_t(progress_counters(call)) * sizeof(uint32_t);
  }
  /// None where the heads of one sequence fill half of the device: a split costs more than twice the arithmetic.
  size_t segment_bytes(ChunkFwdCall const& call) const {
    bool const fills = 2 * int64_t(call.value_heads) * value_tiles(call.value_dim) > multiprocessors();
    if (call.batch_invariant || call.plan.slots() < 2 || (fills && !wanted_segments())) return 0;
    int64_t const share = std::min(int64_t(kSegmentShare * double(carry_offset(call))), kMostSegmentBytes);
    int64_t const most = std::max(share, small_workspace()) / int64_t(bytes_per_segment(call));
    return size_t(std::min(most, part_segments(call.plan, most_slots(call), 1))) * bytes_per_segment(call);
  }

  /// Chosen from the shape and the device alone: lengths in cu_seqlens are taken as equal.
  ScanSplit split(ChunkFwdCall const& call) const {
    int64_t const part = part_slots(call), most = int64_t(segment_bytes(call) / bytes_per_segment(call));
    ChunkPlan const& plan = call.plan;
    int64_t const chunks = std::min(mean_chunks(plan), part);
    if (chunks == 0) return {};
    int64_t const together = std::max<int64_t>(1, std::min<int64_t>(plan.sequences, part / chunks)) * call.value_heads;
    int64_t const columns = together * value_tiles(call.value_dim), rows = together * (key_tile / kValueTile);
    double const parts = double(divide_up(plan.slots(), part));
    auto const waves = [](int64_t blocks) { return double(divide_up(blocks, multiprocessors())); };
    ScanSplit best;
    best.unsplit_us = schedule(call).us;
    double const chunk_heads = part_chunk_heads(call, int64_t(parts));
    double const prepare = prepare_us(call, int64_t(parts));
    int64_t best_length = 0;
    for (int64_t l = 1; l < chunks; l *= 2) {
      int64_t const n = divide_up(chunks, l);
      if (part_segments(plan, part, l) > most || (wanted_segments() && n > wanted_segments())) continue;
      double const summaries = waves((n - 1) * columns + (n - 2) * rows) * double(l) * cost().summarise,
                   replays = waves(n * columns) * double(l) * cost().replay;
      double const us = parts * (prepare + 3 * ScanCost::kLaunch + double(n - 2) * ScanCost::kJoin +
                                 std::max(summaries, chunk_heads * summarise_traffic_us(call)) +
                                 std::max(replays, chunk_heads * replay_traffic_us(call)));
      if (best_length == 0 || (us < best.split_us && !wanted_segments()))
        best_length = l, best.segments = n, best.split_us = us;
    }
    if (best_length && (wanted_segments() || best.split_us < ScanCost::kWorthwhile * best.unsplit_us))
      best.segment_chunks = best_length;
    else best.segments = 1;
    return best;
  }

  ScanCost cost() const { return {dtype, key_tile}; }
  ChunkFwdPrediction predict(ChunkFwdCall const& call) const {
    int64_t const slots = call.plan.slots();
    if (slots == 0) return {};
    ScanSplit const split = this->split(call);
    int64_t const parts = divide_up(slots, part_slots(call));
    double const prepare = double(parts) * prepare_us(call, parts);
    if (split.segment_chunks) return {prepare, split.split_us - prepare, split.split_us};
    return {prepare, double(parts) * scan_us(call, parts), split.unsplit_us};
  }

  /// How many walkers the prepare kernel has for each value head, so that the last wave of them is nearly full, and
  /// what it then takes. A further chunk of a walker hides its loads behind the one before; the first cannot.
  struct Walk {
    int32_t walkers;
    double us;
  };
  Walk prepare_walk(int64_t part_slots, int value_heads) const {
    Walk best{1, 0};
    for (int32_t turns = 1; turns <= 16; ++turns) {
      int64_t const walkers = std::max<int64_t>(divide_up(part_slots, turns), 1), all = walkers * value_heads,
                    waves = divide_up(all, int64_t(multiprocessors()) * prepare_teams);
      double const us =
          double(waves) * (turns + kFirstLoad) * (all <= multiprocessors() ? cost().turn_alone : cost().turn);
      if (turns == 1 || us < best.us) best = {int32_t(walkers), us};
    }
    return best;
  }

 private:
  static constexpr double kFirstLoad = 0.3;   // of a turn
  static constexpr double kBesideScan = 1.1;  // of a turn, whose loads and stores meet those of the scan

  static double part_chunk_heads(ChunkFwdCall const& call, int64_t parts) {
    return double(call.plan.slots() * call.value_heads) / double(parts);
  }
  /// Of one of `parts` parts: its prepare kernel; its scan, unsplit.
  double prepare_us(ChunkFwdCall const& call, int64_t parts) const {
    double const us = prepare_walk(divide_up(call.plan.slots(), parts), call.value_heads).us;
    return ScanCost::kLaunch + std::max(us, part_chunk_heads(call, parts) * prepare_traffic_us(call));
  }
  /// Chunks of a sequence of mean length.
  static int64_t mean_chunks(ChunkPlan const& plan) {
    return plan.chunks_of(plan.cu_seqlens ? divide_up(plan.tokens, plan.sequences) : plan.tokens);
  }
  double scan_us(ChunkFwdCall const& call, int64_t parts) const {
    int64_t const waves = divide_up(scan_blocks(call), multiprocessors());
    double const us = double(waves * mean_chunks(call.plan)) / double(parts) * cost().replay;
    return ScanCost::kLaunch + std::max(us, part_chunk_heads(call, parts) * replay_traffic_us(call));
  }
  double sequential_us(ChunkFwdCall const& call) const {
    int64_t const parts = divide_up(call.plan.slots(), part_slots(call));
    return double(parts) * (prepare_us(call, parts) + scan_us(call, parts));
  }
  /// The scan beside the prepare kernel, which takes so many turns. Sequences are prepared one after another.
  double beside_us(ChunkFwdCall const& call, int64_t parts, int64_t turns, int teams) const {
    double const turn = kBesideScan * (teams == 1 ? cost().turn_alone : cost().turn),
                 prepare = (turns + kFirstLoad) * turn, others = 1 - 1 / double(std::max(1, call.plan.sequences));
    double const last = prepare * others + (1 + kFirstLoad) * turn + mean_chunks(call.plan) * cost().replay,
                 traffic = part_chunk_heads(call, 1) * (prepare_traffic_us(call) + replay_traffic_us(call));
    return double(1 + parts) * ScanCost::kLaunch + std::max({prepare, last, traffic});
  }
  int element_bytes() const { return dtype == Dtype::kFloat32 ? 4 : 2; }
  // What a chunk of a head takes to move: inputs and record; record and outputs; what it takes without outputs.
  static double traffic_us(size_t bytes) { return double(bytes) / copy_tb_s() * 1e-6; }
  double prepare_traffic_us(ChunkFwdCall const& call) const {
    size_t const inputs = size_t(chunk) * size_t(3 * call.key_dim + call.value_dim + 1) * size_t(element_bytes());
    return traffic_us(inputs + slot_bytes(call) / size_t(call.value_heads));
  }
  double replay_traffic_us(ChunkFwdCall const& call) const {
    return traffic_us(slot_bytes(call) / size_t(call.value_heads) + size_t(chunk * call.value_dim * element_bytes()));
  }
  double summarise_traffic_us(ChunkFwdCall const& call) const {
    size_t const of_outputs = size_t(chunk * (key_tile + chunk) * element_bytes());  // Q, scores of queries
    return traffic_us(slot_bytes(call) / size_t(call.value_heads) - of_outputs);
  }
  size_t slot_bytes(ChunkFwdCall const& call) const { return size_t(call.value_heads) * cell_bytes(call.value_dim); }
  size_t bytes_per_segment(ChunkFwdCall const& call) const {
    return size_t(call.value_heads) * size_t(segment_floats(call.value_dim, key_tile)) * sizeof(float);
  }
  int64_t progress_counters(ChunkFwdCall const& call, int64_t slots) const {
    int64_t const all = kda::progress_counters(slots * call.value_heads, call.value_heads, call.value_dim);
    return divide_up(all, 4) * 4;  // segments begin at 16 bytes
  }
  /// Slots of a part, at most.
  int64_t most_slots(ChunkFwdCall const& call) const {
    ChunkPlan const& plan = call.plan;
    int64_t const rows = plan.cu_seqlens ? 1 : plan.sequences, element = element_bytes();
    int64_t const inputs = 2 * rows * plan.tokens * call.value_heads * call.key_dim * element;  // q, k of value heads
    int64_t const allowed = std::max(int64_t(kWorkspaceShare * double(inputs)), small_workspace());
    int64_t const counters = 4 * progress_counters(call, 0) + 16,  // bytes, and room to round
        per_slot = int64_t(slot_bytes(call)) + 4 * kCountersPerRecord * call.value_heads;
    return std::min(std::max<int64_t>((allowed - counters) / per_slot, 1), plan.slots());
  }
};

/// Instantiated by the file of each variant.
template <class Variant>
ChunkFwdVariant describe_chunk_fwd();

}  // namespace kda
