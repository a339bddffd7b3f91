#include "kda/decode/launch_variant.h"

template struct kda::DecodeLauncher<kda::DecodeVariant<kda::Bf16, 128>>;
