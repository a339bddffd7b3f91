// mbarriers, bulk copies, tensor maps.
#pragma once
#include "tests/programs/program.h"

namespace kda::tests {

// ---- mbarriers -------------------------------------------------------------------------------------------------

struct MbarrierRing {
  uint32_t word[2][32];
  Mbarrier full[2], empty[2];
};
/// Warp 0 produces for warps 1 and 2. Full: 32 arrivals, consumers wait; empty: 64 arrivals, the producer waits, at
/// first for parity 1, which needs no arrival.
KDA_GLOBAL void mbarrier_kernel(uint32_t* out, int steps) {
  KDA_SHARED(MbarrierRing, s);
  int const t = thread_index(), lane = lane_index();
  if (t == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(s.full[i], 32), mbarrier_init(s.empty[i], 64);
    fence_mbarrier_init();
  }
  sync_block();
  uint32_t sum = t;
  for (int i = 0; i < steps; ++i) {
    int const stage = i % 2, parity = i / 2 % 2;
    if (t < 32) {
      mbarrier_wait(s.empty[stage], 1 - parity);
      s.word[stage][lane] = i * 1000 + lane;
      mbarrier_arrive(s.full[stage]);
    } else {
      mbarrier_wait(s.full[stage], parity);
      sum = sum * 5 + s.word[stage][(lane + i + t / 32) % 32];
      mbarrier_arrive(s.empty[stage]);
    }
  }
  out[t] = sum;
}
inline std::vector<uint32_t> mbarrier_pipeline() { return run(mbarrier_kernel, dim3(1), dim3(96), 0, 96, 9); }

// ---- bulk copies -----------------------------------------------------------------------------------------------

inline constexpr int kBulkWords = 256, kBulkSteps = 7;
struct BulkRing {
  alignas(128) uint32_t in[2][kBulkWords], out[2][kBulkWords];
  Mbarrier full[2];
};
/// Streams kBulkSteps runs of kBulkWords through shared memory, doubled and with its bits reversed in order; 64
/// threads. Thread 0 issues: loads two steps ahead (in two copies), stores whose buffer is reused two steps later.
KDA_GLOBAL void bulk_kernel(uint32_t* out, uint32_t const* in) {
  KDA_SHARED(BulkRing, s);
  int const t = thread_index();
  auto const load = [&](int i) {
    mbarrier_arrive_expect_tx(s.full[i % 2], kBulkWords * 4);
    bulk_load(s.in[i % 2], in + i * kBulkWords, 16, s.full[i % 2]);
    bulk_load(s.in[i % 2] + 4, in + i * kBulkWords + 4, kBulkWords * 4 - 16, s.full[i % 2]);
  };
  if (t == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(s.full[i], 1);
    fence_mbarrier_init();
    for (int i = 0; i < 2; ++i) load(i);
  }
  sync_block();
  for (int i = 0; i < kBulkSteps; ++i) {
    mbarrier_wait(s.full[i % 2], i / 2 % 2);
    if (t == 0) bulk_store_wait_read<1>();
    sync_block();
    for (int w = t; w < kBulkWords; w += 64) s.out[i % 2][w] = s.in[i % 2][kBulkWords - 1 - w] * 2 + i;
    fence_proxy_async();
    sync_block();
    if (t != 0) continue;
    bulk_store(out + i * kBulkWords, s.out[i % 2], kBulkWords * 4);
    bulk_store_commit();
    if (i + 2 < kBulkSteps) load(i + 2);
  }
  if (t == 0) bulk_store_wait<0>();
}
inline std::vector<uint32_t> bulk_input() { return words(kBulkSteps * kBulkWords, 9); }
inline std::vector<uint32_t> bulk_stream() {
  Buffer<uint32_t> const in(bulk_input());
  return run(bulk_kernel, dim3(1), dim3(64), 0, kBulkSteps * kBulkWords, static_cast<uint32_t const*>(in.data()));
}

// ---- tensor maps -----------------------------------------------------------------------------------------------

/// A tensor of kRank dimensions with gaps between its rows, and boxes that reach beyond its borders: on every side for
/// loads, for stores as bulk_copy.h allows it.
template <class E, int kTensorRank, TensorSwizzle kTensorSwizzle>
struct TensorCase {
  using Element = E;
  static constexpr int kRank = kTensorRank;
  static constexpr TensorSwizzle kSwizzle = kTensorSwizzle;
  static constexpr int kRow = 128 / int(sizeof(E)) / (kSwizzle == TensorSwizzle::k128B ? 1 : 2);
  static constexpr int kBoxes = 4;
  struct Shape {
    int64_t sizes[kRank], strides[kRank - 1];
    int box[kRank], at[kBoxes][kRank];
  };
  static constexpr int kBoxElements = kRow * (kRank == 2 ? 16 : kRank == 3 ? 5 * 3 : 5 * 2 * 3);
  static constexpr int kShared = (kBoxElements * int(sizeof(E)) + 1023) / 1024 * 1024;
  static constexpr int kPiece = 16 / int(sizeof(E));  // what the first coordinate must be a multiple of

