// The launches of one variant; included by its file in variants/ alone.
#pragma once
#include "kda/decode/kernel.h"
#include "kda/decode/launch.h"
#include "platform/launch.h"

namespace kda {

template <class Shape>
void launch_decode_shape(DecodeParams const& p, cudaStream_t stream) {
  int64_t const tiles = (p.value_dim + Shape::kValueTile - 1) / Shape::kValueTile;
  launch("decode", decode_kernel<Shape>, dim3(unsigned(p.sequences * p.value_heads * tiles)), dim3(Shape::kThreads),
         DecodeStorage<Shape>::bytes(p.tokens), stream, p);
}

template <class State, int kKeyTile>
void launch_decode_layout(DecodeParams const& p, bool in_pieces, cudaStream_t stream) {
  if (p.value_first && in_pieces) launch_decode_shape<ValueFirstShape<State, kKeyTile, true>>(p, stream);
  else if (p.value_first) launch_decode_shape<ValueFirstShape<State, kKeyTile, false>>(p, stream);
  else if (in_pieces) launch_decode_shape<KeyFirstShape<State, kKeyTile, true>>(p, stream);
  else launch_decode_shape<KeyFirstShape<State, kKeyTile, false>>(p, stream);
}

}  // namespace kda
