# The CMake package of the core: csrc/kda, csrc/tile and csrc/platform, without torch. find_package(kda_cuda) offers
# kda_cuda::kernels, kda_cuda::emulated or both, as they were installed.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
set(KDA_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/kda_cuda)

# Installs a static library as kda_cuda::PART, with the headers below csrc that are named.
function(kda_install_part target part)
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${part} OUTPUT_NAME kda_cuda_${part})
  target_compile_features(${target} INTERFACE cxx_std_17)
  target_include_directories(${target} INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/kda_cuda>)
  foreach(folder ${ARGN})
    install(DIRECTORY ${PROJECT_SOURCE_DIR}/csrc/${folder} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kda_cuda
            COMPONENT core FILES_MATCHING PATTERN "*.h" PATTERN variants EXCLUDE)
  endforeach()
  install(TARGETS ${target} EXPORT kda_cuda-${part} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT core)
  install(EXPORT kda_cuda-${part} NAMESPACE kda_cuda:: DESTINATION ${KDA_PACKAGE_DIR} COMPONENT core)
endfunction()

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/kda_cuda-config.cmake.in
                              ${CMAKE_BINARY_DIR}/kda_cuda-config.cmake INSTALL_DESTINATION ${KDA_PACKAGE_DIR})
# Before 1.0 a minor version may break.
write_basic_package_version_file(${CMAKE_BINARY_DIR}/kda_cuda-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/kda_cuda-config.cmake ${CMAKE_BINARY_DIR}/kda_cuda-config-version.cmake
        DESTINATION ${KDA_PACKAGE_DIR} COMPONENT core)
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/licenses/kda_cuda COMPONENT core)
