#include "kda/decode/launch_variant.h"

template struct kda::DecodeLauncher<kda::DecodeVariant<kda::Bits16, 128>>;
