// What kda_cuda asks of the library before a call: how it would be launched on the current device. And what the table
// of resources asks: how each kernel is launched on any. Plain C, for ctypes.
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "kda/chunk_bwd/dispatch.h"
#include "kda/decode/dispatch.h"
#include "kda/kda_gate/params.h"
#include "platform/device.h"

namespace kda {
namespace {

std::string microseconds(double x) { return std::to_string(int64_t(x + 0.5)) + " us"; }

/// How the scan is divided, and why.
std::string split_text(ChunkFwdVariant const& v, ChunkFwdCall const& call) {
  ScanSplit const split = v.split(call);
  std::string const value = "V into " + std::to_string(value_tiles(call.value_dim)) + " of " +
                            std::to_string(kValueTile) + " columns; ",
                    unsplit = "in one piece " + microseconds(split.unsplit_us);
  if (call.batch_invariant) return value + "no sequence, as batch_invariant asks";
  if (!v.segment_bytes(call)) return value + "no sequence: one chunk, or heads and V fill the device";
  if (split.split_us == 0) return value + "no sequence: too short, or no room for the states of segments";
  std::string const by = "by cost: predicted to take " + microseconds(split.split_us) + " split, " + unsplit;
  if (!split.segment_chunks) return value + "no sequence, " + by;
  return value + "sequences into segments of " + std::to_string(split.segment_chunks * v.chunk) + " tokens, " +
         std::to_string(split.segments) + " for one of mean length in a part, " +
         (wanted_segments() ? "as this device wants: predicted " + microseconds(split.split_us) + ", " + unsplit : by);
}

/// Lines of "name=value".
std::string describe(ChunkFwdVariant const& v, ChunkFwdCall const& call) {
  int64_t const slots = call.plan.slots(), split = v.split(call).segment_chunks;
  ChunkFwdVariant::Schedule const schedule = v.schedule(call);
  int64_t const part_slots = split ? v.part_slots(call) : schedule.part_slots, reserved = split ? 0 : schedule.reserved;
  int64_t const segment_chunks = split ? split : call.plan.chunks_of(call.plan.tokens) + 1;
  std::string const heads = "x" + std::to_string(call.value_heads);
  char const* const invariant = call.batch_invariant    ? "yes, as asked"
                                : v.segment_bytes(call) ? "no: whether a sequence is split depends on its batch"
                                                        : "yes, as no sequence is split";
  std::string text;
  auto const line = [&](char const* name, auto const& value) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(value)>>)
      text += std::string(name) + "=" + std::to_string(value) + "\n";
    else text += std::string(name) + "=" + value + "\n";
  };
  line("variant", v.name), line("chunk", v.chunk), line("key_tile", v.key_tile);
  line("parts", slots ? divide_up(slots, part_slots) : 1);
  line("overlap", reserved ? "the scan runs beside the prepare kernel, on " + std::to_string(reserved) +
                                 " multiprocessors that it leaves free"
                  : overlaps_kernels() && !split ? "the scan follows the prepare kernel as that one ends"
                                                 : "none");
  int const teams = reserved ? schedule.teams : 1;
  int64_t const walkers = reserved ? schedule.walkers : v.prepare_walk(part_slots, call.value_heads).walkers;
  line("prepare_grid", divide_up(walkers * call.value_heads, teams)), line("prepare_walkers", walkers);
  line("prepare_threads", v.prepare_threads * teams), line("prepare_shared_bytes", v.prepare_shared_bytes * teams);
  line("scan_grid", std::to_string(part_segments(call.plan, part_slots, segment_chunks)) + heads + "x" +
                        std::to_string(value_tiles(call.value_dim)));
  line("scan_threads", v.scan_threads), line("scan_shared_bytes", v.scan_shared_bytes);
  line("workspace_bytes", v.workspace_bytes(call)), line("segment_bytes", v.segment_bytes(call));
  line("split", split_text(v, call)), line("batch_invariant", invariant);
  ChunkFwdPrediction const predicted = v.predict(call);
  line("predicted_us", predicted.total), line("predicted_prepare_us", predicted.prepare);
  line("predicted_scan_us", predicted.scan);
  text.pop_back();
  return text;
}

