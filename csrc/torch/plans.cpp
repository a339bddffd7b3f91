// What kda_cuda asks of the library before a call: how it would be launched. And what the table
// of resources asks: how each kernel is launched on any. Plain C, for ctypes.
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "kda/chunk_bwd/dispatch.h"
#include "kda/chunk_bwd/wanted.h"
#include "kda/chunk_fwd/dispatch.h"
#include "kda/decode/dispatch.h"
#include "kda/decode_layer/dispatch.h"
#include "kda/gated_rmsnorm/dispatch.h"
#include "kda/kda_gate/dispatch.h"
#include "kda/short_conv/dispatch.h"
#include "platform/device.h"

namespace kda {
namespace {

std::string microseconds(double x) { return std::to_string(int64_t(x + 0.5)) + " us"; }

/// How the scan is divided, and why.
std::string split_text(ChunkFwdSchedule const& s, ChunkFwdVariant const& v, ChunkFwdCall const& call) {
  std::string const value = "V into " + std::to_string(value_tiles(call.value_dim)) + " of " +
                            std::to_string(kValueTile) + " columns; ",
                    split = microseconds(s.split_us), unsplit = "in one piece " + microseconds(s.unsplit_us),
                    by = "by cost: predicted to take " + split + " split, " + unsplit,
                    segments = "sequences into segments of " + std::to_string(s.segment_chunks * v.chunk) +
                               " tokens, " + std::to_string(s.mean_segments) + " for one of mean length in a round, ";
  switch (s.reason) {
    case SplitReason::kInvariant:
      return value + "no sequence, as batch_invariant asks";
    case SplitReason::kNoSegments:
      return value + "no sequence: one chunk, or heads and V fill the device";
    case SplitReason::kNoRoom:
      return value + "no sequence: too short, or no room for the states of segments";
    case SplitReason::kWanted:
      return value + segments + "as this device wants: predicted " + split + ", " + unsplit;
    case SplitReason::kCost:
      break;
  }
  return value + (s.segment_chunks ? segments : "no sequence, ") + by;
}

/// Lines of "name=value".
std::string describe(ChunkFwdSchedule const& s, ChunkFwdVariant const& v, ChunkFwdCall const& call) {
  std::string const heads = "x" + std::to_string(call.value_heads);
  char const* const invariant = call.batch_invariant        ? "yes, as asked"
                                : s.workspace.segment_bytes ? "no: whether a sequence is split depends on its batch"
                                                            : "yes, as no sequence is split";
  std::string text;
  auto const line = [&](char const* name, auto const& value) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(value)>>)
      text += std::string(name) + "=" + std::to_string(value) + "\n";
    else text += std::string(name) + "=" + value + "\n";
  };
  line("variant", v.name), line("chunk", v.chunk), line("key_tile", v.key_tile);
  line("rounds", s.rounds);
  line("overlap", s.reserved ? "the scan runs beside the prepare kernel, on " + std::to_string(s.reserved) +
                                   " multiprocessors that it leaves free"
                  : s.beside ? "the scan follows the prepare kernel as that one ends"
                             : "none");
  line("prepare_grid", divide_up(s.whole.walkers * int64_t(call.value_heads), s.teams));
  line("prepare_walkers", s.whole.walkers);
  line("prepare_threads", v.prepare.threads * s.teams);
  line("prepare_shared_bytes", v.prepare.shared_bytes * size_t(s.teams));
  line("scan_grid", std::to_string(s.whole.segments) + heads + "x" + std::to_string(value_tiles(call.value_dim)));
  line("scan_threads", v.scan_threads), line("scan_shared_bytes", v.scan_shared_bytes);
  line("workspace_bytes", s.workspace.bytes()), line("segment_bytes", s.workspace.segment_bytes);
  line("split", split_text(s, v, call)), line("batch_invariant", invariant);
  line("predicted_us", s.total_us), line("predicted_prepare_us", s.prepare_us), line("predicted_scan_us", s.scan_us);
  text.pop_back();
  return text;
}

/// The kernels of a call of the backward, in their order.
std::string kernels_of(Wanted wanted, bool grouped, bool packed) {
  std::string kernels = packed && wanted.any(Wanted::kOfTokens) ? "chunk_bwd_clear, " : "";
  kernels += "chunk_prepare, chunk_bwd_scan";
  if (wanted.any(Wanted::kOfTokens)) kernels += ", chunk_bwd_values";
  if (wanted.any(Wanted::kOfKeys)) kernels += ", chunk_bwd_keys";
  if (wanted.any(Wanted::kSums)) kernels += ", chunk_bwd_reduce";
  if (grouped && wanted.any(Wanted::kQ | Wanted::kK)) kernels += ", chunk_bwd_sum_heads";
  return kernels;
}

/// `sequences`: entries of cu_seqlens less one, or -1 without cu_seqlens.
ChunkPlan plan_of_call(int64_t batch, int64_t tokens, int sequences, int chunk) {
  static char const known = 0;  // cells() asks only whether there are boundaries
  bool const packed = sequences >= 0;
  return {tokens, packed ? sequences : int32_t(batch), packed ? &known : nullptr, false, chunk, {}};
}

