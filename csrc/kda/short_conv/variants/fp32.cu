#include "kda/short_conv/launch_variant.h"

template kda::ShortConvVariant kda::describe_short_conv<float>();