std::vector<KernelLaunch> every_kernel() {
  std::vector<KernelLaunch> all;
  auto const add = [&](std::vector<KernelLaunch> const& some) { all.insert(all.end(), some.begin(), some.end()); };
  for (ChunkFwdVariant const& variant : chunk_fwd_variants()) add(variant.kernels());
  for (ChunkBwdVariant const& variant : chunk_bwd_variants()) add(variant.kernels());
  for_each_decode_variant([&](auto launcher) { add(launcher.kernels()); });
  add(kda_gate_kernels<float>()), add(kda_gate_kernels<Fp16>()), add(kda_gate_kernels<Bf16>());
  return all;
}

/// As c++filt writes the kernel's symbol, without its parameters.
std::string kernel_name(KernelLaunch const& kernel) {
  std::string const name = std::string(kernel.name) + "_kernel";
  if (*kernel.argument == typeid(void)) return name;
  int status = 0;
  char* const argument = abi::__cxa_demangle(kernel.argument->name(), nullptr, nullptr, &status);
  std::string const text = status ? kernel.argument->name() : argument;
  std::free(argument);
  return name + "<" + text + (text.back() == '>' ? " >" : ">");
}

}  // namespace
}  // namespace kda

/// `sequences`: entries of cu_seqlens less one, or -1 without cu_seqlens. `state_tokens`: the distance of kept states.
/// Returns the length of the text, 0 if no variant serves the call, -1 if the device cannot be asked.
extern "C" __attribute__((visibility("default"))) int kda_plan_chunk_fwd(int dtype, long long batch, long long tokens,
                                                                         int sequences, int value_heads, int key_dim,
                                                                         int value_dim, int state_tokens,
                                                                         int batch_invariant, char* to,
                                                                         int capacity) try {
  kda::ChunkFwdVariant const* variant =
      kda::select_chunk_fwd(kda::Dtype(dtype), key_dim, state_tokens, {kda::has_wgmma(), kda::shared_memory_limit()});
  if (!variant) return 0;
  static char const known = 0;  // slots() asks only whether there are boundaries
  kda::ChunkFwdParams p{};
  p.plan = {tokens, sequences < 0 ? int32_t(batch) : sequences, sequences < 0 ? nullptr : &known, false, variant->chunk,
            {}};
  p.value_heads = value_heads, p.key_dim = key_dim, p.value_dim = value_dim;
  p.batch_invariant = batch_invariant != 0;
  std::string const text = kda::describe(*variant, kda::ChunkFwdCall(p));
  return std::snprintf(to, size_t(capacity), "%s", text.c_str());
} catch (std::exception const&) {
  return -1;
}

/// Likewise, of the backward. `sequences`: as above. Which gradients are `wanted` decides which kernels run.
extern "C" __attribute__((visibility("default"))) int kda_plan_chunk_bwd(int dtype, long long batch, long long tokens,
                                                                         int sequences, int heads, int value_heads,
                                                                         int key_dim, int value_dim, int wanted,
                                                                         char* to, int capacity) try {
  kda::ChunkBwdChoice const choice =
      kda::select_chunk_bwd(kda::Dtype(dtype), key_dim, {kda::has_wgmma(), kda::shared_memory_limit()});
  if (!choice.backward) return 0;
  static char const known = 0;  // slots() asks only whether there are boundaries
  kda::ChunkPlan const plan{tokens,
                            sequences < 0 ? int32_t(batch) : sequences,
                            sequences < 0 ? nullptr : &known,
                            false,
                            choice.backward->chunk,
                            {}};
  kda::ChunkBwdSchedule const schedule = choice.backward->schedule(plan, value_heads, value_dim);
  // What the op allocates besides: dX if dv is not wanted, and of grouped heads dq and dk for each value head.
  long long const rows = tokens * (sequences < 0 ? batch : 1) * value_heads;
  long long scratch = (wanted & ~0x80) && !(wanted & 4) ? rows * value_dim * choice.backward->element_bytes() : 0;
  if (heads != value_heads) scratch += rows * key_dim * 4 * ((wanted & 1) + (wanted >> 1 & 1));
  std::string kernels = sequences >= 0 && (wanted & ~0x80) ? "chunk_bwd_clear, " : "";
  kernels += "chunk_prepare, chunk_bwd_scan";
  if (wanted & ~0x80) kernels += ", chunk_bwd_values";
  if (wanted & 0x6b) kernels += ", chunk_bwd_keys";
  if (wanted & 0x60) kernels += ", chunk_bwd_reduce";
  if ((wanted & 3) && heads != value_heads) kernels += ", chunk_bwd_sum_heads";
  return std::snprintf(to, size_t(capacity),
                       "variant=%s\nchunk=%d\nkey_tile=%d\nrounds=%d\nheads_per_round=%d\nworkspace_bytes=%zu\n"
                       "scratch_bytes=%lld\nshared_bytes=%zu\nkernels=%s",
                       choice.backward->name, choice.backward->chunk, choice.backward->key_tile, schedule.rounds,
                       schedule.heads_per_round, schedule.workspace_bytes, scratch, choice.backward->shared_bytes,
                       kernels.c_str());
} catch (std::exception const&) {
  return -1;
}

