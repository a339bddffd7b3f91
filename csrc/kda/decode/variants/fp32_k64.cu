#include "kda/decode/launch_variant.h"

template kda::DecodeVariant kda::describe_decode<kda::DecodeTile<float, 64>>();
