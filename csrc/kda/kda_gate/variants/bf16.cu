#include "kda/kda_gate/launch_variant.h"

template kda::KdaGateVariant kda::describe_kda_gate<kda::Bf16>();
