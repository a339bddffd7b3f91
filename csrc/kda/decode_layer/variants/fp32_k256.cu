#include "kda/decode_layer/launch_variant.h"

template kda::DecodeLayerVariant kda::describe_decode_layer<kda::DecodeTile<float, 256>>();
