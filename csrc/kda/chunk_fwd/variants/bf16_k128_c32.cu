#include "kda/chunk_fwd/launch_variant.h"

namespace kda {
KDA_CHUNK_FWD_VARIANT(Bf16K128C32);
}
