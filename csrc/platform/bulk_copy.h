// Bulk copies between global and shared memory by the copy engine, sm_90: runs of bytes, and boxes of tensors (TMA).
// One thread issues for all. Loads complete on an mbarrier, which must expect their bytes (a box counts in full, also
// where it reaches beyond the tensor); stores complete by groups of the issuing thread.
#pragma once
#include "platform/mbarrier.h"
#include "platform/tensor_map.h"

namespace kda {

/// Shared memory written by ordinary stores is seen by wgmma and bulk copies after the next barrier; by each writing
/// thread. PTX: fence.proxy.async.shared::cta
KDA_DEVICE void fence_proxy_async() {
#if !defined(KDA_EMULATE)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Global memory written by ordinary stores, as a flag says that this thread waited for (flags.h), is seen by the bulk
/// loads that it starts after this. PTX: fence.proxy.async.global
KDA_DEVICE void fence_proxy_async_global() {
#if !defined(KDA_EMULATE)
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

#if defined(KDA_EMULATE)
namespace emulator {
inline void check_bulk(void const* shared, void const* global, uint32_t bytes, Location where) {
  if (Engine::current().shared_offset(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16 || !bytes)
    Engine::current().fail("cp.async.bulk: an address or the size is not a multiple of 16 bytes", where);
}
/// The elements of the box at `at`: visit(shared address, global address or null outside the tensor).
template <int kRank, class Visit>
void for_box(TensorMap const& map, int const (&at)[kRank], char* shared, Location where, Visit const& visit) {
  Engine& engine = Engine::current();
  if (map.rank != kRank) engine.fail("cp.async.bulk.tensor: the map has another rank", where);
  bool const swizzled = map.swizzle == TensorSwizzle::k128B;
  if (engine.shared_offset(shared) % (swizzled ? 1024 : 128))
    engine.fail("cp.async.bulk.tensor: the shared address is not a multiple of " +
                    std::string(swizzled ? "1024 bytes (128-byte swizzle)" : "128 bytes"),
                where);
  if (at[0] * map.element_bytes % 16)
    engine.fail("cp.async.bulk.tensor: the first coordinate is not a multiple of 16 bytes", where);
  int64_t elements = 1;
  for (int i = 0; i < kRank; ++i) elements *= map.box[i];
  for (int64_t e = 0; e < elements; ++e) {
    char* global = map.global;
    int64_t rest = e;
    for (int i = 0; i < kRank; ++i) {
      int64_t const x = at[i] + rest % map.box[i];
      rest /= map.box[i];
      global = global && x >= 0 && x < map.size[i] ? global + x * map.stride_bytes[i] : nullptr;
    }
    uint32_t const place = uint32_t(e) * uint32_t(map.element_bytes);
    visit(shared + (swizzled ? place ^ (place >> 7 & 7) << 4 : place), global);
  }
}
/// Appends a piece, joined with the last one where both sides continue.
inline void append(std::vector<Copy>& pieces, char* to, char const* from, uint32_t bytes, bool valid) {
  if (!pieces.empty()) {
    Copy& last = pieces.back();
    bool const was_valid = last.valid != 0;
    if (last.to + last.bytes == to && was_valid == valid && (!valid || last.from + last.bytes == from)) {
      last.bytes += bytes;
      if (valid) last.valid += bytes;
      return;
    }
  }
  pieces.push_back({to, from, bytes, valid ? bytes : 0});
}
}  // namespace emulator
#endif

/// `bytes` bytes from global to shared memory; addresses and size are multiples of 16.
/// PTX: cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
KDA_DEVICE void bulk_load(void* to, void const* from, uint32_t bytes, Mbarrier& full KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::check_bulk(to, from, bytes, where);
  emulator::BulkLoad load{{{static_cast<char*>(to), static_cast<char const*>(from), bytes, bytes}}, bytes, 0, where};
  emulator::Engine::current().start_bulk_load(std::move(load), full.word);
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&full))
               : "memory");
#endif
}
/// The same from shared to global memory. PTX: cp.async.bulk.global.shared::cta.bulk_group
KDA_DEVICE void bulk_store(void* to, void const* from, uint32_t bytes KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::check_bulk(from, to, bytes, where);
  emulator::BulkStore store{{{static_cast<char*>(to), static_cast<char const*>(from), bytes, bytes}}, {}, false, where};
  emulator::Engine::current().start_bulk_store(std::move(store));
#else
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
#endif
}

/// The box of `map` whose first element is at the coordinates `at` (dimension 0 first), into shared memory. Address:
/// a multiple of 128 bytes, of 1024 with the swizzle. at[0]: a multiple of 16 bytes, else an H100 reports an illegal
/// instruction; the others are any, and a row of the box may leave the tensor anywhere.
/// PTX: cp.async.bulk.tensor.{2,3,4}d.shared::cluster.global.mbarrier::complete_tx::bytes
template <int kRank>
KDA_DEVICE void tensor_load(void* to, TensorMap const& map, int const (&at)[kRank], Mbarrier& full KDA_WHERE) {
  static_assert(kRank >= 2 && kRank <= 4);
#if defined(KDA_EMULATE)
  emulator::BulkLoad load{{}, 0, 0, where};
  uint32_t const bytes = uint32_t(map.element_bytes);
  emulator::for_box(map, at, static_cast<char*>(to), where, [&](char* shared, char* global) {
    emulator::append(load.pieces, shared, global, bytes, global != nullptr);
    load.bytes += bytes;
  });
  emulator::Engine::current().start_bulk_load(std::move(load), full.word);
#else
  uint32_t const shared = shared_address(to), barrier = shared_address(&full);
  if constexpr (kRank == 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared),
        "l"(&map), "r"(barrier), "r"(at[0]), "r"(at[1])
        : "memory");
  else if constexpr (kRank == 3)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(shared),
        "l"(&map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(shared),
        "l"(&map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
#endif
}
/// The reverse; elements beyond the tensor are not written. No coordinate is negative, and where the box leaves the
/// tensor in dimension 0, the tensor's rows are a multiple of 16 bytes: a box of 32 x 16 bf16 at (8, -2) in rows of 37
/// elements gave an illegal instruction on an H100 (which of the two it minds is not known).
/// PTX: cp.async.bulk.tensor.{2,3,4}d.global.shared::cta.bulk_group
template <int kRank>
KDA_DEVICE void tensor_store(TensorMap const& map, int const (&at)[kRank], void const* from KDA_WHERE) {
  static_assert(kRank >= 2 && kRank <= 4);
#if defined(KDA_EMULATE)
  emulator::BulkStore store{{}, {}, false, where};
  for (int const x : at)
    if (x < 0) emulator::Engine::current().fail("cp.async.bulk.tensor: a store at a negative coordinate", where);
  if (at[0] + map.box[0] > map.size[0] && map.size[0] * map.element_bytes % 16)
    emulator::Engine::current().fail("cp.async.bulk.tensor: a store's row ends inside a piece of 16 bytes", where);
  char* const tile = const_cast<char*>(static_cast<char const*>(from));
  emulator::for_box(map, at, tile, where, [&](char* shared, char* global) {
    if (global) emulator::append(store.pieces, global, shared, uint32_t(map.element_bytes), true);
  });
  emulator::Engine::current().start_bulk_store(std::move(store));
#else
  uint32_t const shared = shared_address(from);
  if constexpr (kRank == 2)
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(shared),
                 "r"(at[0]), "r"(at[1])
                 : "memory");
  else if constexpr (kRank == 3)
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(shared), "r"(at[0]), "r"(at[1]), "r"(at[2])
                 : "memory");
  else
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(shared), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
                 : "memory");
#endif
}

/// The calling thread's stores so far become a group. PTX: cp.async.bulk.commit_group
KDA_DEVICE void bulk_store_commit() {
#if defined(KDA_EMULATE)
  emulator::Engine::current().commit_bulk_stores();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
/// Until at most kPending of this thread's groups have yet to read shared memory, which may then be overwritten.
/// PTX: cp.async.bulk.wait_group.read
template <int kPending>
KDA_DEVICE void bulk_store_wait_read() {
#if defined(KDA_EMULATE)
  emulator::Engine::current().wait_bulk_stores(kPending, false);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}
/// Until at most kPending of this thread's groups have yet to be written. PTX: cp.async.bulk.wait_group
template <int kPending>
KDA_DEVICE void bulk_store_wait() {
#if defined(KDA_EMULATE)
  emulator::Engine::current().wait_bulk_stores(kPending, true);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace kda
