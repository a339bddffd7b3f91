// What the host calls. `Variant` names the files in variants/: the dtype of the state and the tile of K.
#pragma once
#include "kda/decode/params.h"

#include <cuda_runtime.h>

namespace kda {

struct DecodeFp32K64;
struct DecodeFp32K128;
struct DecodeFp32K256;
struct DecodeBf16K64;
struct DecodeBf16K128;
struct DecodeBf16K256;

/// `in_pieces`: the states can be moved 16 bytes at a time.
template <class Variant>
void launch_decode(DecodeParams const& p, bool in_pieces, cudaStream_t stream);

}  // namespace kda
