#include "kda/chunk_bwd/launch_variant.h"

namespace kda {
template ChunkBwdVariant describe_chunk_bwd<Bf16K128Sm90>();
}
