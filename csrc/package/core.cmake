# libkda_cuda_kernels.a: every kernel and its launch, for programs without torch.
add_library(kda_kernels STATIC ${KDA_KERNEL_OBJECTS})
set_target_properties(kda_kernels PROPERTIES LINKER_LANGUAGE CXX)
target_compile_definitions(kda_kernels INTERFACE $<$<IN_LIST:90a,${KDA_ARCHS}>:KDA_HAS_SM90>)
target_link_libraries(kda_kernels INTERFACE $<INSTALL_INTERFACE:CUDA::cudart_static>)
kda_install_part(kda_kernels kernels kda platform tile)
