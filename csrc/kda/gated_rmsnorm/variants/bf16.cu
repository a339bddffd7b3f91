#include "kda/gated_rmsnorm/launch_variant.h"

template kda::GatedRmsNormVariant kda::describe_gated_rmsnorm<kda::Bf16>();
