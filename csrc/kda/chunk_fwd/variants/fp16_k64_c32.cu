#include "kda/chunk_fwd/launch_variant.h"

namespace kda {
template ChunkFwdVariant describe_chunk_fwd<Fp16K64C32>();
}
