#include "kda/chunk_fwd/launch_variant.h"

namespace kda {
KDA_CHUNK_FWD_VARIANT(Fp16K256);
}
