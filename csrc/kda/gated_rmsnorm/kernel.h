// Rows of at most 256 elements that move in pieces: a few lanes hold a whole row in registers.
#pragma once
#include "kda/column_sums.h"
#include "kda/gated_rmsnorm/row.h"

namespace kda {

template <class ElementType, int kLanesOfRow>
struct NormShape {
  using Element = ElementType;
  static constexpr int kLanes = kLanesOfRow;             // that share a row; 8, 16 or 32
  static constexpr int kGroups = kNormThreads / kLanes;  // rows of a block at once
  static constexpr int kRowsAtOnce = 4;                  // of a group, forward: their loads are on their way together
  static constexpr int kRowsPerBlock = kRowsAtOnce * kGroups;           // forward
  static constexpr int kCount = 16 / sizeof(Element);                   // elements of a piece
  static constexpr int kPieces = kNormElements / kCount;                // of a thread
  static constexpr int kBackwardBlocks = sizeof(Element) == 4 ? 5 : 7;  // on a multiprocessor, without spills
};

template <class Shape>
KDA_DEVICE float sum_of_lanes(float x) {
#pragma unroll
  for (int bits = Shape::kLanes / 2; bits; bits /= 2) x += shuffle_xor(x, bits);
  return x;
}
template <class Shape>
KDA_DEVICE float max_of_lanes(float x) {
#pragma unroll
  for (int bits = Shape::kLanes / 2; bits; bits /= 2) x = fmaxf(x, shuffle_xor(x, bits));
  return x;
}

/// A thread's share of one row of one tensor: piece i has the elements from (i * kLanes + lane) * kCount on.
template <class Shape>
struct RowPieces {
  using E = typename Shape::Element;
  Piece<E, Shape::kCount> piece[Shape::kPieces];

  KDA_DEVICE static int column(int i) { return (i * Shape::kLanes + thread_index() % Shape::kLanes) * Shape::kCount; }
  /// Zeros where there is no row, and beyond its end.
  KDA_DEVICE void load(E const* row, bool present, int dim) {
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i) {
      if (present && column(i) < dim) piece[i].load(row + column(i));
      else piece[i].bits = {};
    }
  }
  KDA_DEVICE void store(E* row, bool present, int dim) const {
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i)
      if (present && column(i) < dim) piece[i].store(row + column(i));
  }
  KDA_DEVICE void unpack(float (&x)[kNormElements]) const {
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i) piece[i].unpack(x + i * Shape::kCount);
  }
  KDA_DEVICE void pack(float const (&x)[kNormElements]) {
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i) piece[i].pack(x + i * Shape::kCount);
  }
};

/// The elements of the weight that a thread needs for each of its rows.
template <class Shape>
KDA_DEVICE void load_weight(GatedRmsNormParams const& p, float (&weight)[kNormElements]) {
  with_elements(p.weight, p.weight_dtype, [&](auto const* from) {
#pragma unroll
    for (int i = 0; i < kNormElements; ++i) {
      int const column = RowPieces<Shape>::column(i / Shape::kCount) + i % Shape::kCount;
      weight[i] = column < p.dim ? to_float(from[column]) : 0.f;
    }
  });
}

/// The scale of a row that is brought into range first: x becomes x * down. All lanes of the warp.
template <class Shape>
KDA_DEVICE RowScale scale_down(GatedRmsNormParams const& p, float (&x)[kNormElements]) {
  float squares = 0.f, down = 1.f;
#pragma unroll
  for (int i = 0; i < kNormElements; ++i) squares = fmaf(x[i], x[i], squares);
  squares = sum_of_lanes<Shape>(squares);
  bool const extreme = is_extreme(squares, p.eps);
  if (warp_any(extreme)) {
    float largest = 0.f, scaled = 0.f;
#pragma unroll
    for (int i = 0; i < kNormElements; ++i) largest = fmaxf(largest, fabsf(x[i]));
    float const wanted = down_scale(max_of_lanes<Shape>(largest), p.eps);
    if (extreme) down = wanted;  // the bits of a row do not depend on those beside it
#pragma unroll
    for (int i = 0; i < kNormElements; ++i) x[i] *= down, scaled = fmaf(x[i], x[i], scaled);
    scaled = sum_of_lanes<Shape>(scaled);
    if (extreme) squares = scaled;
  }
  return row_scale(p, squares, down);
}

/// Where row `row` of each tensor begins.
struct RowPlace {
  int64_t outer, head;

  KDA_DEVICE RowPlace(GatedRmsNormParams const& p, int64_t row) : outer(row), head(0) {
    if (p.heads == 1) return;
    outer = uint32_t(row) / uint32_t(p.heads), head = row - outer * p.heads;
  }
  template <class E>
  KDA_DEVICE E* of(NormRows const& rows, E*) const {
    return static_cast<E*>(rows.data) + outer * rows.outer_stride + head * rows.head_stride;
  }
};