std::vector<KernelLaunch> every_kernel() {
  std::vector<KernelLaunch> all;
  auto const add = [&](std::vector<KernelLaunch> const& some) { all.insert(all.end(), some.begin(), some.end()); };
  for (auto const& variant : chunk_fwd_variants()) add(variant.kernels());
  for (auto const& variant : chunk_bwd_variants()) add(variant.kernels());
  for (auto const& variant : decode_variants()) add(variant.kernels());
  for (auto const& variant : decode_layer_variants()) add(variant.kernels());
  for (auto const& variant : kda_gate_variants()) add(variant.kernels());
  for (auto const& variant : short_conv_variants()) add(variant.kernels());
  for (auto const& variant : gated_rmsnorm_variants()) add(variant.kernels());
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
/// `multiprocessors`: of a Hopper GPU to plan for, which copies so many TB/s; 0: the current device. Returns the length
/// of the text, 0 if no variant serves the call, -1 if the device cannot be asked.
extern "C" __attribute__((visibility("default"))) int kda_plan_chunk_fwd(int dtype, long long batch, long long tokens,
                                                                         int sequences, int value_heads, int key_dim,
                                                                         int value_dim, int state_tokens,
                                                                         int batch_invariant, int multiprocessors,
                                                                         double copy_tb_s, char* to, int capacity) try {
  kda::DeviceTraits const device = multiprocessors ? kda::hopper_gpu(multiprocessors, copy_tb_s) : kda::device_traits();
  kda::ChunkFwdVariant const* variant = kda::select_chunk_fwd(kda::Dtype(dtype), key_dim, state_tokens, device);
  if (!variant) return 0;
  kda::ChunkInputs p{};
  p.plan = kda::plan_of_call(batch, tokens, sequences, variant->chunk);
  p.value_heads = value_heads, p.key_dim = key_dim, p.value_dim = value_dim;
  p.batch_invariant = batch_invariant != 0;
  kda::ChunkFwdCall const call(p);
  std::string const text = kda::describe(kda::schedule_chunk_fwd(*variant, call, device), *variant, call);
  return std::snprintf(to, size_t(capacity), "%s", text.c_str());
} catch (std::exception const&) {
  return -1;
}

/// Likewise, of the backward on the current device. Which gradients are `wanted` decides which kernels run.
extern "C" __attribute__((visibility("default"))) int kda_plan_chunk_bwd(int dtype, long long batch, long long tokens,
                                                                         int sequences, int heads, int value_heads,
                                                                         int key_dim, int value_dim, int wanted,
                                                                         char* to, int capacity) try {
  kda::DeviceTraits const device = kda::device_traits();
  kda::ChunkBwdVariant const* const variant = kda::select_chunk_bwd(kda::Dtype(dtype), key_dim, device);
  if (!variant) return 0;
  kda::ChunkPlan const plan = kda::plan_of_call(batch, tokens, sequences, variant->chunk);
  kda::ChunkBwdSchedule const schedule = kda::schedule_chunk_bwd(*variant, plan, value_heads, value_dim, device);
  kda::Wanted const gradients{wanted};
  bool const grouped = heads != value_heads, packed = sequences >= 0;
  kda::ChunkBwdSizes const sizes{key_dim, value_dim, variant->chunk, variant->element_bytes(), grouped};
  long long const scratch =
      kda::ChunkBwdScratch(gradients, sizes).bytes(tokens * (packed ? 1 : batch) * value_heads, sizes);
  return std::snprintf(to, size_t(capacity),
                       "variant=%s\nchunk=%d\nkey_tile=%d\nrounds=%d\nheads_per_round=%d\nworkspace_bytes=%zu\n"
                       "scratch_bytes=%lld\nshared_bytes=%zu\nkernels=%s",
                       variant->name, variant->chunk, variant->key_tile, schedule.rounds, schedule.heads_per_round,
                       schedule.workspace_bytes, scratch, variant->kernel_shared_bytes,
                       kda::kernels_of(gradients, grouped, packed).c_str());
} catch (std::exception const&) {
  return -1;
}

/// Whether a variant of the backward fits the current device.
extern "C" __attribute__((visibility("default"))) int kda_chunk_bwd_fits(int dtype, int key_dim) try {
  return kda::select_chunk_bwd(kda::Dtype(dtype), key_dim, kda::device_traits()) != nullptr;
} catch (std::exception const&) {
  return 1;  // the op then says what is wrong
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

/// Likewise kda_plan_chunk_fwd. `layer`: of decode_layer; else of decode and decode_commit. `tree`: with parents.
/// `state_dtype`: of both pools, whose addresses and slot strides (elements) decide how they are moved; null: absent.
/// Returns the length of the text, 0 if nothing would be launched.
extern "C" __attribute__((visibility("default"))) int kda_plan_decode(int layer, int tree, int state_dtype,
                                                                      int value_first, long long tokens, int sequences,
                                                                      int value_heads, int key_dim, int value_dim,
                                                                      void* state, long long slot_stride,
                                                                      void* new_state, long long new_slot_stride,
                                                                      char* to, int capacity) {
  kda::DecodeParams p{};
  p.state_dtype = kda::Dtype(state_dtype), p.value_first = value_first;
  p.tokens = tokens, p.sequences = sequences, p.heads = p.value_heads = value_heads;
  p.key_dim = key_dim, p.value_dim = value_dim;
  p.state = {state, 0, slot_stride, {}}, p.new_state = {new_state, 0, new_slot_stride, {}};
  if (tree) p.parents.data = &p;  // asked only whether there are some
  kda::DecodeVariant const* const decode = kda::select_decode(p);
  if (!decode) return 0;
  bool const pieces = kda::states_in_pieces(p);
  kda::DecodePlan const plan = layer ? kda::select_decode_layer(p)->plan(p, pieces) : decode->plan(p, pieces);
  return std::snprintf(to, size_t(capacity),
                       "variant=%s_k%d\nstates=%s, %s\ngrid=%lld\nthreads=%d\nshared_bytes=%zu\nvalues_per_block=%d",
                       state_dtype == int(kda::Dtype::kFloat32) ? "fp32" : "bits16", decode->key_tile,
                       value_first ? "[V, K]" : "[K, V]", pieces ? "16 bytes at a time" : "element by element",
                       (long long)plan.blocks, plan.threads, plan.shared_bytes, plan.value_tile);
}