/// Whether a variant of the backward fits the current device.
extern "C" __attribute__((visibility("default"))) int kda_chunk_bwd_fits(int dtype, int key_dim) try {
  return kda::select_chunk_bwd(kda::Dtype(dtype), key_dim, {kda::has_wgmma(), kda::shared_memory_limit()}).backward !=
         nullptr;
} catch (std::exception const&) {
  return 1;  // the op then says what is wrong
}

/// From now on this thread plans for a Hopper GPU with so many multiprocessors, copying so many TB/s; 0: for the
/// current device again.
extern "C" __attribute__((visibility("default"))) void kda_plan_for(int multiprocessors, double copy_tb_s) {
  kda::planned_device = {multiprocessors, copy_tb_s};
}

/// A line per kernel: name, threads, bytes of dynamic shared memory, between tabs. Asks no device. Returns the length
/// of the text, more than `capacity` if that is too little.
extern "C" __attribute__((visibility("default"))) int kda_kernels(char* to, int capacity) {
  std::string text;
  for (kda::KernelLaunch const& kernel : kda::every_kernel())
    text += kda::kernel_name(kernel) + "\t" + std::to_string(kernel.threads) + "\t" +
            std::to_string(kernel.shared_bytes) + "\n";
  return std::snprintf(to, size_t(capacity), "%s", text.c_str());
}

/// Likewise kda_plan_chunk_fwd. `layer`: of decode_layer; else of decode and decode_commit. `state_dtype`: of both
/// pools, whose addresses and slot strides (elements) decide how they are moved; null: absent. Returns the length of
/// the text, 0 if nothing would be launched.
extern "C" __attribute__((visibility("default"))) int kda_plan_decode(int layer, int state_dtype, int value_first,
                                                                      long long tokens, int sequences, int value_heads,
                                                                      int key_dim, int value_dim, void* state,
                                                                      long long slot_stride, void* new_state,
                                                                      long long new_slot_stride, char* to,
                                                                      int capacity) {
  kda::DecodeParams p{};
  p.state_dtype = kda::Dtype(state_dtype), p.value_first = value_first;
  p.tokens = tokens, p.sequences = sequences, p.heads = p.value_heads = value_heads;
  p.key_dim = key_dim, p.value_dim = value_dim;
  p.state = {state, 0, slot_stride, {}}, p.new_state = {new_state, 0, new_slot_stride, {}};
  int length = 0;
  kda::with_decode_variant(p, [&](auto launcher, bool pieces) {
    kda::DecodePlan const plan = layer ? launcher.layer_plan(p, pieces) : launcher.plan(p, pieces);
    length =
        std::snprintf(to, size_t(capacity),
                      "variant=%s_k%d\nstates=%s, %s\ngrid=%lld\nthreads=%d\nshared_bytes=%zu\nvalues_per_block=%d",
                      state_dtype == int(kda::Dtype::kFloat32) ? "fp32" : "bits16", kda::decode_key_tile(key_dim),
                      value_first ? "[V, K]" : "[K, V]", pieces ? "16 bytes at a time" : "element by element",
                      (long long)plan.blocks, plan.threads, plan.shared_bytes, plan.value_tile);
  });
  return length;
}
