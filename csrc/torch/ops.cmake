# _ops.so: every kernel and its glue.
add_library(kda_ops MODULE ${KDA_GLUE} ${KDA_KERNEL_OBJECTS})
set_target_properties(kda_ops PROPERTIES PREFIX "" OUTPUT_NAME _ops SUFFIX .so LIBRARY_OUTPUT_DIRECTORY ${KDA_OUTPUT})
target_compile_definitions(kda_ops PRIVATE ${TORCH_DEFINITIONS} $<$<IN_LIST:90a,${KDA_ARCHS}>:KDA_HAS_SM90>)
target_compile_options(kda_ops PRIVATE -Wall -Wno-unknown-pragmas)
target_include_directories(kda_ops PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
target_include_directories(kda_ops SYSTEM PRIVATE ${TORCH_DIR}/include ${CUDA_INCLUDE})
target_link_libraries(kda_ops PRIVATE ${TORCH_LINK} ${KDA_CUDART} dl rt pthread)
target_link_options(kda_ops PRIVATE -Wl,--exclude-libs,ALL -Wl,-s)
