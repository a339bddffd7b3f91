// plants NAME: runs a kernel that is wrong on purpose, for the sanitizer that must find it; exits 0 where it does not.
// sanitize.py knows the list from the marks "PLANT sanitizer name: what the report says" beside the faulty lines.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "tests/misuse.h"

namespace kda::tests {
namespace {

struct Cells {
  alignas(128) uint32_t word[128];
};

// ---- races -----------------------------------------------------------------------------------------------------

/// The buffer is refilled while others still read it: the second barrier is missing on even steps.
void refill_without_barrier(uint32_t* global) {
  KDA_SHARED(Cells, s);
  uint32_t sum = 0;
  for (int step = 0; step < 4; ++step) {
    s.word[thread_index()] = step;  // PLANT tsan refill_without_barrier: data race
    sync_block();
    sum += s.word[(thread_index() + 37 * (step + 1)) % 128];
    if (step % 2) sync_block();
  }
  global[thread_index()] = sum;
}
/// A warp's barrier where the block's is needed.
void warp_barrier_for_block(uint32_t* global) {
  KDA_SHARED(Cells, s);
  s.word[thread_index()] = thread_index();  // PLANT tsan warp_barrier_for_block: data race
  sync_warp();
  global[thread_index()] = s.word[(thread_index() + 37) % 128];
}
/// Only warps that ran earlier, in order, are read: no wrong number unless the schedule changes.
void hidden_by_order(uint32_t* global) {
  KDA_SHARED(Cells, s);
  s.word[thread_index()] = thread_index();  // PLANT tsan hidden_by_order: data race
  sync_warp();
  global[thread_index()] = s.word[thread_index() % 32];
}
/// A sum without an atomic: right in every schedule of whole fibers, wrong on every GPU. Only ThreadSanitizer sees it.
void lost_updates(uint32_t* global) {
  KDA_SHARED(Cells, s);
  if (thread_index() == 0) s.word[0] = 0;
  sync_block();
  s.word[0] += thread_index();  // PLANT tsan lost_updates: data race
  sync_block();
  global[thread_index()] = s.word[0];
}
/// Shuffles order nothing in memory.
void shuffle_is_no_barrier(uint32_t* global) {
  KDA_SHARED(Cells, s);
  s.word[thread_index()] = 1;  // PLANT tsan shuffle_is_no_barrier: data race
  uint32_t const lane = shuffle(uint32_t(thread_index()), 3);
  global[thread_index()] = s.word[lane] + s.word[thread_index() ^ 1];
}
/// One warp still reads a stage that the next bulk copy fills: nobody waits until it is empty.
void stage_loaded_while_read(uint32_t* global) {
  KDA_SHARED(Words, s);
  if (thread_index() == 0) {
    mbarrier_init(s.barrier[0], 1);
    fence_mbarrier_init();
  }
  sync_block();
  uint32_t sum = 0;
  for (int i = 0; i < 2; ++i) {
    if (thread_index() == 0) {
      mbarrier_arrive_expect_tx(s.barrier[0], 512);
      bulk_load(s.word, global, 512, s.barrier[0]);  // PLANT tsan stage_loaded_while_read: data race
    }
    mbarrier_wait(s.barrier[0], i);
    sum += s.word[thread_index()];
  }
  global[thread_index()] = sum;
}
/// A reader that does not wait for the copy.
void load_not_waited_for(uint32_t* global) {
  KDA_SHARED(Words, s);
  if (thread_index() == 0) {
    mbarrier_init(s.barrier[0], 1);
    fence_mbarrier_init();
  }
  sync_block();
  if (thread_index() == 0) {
    mbarrier_arrive_expect_tx(s.barrier[0], 512);
    bulk_load(s.word, global, 512, s.barrier[0]);
    mbarrier_wait(s.barrier[0], 0);
  }
  global[thread_index()] = s.word[thread_index()];  // PLANT tsan load_not_waited_for: data race
}
/// A barrier used by threads that cannot know of its init.
void barrier_not_announced(uint32_t*) {
  KDA_SHARED(Words, s);
  if (thread_index() == 0) mbarrier_init(s.barrier[0], 1);
  if (thread_index() == 32) mbarrier_arrive(s.barrier[0]);  // PLANT tsan barrier_not_announced: data race
}
/// Another warp overwrites what a bulk store has yet to read.
void store_overwritten(uint32_t* global) {
  KDA_SHARED(Words, s);
  s.word[thread_index()] = 1;
  fence_proxy_async();
  sync_block();
  if (thread_index() == 0) {
    bulk_store(global, s.word, 512);
    bulk_store_commit();
    bulk_store_wait<0>();
  }
  if (thread_index() >= 32) s.word[thread_index()] = 2;  // PLANT tsan store_overwritten: data race
}
struct Operands {
  tile::SharedTile<Bf16, 64, 64> a, b;
};
/// A warp overwrites the operand of a product that other warps of the group have not waited for.
void operand_overwritten(uint32_t* global) {
  KDA_SHARED(Operands, s);
  for (int i = thread_index(); i < 64 * 64; i += 128) s.a.data[i] = s.b.data[i] = from_float<Bf16>(1.f);
  fence_proxy_async();
  sync_block();
  MmaAccumulator d[8];
  wgmma_m64k16_shared<Bf16, 64, false, false>(d, wgmma_descriptor(s.a.data, 0, 1024),
                                              wgmma_descriptor(s.b.data, 0, 1024), false);
  wgmma_commit();
  if (thread_index() == 96) s.b.data[0] = from_float<Bf16>(2.f);  // PLANT tsan operand_overwritten: data race
  wgmma_wait<0>();
  global[thread_index()] = uint32_t(d[0].x[0]);
}

// ---- between blocks and kernels ---------------------------------------------------------------------------------

/// Right in every schedule that visits the blocks in order.
void blocks_without_flag(uint32_t* global) {
  if (blockIdx.x == 0) global[thread_index()] = 1;
  else global[128 + thread_index()] = global[thread_index()];  // PLANT tsan blocks_without_flag: data race
}
void let_next_and_write(uint32_t* global) {
  let_next_kernel_start();
  global[thread_index()] = 1;
}
void kernel_not_waited_for(uint32_t* global) {
  global[128 + thread_index()] = global[thread_index() ^ 1];  // PLANT tsan kernel_not_waited_for: data race
  wait_for_previous_kernel();
}
/// One thread waits and then others go on without a barrier.
void kernel_waited_for_by_another(uint32_t* global) {
  if (thread_index() == 0) wait_for_previous_kernel();
  global[128 + thread_index()] = global[thread_index() ^ 1];  // PLANT tsan kernel_waited_for_by_another: data race
}
/// What the kernel before reads is overwritten.
void let_next_and_read(uint32_t* global) {
  let_next_kernel_start();
  global[128 + thread_index()] = global[thread_index()];
}
void overwritten_while_read(uint32_t* global) {
  global[thread_index()] = 1;  // PLANT tsan overwritten_while_read: data race
  wait_for_previous_kernel();
}
/// The flag tells of thread 0's own writes only.
void raise_without_barrier(uint32_t* global) {
  let_next_kernel_start();
  global[thread_index()] = 1;
  if (thread_index() == 0) raise_flag(&global[1000], 1);
}
void raise_and_write(uint32_t* global) {
  let_next_kernel_start();
  sync_block();
  if (thread_index() == 0) raise_flag(&global[1000], 1);
  global[thread_index()] = 1;
}
void flag_without_barrier(uint32_t* global) {
  wait_flag(&global[1000], 1);
  global[128 + thread_index()] = global[thread_index()];  // PLANT tsan flag_without_barrier: data race
  wait_for_previous_kernel();
}
void written_after_flag(uint32_t* global) {
  wait_flag(&global[1000], 1);
  global[128 + thread_index()] = global[thread_index()];  // PLANT tsan written_after_flag: data race
  wait_for_previous_kernel();
}
/// A warp that is not the one that waited.
void flag_seen_by_another(uint32_t* global) {
  if (thread_index() < 32) wait_flag(&global[1000], 1);
  global[128 + thread_index()] = global[0];  // PLANT tsan flag_seen_by_another: data race
  wait_for_previous_kernel();
}
void write_and_raise(uint32_t* global) {
  let_next_kernel_start();
  global[thread_index()] = 1;
  sync_block();
  if (thread_index() == 0) raise_flag(&global[1000], 1);
}

// ---- overruns --------------------------------------------------------------------------------------------------

void shared_overrun(uint32_t*) {
  KDA_SHARED(Cells, first);
  KDA_SHARED(Cells, second);
  first.word[thread_index() + 1] = 1;  // PLANT asan shared_overrun: use-after-poison
  second.word[thread_index()] = 1;
}
void dynamic_shared_overrun(uint32_t*) {
  KDA_DYNAMIC_SHARED(Words, s);
  uint32_t* const word = s->word;
  word[sizeof(Words) / 4 + thread_index()] = 1;  // PLANT asan dynamic_shared_overrun: use-after-poison
}
void global_overrun(uint32_t* global) {
  global[1024 - 127 + thread_index()] = 1;  // PLANT asan global_overrun: heap-buffer-overflow
}
void register_overrun(uint32_t* global) {
  uint32_t registers[4] = {1, 2, 3, 4};
  uint32_t* volatile p = registers;
  if (thread_index() == 5) global[0] = p[thread_index()];  // PLANT asan register_overrun: stack-buffer-overflow
}
void copy_overrun(uint32_t* global) {
  KDA_SHARED(Cells, s);
  cp_async_16(&s.word[thread_index() * 4 % 128 + 4], global);  // PLANT asan copy_overrun: use-after-poison
  cp_async_commit();
  cp_async_wait<0>();
}
void bulk_load_overrun(uint32_t* global) {
  KDA_SHARED(Cells, s);
  KDA_SHARED(Mbarrier, full);
  if (thread_index() != 0) return;
  mbarrier_init(full, 1);
  mbarrier_arrive_expect_tx(full, 528);
  bulk_load(s.word, global, 528, full);  // PLANT asan bulk_load_overrun: use-after-poison
  mbarrier_wait(full, 0);
}
void bulk_load_of_too_much(uint32_t* global) {
  KDA_SHARED(Words, s);
  if (thread_index() != 0) return;
  mbarrier_init(s.barrier[0], 1);
  mbarrier_arrive_expect_tx(s.barrier[0], 512);
  bulk_load(s.word, global + 1024 - 64, 512, s.barrier[0]);  // PLANT asan bulk_load_of_too_much: heap-buffer-overflow
  mbarrier_wait(s.barrier[0], 0);
}
void bulk_store_overrun(uint32_t* global) {
  KDA_SHARED(Words, s);
  if (thread_index() != 0) return;
  for (int i = 0; i < 128; ++i) s.word[i] = 0;
  bulk_store(global + 1024 - 64, s.word, 512);  // PLANT asan bulk_store_overrun: heap-buffer-overflow
  bulk_store_commit();
  bulk_store_wait<0>();
}
void tensor_load_overrun(uint32_t* global) {
  KDA_SHARED(Cells, s);
  KDA_SHARED(Mbarrier, full);
  if (thread_index() != 0) return;
  TensorMap const map =
      make_tensor_map<float, 2>(reinterpret_cast<float*>(global), {32, 16}, {32}, {32, 8}, TensorSwizzle::kNone);
  mbarrier_init(full, 1);
  mbarrier_arrive_expect_tx(full, 1024);
  tensor_load(s.word, map, {0, 0}, full);  // PLANT asan tensor_load_overrun: use-after-poison
  mbarrier_wait(full, 0);
}
void tensor_map_of_too_much(uint32_t* global) {
  KDA_SHARED(Words, s);
  if (thread_index() != 0) return;
  TensorMap const map =
      make_tensor_map<float, 2>(reinterpret_cast<float*>(global), {32, 64}, {32}, {32, 8}, TensorSwizzle::kNone);
  mbarrier_init(s.barrier[0], 1);
  mbarrier_arrive_expect_tx(s.barrier[0], 1024);
  tensor_load(s.word, map, {0, 30}, s.barrier[0]);  // PLANT asan tensor_map_of_too_much: heap-buffer-overflow
  mbarrier_wait(s.barrier[0], 0);
}
/// The image of B ends before what the descriptor names.
void descriptor_overrun(uint32_t* global) {
  KDA_SHARED(Operands, s);
  for (int i = thread_index(); i < 64 * 64; i += 128) s.a.data[i] = s.b.data[i] = from_float<Bf16>(1.f);
  fence_proxy_async();
  sync_block();
  MmaAccumulator d[8];
  wgmma_m64k16_shared<Bf16, 64, false, false>(d, wgmma_descriptor(s.a.data, 0, 1024),
                                              wgmma_descriptor(s.b.data, 0, 2048), false);
  wgmma_commit();
  wgmma_wait<0>();  // PLANT asan descriptor_overrun: use-after-poison
  global[thread_index()] = uint32_t(d[0].x[0]);
}
void undefined_shift(uint32_t* global) {
  int volatile bits = 31 + thread_index();
  global[thread_index()] = uint32_t(1 << bits);  // PLANT asan undefined_shift: shift exponent
}

/// One block of `kernel`; or two; or one behind another kernel, beside which it runs.
struct Plant {
  Kernel kernel;
  unsigned blocks = 1;
  Kernel before = nullptr;
};
std::map<std::string, Plant> const kPlants = {
#define PLANTED(name) \
  {                   \
    #name, { name }   \
  }
#define PLANTED_IN_BLOCKS(name, blocks) \
  {                                     \
    #name, { name, blocks }             \
  }
#define PLANTED_BEHIND(before, name) \
  {                                  \
    #name, { name, 1, before }       \
  }
    PLANTED(refill_without_barrier),
    PLANTED(warp_barrier_for_block),
    PLANTED(hidden_by_order),
    PLANTED(lost_updates),
    PLANTED(shuffle_is_no_barrier),
    PLANTED(stage_loaded_while_read),
    PLANTED(load_not_waited_for),
    PLANTED(barrier_not_announced),
    PLANTED(store_overwritten),
    PLANTED(operand_overwritten),
    PLANTED(shared_overrun),
    PLANTED(dynamic_shared_overrun),
    PLANTED(global_overrun),
    PLANTED(register_overrun),
    PLANTED(copy_overrun),
    PLANTED(bulk_load_overrun),
    PLANTED(bulk_load_of_too_much),
    PLANTED(bulk_store_overrun),
    PLANTED(tensor_load_overrun),
    PLANTED(tensor_map_of_too_much),
    PLANTED(descriptor_overrun),
    PLANTED(undefined_shift),
    PLANTED_IN_BLOCKS(blocks_without_flag, 2),
    PLANTED_BEHIND(let_next_and_write, kernel_not_waited_for),
    PLANTED_BEHIND(let_next_and_write, kernel_waited_for_by_another),
    PLANTED_BEHIND(let_next_and_read, overwritten_while_read),
    PLANTED_BEHIND(raise_without_barrier, flag_without_barrier),
    PLANTED_BEHIND(raise_and_write, written_after_flag),
    PLANTED_BEHIND(write_and_raise, flag_seen_by_another),
#undef PLANTED_BEHIND
#undef PLANTED_IN_BLOCKS
#undef PLANTED
};

}  // namespace
}  // namespace kda::tests

int main(int argc, char** argv) {
  using namespace kda::tests;
  auto const plant = argc == 2 ? kPlants.find(argv[1]) : kPlants.end();
  if (plant == kPlants.end()) return std::fprintf(stderr, "usage: %s NAME\n", argv[0]), 2;
  auto* global = static_cast<uint32_t*>(std::aligned_alloc(128, 1024 * 4));
  std::memset(global, 0, 1024 * 4);
  kda::emulator::options().has_wgmma = true;  // kernels overlap
  auto const [kernel, blocks, before] = plant->second;
  {
    kda::OverlapScope const overlap;
    if (before) kda::launch("planted", before, dim3(1), dim3(128), sizeof(Words), nullptr, global);
    kda::launch_early(before, "planted", kernel, dim3(blocks), dim3(128), sizeof(Words), nullptr, global);
  }
  std::free(global);
  return 0;
}