template <class Shape>
KDA_GLOBAL void __launch_bounds__(kNormThreads) gated_rmsnorm_fwd_kernel(GatedRmsNormParams const p) {
  using E = typename Shape::Element;
  constexpr int kRows = Shape::kRowsAtOnce;
  E* const element = nullptr;
  int64_t const rows = p.outer * p.heads;
  int64_t const first = int64_t(blockIdx.x) * Shape::kRowsPerBlock + thread_index() / Shape::kLanes;
  RowPieces<Shape> x_pieces[kRows], gate_pieces[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    int64_t const row = first + r * Shape::kGroups;
    RowPlace const place(p, row);
    x_pieces[r].load(place.of(p.x, element), row < rows, p.dim);
    gate_pieces[r].load(place.of(p.gate, element), row < rows, p.dim);
  }
  float weight[kNormElements];
  load_weight<Shape>(p, weight);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    int64_t const row = first + r * Shape::kGroups;
    float x[kNormElements], gate[kNormElements];
    x_pieces[r].unpack(x), gate_pieces[r].unpack(gate);
    float const rstd = scale_down<Shape>(p, x).rstd;
#pragma unroll
    for (int j = 0; j < kNormElements; ++j)
      x[j] = x[j] * rstd * weight[j] * gate_activation<E>(p.activation, gate[j]).x;
    x_pieces[r].pack(x);
    x_pieces[r].store(RowPlace(p, row).of(p.y, element), row < rows, p.dim);
  }
}

template <class Shape>
struct NormBwdStorage {
  float dweight[Shape::kGroups][Shape::kLanes * kNormElements];
};

/// Gradients of one row; adds its terms of the weight's gradient. All lanes of the warp.
template <class Shape>
KDA_DEVICE void row_gradients(GatedRmsNormParams const& p, float (&x)[kNormElements], float (&gate)[kNormElements],
                              float const (&dy)[kNormElements], float const (&weight)[kNormElements],
                              float (&dweight)[kNormElements]) {
  RowScale const scale = scale_down<Shape>(p, x);
  NormGradient d[kNormElements];
  float mean = 0.f;
#pragma unroll
  for (int j = 0; j < kNormElements; ++j) {
    d[j] = NormGradient::of(p, x[j] * scale.rstd, gate[j], dy[j], weight[j], typename Shape::Element{});
    mean += d[j].share, dweight[j] += d[j].dweight, gate[j] = d[j].dgate;
  }
  mean = sum_of_lanes<Shape>(mean);
#pragma unroll
  for (int j = 0; j < kNormElements; ++j) x[j] = d[j].dx(scale.of_gradient(), mean);
}

/// What a thread reads of one row in the backward.
template <class Shape>
struct GradientPieces {
  RowPieces<Shape> x, gate, dy;

  KDA_DEVICE void load(GatedRmsNormParams const& p, int64_t row, bool present) {
    typename Shape::Element* const element = nullptr;
    RowPlace const place(p, row);
    x.load(place.of(p.x, element), present, p.dim);
    gate.load(place.of(p.gate, element), present, p.dim);
    dy.load(place.of(p.y, element), present, p.dim);
  }
};

/// A block per run of rows. The loads of a row are on their way while the one before is computed.
template <class Shape>
KDA_GLOBAL void __launch_bounds__(kNormThreads, Shape::kBackwardBlocks)
    gated_rmsnorm_bwd_kernel(GatedRmsNormParams const p) {
  using E = typename Shape::Element;
  KDA_SHARED(NormBwdStorage<Shape>, storage);
  E* const element = nullptr;
  int const group = thread_index() / Shape::kLanes;
  int64_t const rows = p.outer * p.heads, first = rows * blockIdx.x / p.runs, end = rows * (blockIdx.x + 1) / p.runs;
  GradientPieces<Shape> ahead;
  ahead.load(p, first + group, first + group < end);
  float weight[kNormElements], dweight[kNormElements] = {};
  load_weight<Shape>(p, weight);
#pragma unroll 1
  for (int64_t row = first + group; row - group < end; row += Shape::kGroups) {
    GradientPieces<Shape> pieces = ahead;
    ahead.load(p, row + Shape::kGroups, row + Shape::kGroups < end);
    float x[kNormElements], gate[kNormElements], dy[kNormElements];
    pieces.x.unpack(x), pieces.gate.unpack(gate), pieces.dy.unpack(dy);
    row_gradients<Shape>(p, x, gate, dy, weight, dweight);
    pieces.x.pack(x), pieces.gate.pack(gate);
    RowPlace const place(p, row);
    pieces.x.store(place.of(p.dx, element), row < end, p.dim);
    pieces.gate.store(place.of(p.dgate, element), row < end, p.dim);
  }
#pragma unroll
  for (int j = 0; j < kNormElements; ++j)
    storage.dweight[group][RowPieces<Shape>::column(j / Shape::kCount) + j % Shape::kCount] = dweight[j];
  sync_block();
  for (int column = thread_index(); column < p.dim; column += kNormThreads) {
    float sum = 0.f;
    for (int i = 0; i < Shape::kGroups; ++i) sum += storage.dweight[i][column];
    p.partial[int64_t(blockIdx.x) * p.dim + column] = sum;
  }
}

/// Adds the runs in order.
static KDA_GLOBAL void __launch_bounds__(kNormSumThreads) gated_rmsnorm_reduce_kernel(GatedRmsNormParams const p) {
  using Storage = ColumnSumStorage<kNormSumThreads, kNormSumColumns>;
  KDA_SHARED(Storage, storage);
  wait_for_previous_kernel();
  sum_columns(storage, p.partial, p.runs, p.dim,
              [&](int64_t column, float sum) { store_float(p.dweight, p.weight_dtype, column, sum); });
}

}  // namespace kda
