// What the forward is predicted to take.
#pragma once
#include "kda/chunk_fwd/launch.h"

namespace kda {

/// What a variant takes beside its prepare kernel (PrepareCost), in microseconds on an H100, fitted to the same
/// measurements. What has to be moved takes what it takes at copy_tb_s of the device.
struct ScanCost {
  double output, summarise;            // a chunk of a block
  static constexpr double kChain = 5;  // a segment
  static constexpr double kLaunch = 5;
  static constexpr double kWorthwhile = 0.9;  // of the time without a split

  ScanCost(Dtype dtype, int key_tile) {
    if (dtype == Dtype::kFloat32) output = key_tile == 256 ? 4 : 2.8;
    else output = key_tile == 64 ? 0.9 : 1.1;
    summarise = output * 7 / 11;
  }
};

/// Of one call on one device, in microseconds. The work goes in `rounds` equal rounds.
struct ChunkFwdCost {
  ChunkFwdVariant const& variant;
  ChunkFwdCall const& call;
  DeviceTraits const& device;
  ScanCost const scan{variant.dtype, variant.key_tile};

  /// Blocks of an unsplit scan that run together.
  int64_t scan_blocks() const {
    return std::min(call.plan.cells(), int64_t(call.plan.sequences)) * call.value_heads * value_tiles(call.value_dim);
  }
  /// Chunks of a sequence of mean length.
  int64_t mean_chunks() const {
    ChunkPlan const& plan = call.plan;
    return plan.chunks_of(plan.cu_seqlens ? divide_up(plan.tokens, plan.sequences) : plan.tokens);
  }

  /// Of one round: its prepare kernel; its scan, unsplit.
  double prepare_us(int64_t rounds) const {
    double const us = variant.prepare.walk(divide_up(call.plan.cells(), rounds), call.value_heads, device).us;
    return ScanCost::kLaunch + std::max(us, chunk_heads(rounds) * prepare_traffic_us());
  }
  double scan_us(int64_t rounds) const {
    double const us = double(waves(scan_blocks()) * mean_chunks()) / double(rounds) * scan.output;
    return ScanCost::kLaunch + std::max(us, chunk_heads(rounds) * output_traffic_us());
  }

  /// Of all rounds, unsplit: the two kernels after each other.
  double sequential_us(int64_t rounds) const { return double(rounds) * (prepare_us(rounds) + scan_us(rounds)); }

  /// The scan beside the prepare kernel, which takes so many turns. Sequences are prepared one after another.
  double beside_us(int64_t rounds, int64_t turns, int teams) const {
    PrepareCost const prepare_cost = variant.prepare.cost();
    double const turn = kBesideScan * (teams == 1 ? prepare_cost.turn_alone : prepare_cost.turn),
                 prepare = (turns + kFirstLoad) * turn, others = 1 - 1 / double(std::max(1, call.plan.sequences));
    double const last = prepare * others + (1 + kFirstLoad) * turn + mean_chunks() * scan.output,
                 traffic = chunk_heads(1) * (prepare_traffic_us() + output_traffic_us());
    return double(1 + rounds) * ScanCost::kLaunch + std::max({prepare, last, traffic});
  }

  /// Of all rounds, each with so many sequences beside each other, in n segments of so many chunks.
  double split_us(int64_t rounds, int64_t sequences, int64_t n, int64_t segment_chunks) const {
    int64_t const together = sequences * call.value_heads;
    int64_t const columns = together * value_tiles(call.value_dim), rows = together * (variant.key_tile / kValueTile);
    double const summaries =
                     double(waves((n - 1) * columns + (n - 2) * rows)) * double(segment_chunks) * scan.summarise,
                 outputs = double(waves(n * columns)) * double(segment_chunks) * scan.output;
    return double(rounds) * (prepare_us(rounds) + 3 * ScanCost::kLaunch + double(n - 2) * ScanCost::kChain +
                             std::max(summaries, chunk_heads(rounds) * summarise_traffic_us()) +
                             std::max(outputs, chunk_heads(rounds) * output_traffic_us()));
  }

 private:
  static constexpr double kFirstLoad = PrepareVariant::kFirstLoad;
  static constexpr double kBesideScan = 1.1;  // of a turn, whose loads and stores meet those of the scan

  int64_t waves(int64_t blocks) const { return divide_up(blocks, device.multiprocessors); }
  double chunk_heads(int64_t rounds) const { return double(call.plan.cells() * call.value_heads) / double(rounds); }
  // What a chunk of a head takes to move: inputs and record; record and outputs; what it takes without outputs.
  double traffic_us(size_t bytes) const { return double(bytes) / device.copy_tb_s * 1e-6; }
  double prepare_traffic_us() const {
    int const columns = 3 * call.key_dim + call.value_dim + 1;
    return traffic_us(size_t(variant.chunk) * size_t(columns) * size_t(variant.element_bytes()) + cell_bytes());
  }
  double output_traffic_us() const {
    return traffic_us(cell_bytes() + size_t(variant.chunk * call.value_dim * variant.element_bytes()));
  }
  double summarise_traffic_us() const {
    int const of_outputs = variant.chunk * (variant.key_tile + variant.chunk);  // Q, scores of queries
    return traffic_us(cell_bytes() - size_t(of_outputs * variant.element_bytes()));
  }
  size_t cell_bytes() const { return variant.cell_bytes(call.value_dim); }
};

}  // namespace kda
