#include "kda/chunk_bwd/launch_variant.h"

namespace kda {
template ChunkBwdVariant describe_chunk_bwd<Fp16K128C32>();
}
