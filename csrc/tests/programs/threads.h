// launch, thread indices, shared memory, barriers, exchange within a warp, setmaxnreg.
#pragma once
#include "tests/programs/program.h"

namespace kda::tests {

// ---- launch, shared memory -------------------------------------------------------------------------------------

struct IndexRecord {
  uint32_t thread, anew, warp, lane, x, y, z, block, grid;
};
KDA_GLOBAL void indices_kernel(IndexRecord* out) {
  unsigned const block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  unsigned const thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  unsigned const threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = {uint32_t(thread_index()),
                                   uint32_t(thread_index_anew()),
                                   uint32_t(warp_index()),
                                   uint32_t(lane_index()),
                                   threadIdx.x,
                                   threadIdx.y,
                                   threadIdx.z,
                                   block,
                                   gridDim.x * gridDim.y * gridDim.z};
}
inline std::vector<IndexRecord> indices() { return run(indices_kernel, dim3(2, 3, 2), dim3(32, 2, 3), 0, 12 * 192); }

struct SharedWords {
  uint32_t word[64];
};
struct SharedWords2 {
  SharedWords at[2];
};
struct SharedWords6 {
  SharedWords at[6];
};
/// Objects of static and dynamic shared memory do not overlap, and a block starts with none of the last one's content.
KDA_GLOBAL void shared_kernel(uint32_t* out, uint32_t by_value, SharedWords const structure) {
  KDA_DYNAMIC_SHARED(SharedWords, dynamic);
  KDA_SHARED(SharedWords, first);
  KDA_SHARED(SharedWords, second);
  int const t = thread_index();
  dynamic->word[t] = by_value + t;
  first.word[t] = structure.word[t];
  second.word[t] = t * 3;
  sync_block();
  out[blockIdx.x * 64 + t] = dynamic->word[63 - t] ^ first.word[63 - t] << 8 ^ second.word[63 - t] << 16;
}
inline std::vector<uint32_t> shared_objects() {
  SharedWords structure;
  for (uint32_t i = 0; i < 64; ++i) structure.word[i] = 255 - i;
  return run(shared_kernel, dim3(3), dim3(64), sizeof(SharedWords), 3 * 64, uint32_t(7), structure);
}

// ---- barriers --------------------------------------------------------------------------------------------------

/// Every step, every thread reads what another wrote in the step before. 96 threads.
KDA_GLOBAL void sync_block_kernel(uint32_t* out, int steps) {
  KDA_SHARED(SharedWords2, pair);
  int const t = thread_index();
  uint32_t x = t;
  uint32_t* const cell = &pair.at[0].word[0];
  for (int s = 0; s < steps; ++s) {
    cell[t] = x;
    sync_block();
    x = x * 5 + cell[(t + 7 * (s + 1)) % 96];
    sync_block();
  }
  out[t] = x;
}
inline std::vector<uint32_t> sync_block_ring() { return run(sync_block_kernel, dim3(1), dim3(96), 0, 96, 6); }

/// Warp 0 produces for warps 1 and 2 through two stages: barrier 1 + s says that stage s is full, 3 + s that it is
/// empty.
KDA_GLOBAL void named_barrier_kernel(uint32_t* out, int steps) {
  KDA_SHARED(SharedWords2, stage);
  int const t = thread_index(), lane = lane_index();
  uint32_t sum = 0;
  for (int i = 0; i < steps; ++i) {
    int const s = i % 2;
    if (t < 32) {
      if (i >= 2) sync_named(3 + s, 96);
      stage.at[s].word[lane] = i * 100 + lane;
      arrive_named(1 + s, 96);
    } else {
      sync_named(1 + s, 96);
      sum = sum * 3 + stage.at[s].word[(lane + t / 32) % 32];
      if (i + 2 < steps) arrive_named(3 + s, 96);
    }
  }
  out[t] = sum;
}
inline std::vector<uint32_t> named_barrier_pipeline() { return run(named_barrier_kernel, dim3(1), dim3(96), 0, 96, 7); }

/// The second kernel starts while the first one still runs, and reads what that one writes last.
KDA_GLOBAL void first_kernel(uint32_t* out) {
  let_next_kernel_start();
  uint32_t x = thread_index();
  for (int i = 0; i < 2000; ++i) x = x * 1664525u + 1013904223u;
  out[blockIdx.x * 64 + thread_index()] = x;
}
KDA_GLOBAL void second_kernel(uint32_t* out, uint32_t const* in) {
  wait_for_previous_kernel();
  int const i = blockIdx.x * 64 + thread_index();
  out[i] = in[i] ^ in[255 - i];
}
inline std::vector<uint32_t> overlapping_kernels() {
  Buffer<uint32_t> const in(std::vector<uint32_t>(256, 0)), out(std::vector<uint32_t>(256, 0));
  {
    OverlapScope const overlap;
    launch("program", first_kernel, dim3(4), dim3(64), 0, nullptr, in.data());
    launch_early(true, "program", second_kernel, dim3(4), dim3(64), 0, nullptr, out.data(),
                 static_cast<uint32_t const*>(in.data()));
  }
  return out.download();
}

/// Each block of the second kernel reads, row after row, what the next block of the first one writes meanwhile.
KDA_GLOBAL void flag_raising_kernel(uint32_t* rows, uint32_t* flags) {
  let_next_kernel_start();
  uint32_t x = blockIdx.x * 64 + thread_index();
  for (int row = 0; row < 5; ++row) {
    for (int i = 0; i < 500; ++i) x = x * 1664525u + 1013904223u;
    rows[(blockIdx.x * 5 + row) * 64 + thread_index()] = x;
    sync_block();
    if (thread_index() == 0) {
      set_flag(&flags[blockIdx.x * 5 + row], 3);
      raise_flag(&flags[20], 2);
    }
  }
}
struct FlaggedRow {
  alignas(128) uint32_t word[64];
  Mbarrier full;
};
/// Odd rows come by bulk copies. What has been read is counted, too, and all blocks wait for all.
KDA_GLOBAL void flag_waiting_kernel(uint32_t* out, uint32_t const* rows, uint32_t* flags) {
  KDA_SHARED(FlaggedRow, s);
  int const t = thread_index(), from = int(blockIdx.x + 1) % 4 * 5;
  if (t == 0) mbarrier_init(s.full, 1), fence_mbarrier_init();
  uint32_t sum = 0;
  for (int row = 0; row < 5; ++row) {
    uint32_t const* const in = rows + (from + row) * 64;
    if (t == 0) wait_flag(&flags[from + row], 3);
    sync_block();
    if (row % 2 == 0) {
      sum = sum * 3 + in[t ^ 33];
    } else {
      if (t == 0) {
        fence_proxy_async_global();
        mbarrier_arrive_expect_tx(s.full, sizeof(s.word));
        bulk_load(s.word, in, sizeof(s.word), s.full);
      }
      mbarrier_wait(s.full, row / 2);
      sum = sum * 3 + s.word[t ^ 33];
    }
    sync_block();
    if (t == 0) raise_flag_after_reads(&flags[21], 1);
  }
  wait_flag(&flags[20], 40);
  wait_flag(&flags[21], 20);
  bool const reached = flag_reached(&flags[20], 40) && !flag_reached(&flags[20], 41);
  out[blockIdx.x * 64 + t] = reached ? sum + rows[(4 * 5 - 1) * 64 + t] : 0;
  wait_for_previous_kernel();
}
inline std::vector<uint32_t> flags() {
  Buffer<uint32_t> const rows(std::vector<uint32_t>(20 * 64, 0)), flags(std::vector<uint32_t>(22, 0)),
      out(std::vector<uint32_t>(256, 0));
  {
    OverlapScope const overlap;
    launch("program", flag_raising_kernel, dim3(4), dim3(64), 0, nullptr, rows.data(), flags.data());
    launch_early(true, "program", flag_waiting_kernel, dim3(4), dim3(64), 0, nullptr, out.data(),
                 static_cast<uint32_t const*>(rows.data()), flags.data());
  }
  return out.download();
}

/// Neighbouring blocks tell each other numbers, zeros among them.
KDA_GLOBAL void publishing_kernel(uint32_t* out, float* numbers) {
  int const t = thread_index(), block = int(blockIdx.x);
  float const own = t % 7 ? float(block * 64 + t) / 3.f : 0.f;
  publish(&numbers[block * 64 + t], own);
  float const other = await_published(&numbers[(block ^ 1) * 64 + (t ^ 5)]);
  out[block * 64 + t] = float_to_bits(2.f * other + own);
}
inline std::vector<uint32_t> published_numbers() {
  Buffer<float> const numbers(std::vector<float>(256, 0.f));
  Buffer<uint32_t> const out(std::vector<uint32_t>(256, 0));
  launch("program", publishing_kernel, dim3(4), dim3(64), 0, nullptr, out.data(), numbers.data());
  return out.download();
}

/// The halves of a warp proceed apart.
KDA_GLOBAL void sync_warp_kernel(uint32_t* out) {
  KDA_SHARED(SharedWords, s);
  int const lane = lane_index();
  uint32_t const mask = lane < 16 ? 0xFFFFu : 0xFFFF0000u;
  uint32_t x = lane;
  for (int i = 0; i < (lane < 16 ? 3 : 5); ++i) {
    s.word[lane] = x;
    sync_warp(mask);
    x = x * 7 + s.word[lane ^ 5];
    sync_warp(mask);
  }
  s.word[lane] = x;
  sync_warp();
  out[lane] = s.word[31 - lane];
}
inline std::vector<uint32_t> sync_warp_halves() { return run(sync_warp_kernel, dim3(1), dim3(32), 0, 32); }

// ---- exchange within a warp ------------------------------------------------------------------------------------

KDA_GLOBAL void shuffle_kernel(uint32_t* out) {
  int const lane = lane_index();
  uint32_t const x = lane * 2654435761u;
  out[lane] = shuffle(x, 5 * lane + 3);  // beyond 31: modulo 32
  out[32 + lane] = shuffle(x, 9);
  for (int bits = 1; bits < 32; ++bits) out[32 + bits * 32 + lane] = shuffle_xor(x, bits);
  out[33 * 32 + lane] = warp_any(lane == 19) + 2 * warp_any(lane > 31);
  out[34 * 32 + lane] =
      warp_count_leading(lane != 13) + 64 * warp_count_leading(true) + 4096 * warp_count_leading(lane);
}
inline std::vector<uint32_t> shuffles() { return run(shuffle_kernel, dim3(1), dim3(32), 0, 35 * 32); }

template <int kCount>
KDA_DEVICE void scatter_sums(float* out, float const* in) {
  float x[kCount];
  for (int i = 0; i < kCount; ++i) x[i] = in[lane_index() * 32 + i];
  out[lane_index()] = group_sum_scattered(x);
  out[32 + lane_index()] = warp_sum_scattered(x);
}
KDA_GLOBAL void sums_kernel(float* out, float const* in) {
  out[lane_index()] = warp_sum(in[lane_index()]);
  scatter_sums<1>(out + 32, in);
  scatter_sums<2>(out + 96, in);
  scatter_sums<4>(out + 160, in);
  scatter_sums<8>(out + 224, in);
  scatter_sums<16>(out + 288, in);
  scatter_sums<32>(out + 352, in);
}
inline std::vector<float> sums_input() { return reals(32 * 32, 1); }
inline std::vector<float> sums() {
  Buffer<float> const in(sums_input());
  return run(sums_kernel, dim3(1), dim3(32), 0, 416, static_cast<float const*>(in.data()));
}

// ---- setmaxnreg ------------------------------------------------------------------------------------------------

/// Three warpgroups of 168 registers: one takes what two give.
KDA_GLOBAL void __launch_bounds__(384, 1) registers_kernel(uint32_t* out) {
  KDA_SHARED(SharedWords6, s);
  int const t = thread_index();
  if (t < 128) {
    set_max_registers<232, true>();
    s.at[t / 64].word[t % 64] = t;
  } else {
    set_max_registers<136, false>();
    s.at[t / 64].word[t % 64] = t;
  }
  sync_block();
  out[t] = s.at[(t + 200) % 384 / 64].word[(t + 200) % 64];
}
inline std::vector<uint32_t> registers() { return run(registers_kernel, dim3(1), dim3(384), 0, 384); }

}  // namespace kda::tests
