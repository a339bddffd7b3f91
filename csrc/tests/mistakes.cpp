// Compiles as it is; with any of the names defined it must not, and says why (CMakeLists.txt, does_not_compile_...).
#include "platform/launch.h"
#include "platform/platform.h"

namespace kda::tests {

inline void registers() {
#if defined(REGISTERS_NOT_OF_EIGHT)
  set_max_registers<100, true>();
#elif defined(REGISTERS_TOO_FEW)
  set_max_registers<16, false>();
#else
  set_max_registers<104, true>();
#endif
}
inline void product(MmaAccumulator (&d)[6], MmaAccumulator (&e)[8]) {
#if defined(PRODUCT_OF_ODD_WIDTH)
  wgmma_m64k16_shared<Bf16, 48, false, false>(d, 0, 0, false);
#else
  wgmma_m64k16_shared<Bf16, 64, false, false>(e, 0, 0, false);
  (void)d;
#endif
}
inline void tensor(TensorMap const& map, Mbarrier& full, void* shared) {
#if defined(TENSOR_OF_FIVE_DIMENSIONS)
  tensor_load(shared, map, {0, 0, 0, 0, 0}, full);
#else
  tensor_load(shared, map, {0, 0, 0, 0}, full);
#endif
}

}  // namespace kda::tests