  static Shape shape(bool of_store = false) {
    Shape s;
    int64_t const size[4] = {kRow + (of_store ? kPiece : 5), 19, 4, 5};
    int64_t stride = kRow + 32;  // a multiple of 16 bytes in every format
    for (int i = 0; i < kRank; ++i) {
      s.sizes[i] = size[i];
      if (i) s.strides[i - 1] = stride, stride *= size[i] + 1;
    }
    int const boxes[3][4] = {{kRow, 16, 0, 0}, {kRow, 5, 3, 0}, {kRow, 5, 2, 3}};
    int const loads[kBoxes][4] = {{0, 0, 0, 0}, {-kPiece, -2, -1, -1}, {kPiece, 14, 2, 3}, {2 * kPiece, -4, 3, -2}};
    int const stores[kBoxes][4] = {{0, 0, 0, 0}, {kPiece, 3, 1, 1}, {2 * kPiece, 14, 2, 3}, {0, 16, 3, 4}};
    for (int i = 0; i < kRank; ++i) {
      s.box[i] = boxes[kRank - 2][i];
      for (int b = 0; b < kBoxes; ++b) s.at[b][i] = (of_store ? stores : loads)[b][i];
    }
    return s;
  }
  static size_t elements() {
    Shape const s = shape();
    return size_t(s.strides[kRank - 2] * (s.sizes[kRank - 1] + 1));
  }
};
template <class Case>
struct alignas(1024) TensorStorage {
  typename Case::Element tile[Case::kShared / sizeof(typename Case::Element)];
  Mbarrier full;
};

/// The image of each box in shared memory.
template <class Case>
KDA_GLOBAL void tensor_load_kernel(typename Case::Element* out, __grid_constant__ TensorMap const map,
                                   typename Case::Shape const shape) {
  KDA_DYNAMIC_SHARED(TensorStorage<Case>, s);
  if (thread_index() == 0) {
    mbarrier_init(s->full, 1);
    fence_mbarrier_init();
  }
  sync_block();
  for (int b = 0; b < Case::kBoxes; ++b) {
    if (thread_index() == 0) {
      mbarrier_arrive_expect_tx(s->full, Case::kBoxElements * sizeof(typename Case::Element));
      tensor_load(s->tile, map, shape.at[b], s->full);
    }
    mbarrier_wait(s->full, b % 2);
    for (int i = thread_index(); i < Case::kBoxElements; i += 64) out[b * Case::kBoxElements + i] = s->tile[i];
    sync_block();
  }
}
template <class Case>
std::vector<typename Case::Element> tensor_load_boxes() {
  using E = typename Case::Element;
  auto const shape = Case::shape();
  Buffer<E> const in(integers<E>(Case::elements(), 10));
  TensorMap const map =
      make_tensor_map<E, Case::kRank>(in.data(), shape.sizes, shape.strides, shape.box, Case::kSwizzle);
  return run(tensor_load_kernel<Case>, dim3(1), dim3(64), sizeof(TensorStorage<Case>),
             size_t(Case::kBoxes) * Case::kBoxElements, map, shape);
}

/// Stores box after box, the image in shared memory counting up; what no box covers keeps its poison.
template <class Case>
KDA_GLOBAL void tensor_store_kernel(typename Case::Element*, __grid_constant__ TensorMap const map,
                                    typename Case::Shape const shape) {
  KDA_DYNAMIC_SHARED(TensorStorage<Case>, s);
  for (int b = 0; b < Case::kBoxes; ++b) {
    for (int i = thread_index(); i < Case::kBoxElements; i += 64)
      s->tile[i] = from_float<typename Case::Element>(float(i % 61 + b));
    fence_proxy_async();
    sync_block();
    if (thread_index() == 0) {
      tensor_store(map, shape.at[b], s->tile);
      bulk_store_commit();
      bulk_store_wait<0>();
    }
    sync_block();
  }
}
template <class Case>
std::vector<typename Case::Element> tensor_store_boxes() {
  using E = typename Case::Element;
  auto const shape = Case::shape(true);
  std::vector<E> poison(Case::elements());
  std::memset(static_cast<void*>(poison.data()), 0xFF, poison.size() * sizeof(E));
  Buffer<E> const out(poison);
  TensorMap const map =
      make_tensor_map<E, Case::kRank>(out.data(), shape.sizes, shape.strides, shape.box, Case::kSwizzle);
  launch("program", tensor_store_kernel<Case>, dim3(1), dim3(64), sizeof(TensorStorage<Case>), nullptr, out.data(), map,
         shape);
  return out.download();
}

}  // namespace kda::tests
