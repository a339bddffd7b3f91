# Microbenchmarks on the core alone: no torch. The executables find the Google Benchmark that is copied beside them, so
# that build/bench can be carried to a machine with a GPU and nothing else.
find_package(benchmark REQUIRED)
execute_process(COMMAND git -C ${PROJECT_SOURCE_DIR} rev-parse HEAD OUTPUT_VARIABLE commit
                OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)

foreach(operation decode chunk_fwd chunk_bwd)
  string(REPLACE "chunk_bwd" "chunk_[bf]wd" kernels ${operation})  # the prepare kernel is compiled with the forward
  set(objects ${KDA_KERNEL_OBJECTS})
  list(FILTER objects INCLUDE REGEX "/${kernels}_[^/]*[.]o$")
  set(target bench_${operation})
  add_executable(${target} ${PROJECT_SOURCE_DIR}/bench/cpp/${target}.cpp ${objects})
  target_compile_definitions(${target} PRIVATE KDA_COMMIT="${commit}" $<$<IN_LIST:90a,${KDA_ARCHS}>:KDA_HAS_SM90>)
  target_compile_options(${target} PRIVATE -Wall -Wno-unknown-pragmas)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/csrc)
  target_include_directories(${target} SYSTEM PRIVATE ${CUDA_INCLUDE})
  target_link_libraries(${target} PRIVATE benchmark::benchmark ${KDA_CUDART} dl rt pthread)
  set_target_properties(${target} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_SOURCE_DIR}/build/bench
                        BUILD_RPATH "$ORIGIN" BUILD_RPATH_USE_ORIGIN ON SKIP_BUILD_RPATH OFF)
  add_custom_command(TARGET ${target} POST_BUILD COMMAND ${CMAKE_COMMAND} -E copy
                     $<TARGET_FILE:benchmark::benchmark>
                     ${PROJECT_SOURCE_DIR}/build/bench/$<TARGET_SONAME_FILE_NAME:benchmark::benchmark>)
endforeach()
