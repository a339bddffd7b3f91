# Microbenchmarks on the core alone: no torch. The executable finds the Google Benchmark that is copied beside it, so that
# build/bench can be carried to a machine with a GPU and nothing else.
find_package(benchmark REQUIRED)
execute_process(COMMAND git -C ${PROJECT_SOURCE_DIR} rev-parse HEAD OUTPUT_VARIABLE commit
                OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
set(objects ${KDA_KERNEL_OBJECTS})
list(FILTER objects INCLUDE REGEX "/decode_[^/]*[.]o$")

add_executable(bench_decode ${PROJECT_SOURCE_DIR}/bench/cpp/bench_decode.cpp ${objects})
target_compile_definitions(bench_decode PRIVATE KDA_COMMIT="${commit}")
target_compile_options(bench_decode PRIVATE -Wall -Wno-unknown-pragmas)
target_include_directories(bench_decode PRIVATE ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/csrc)
target_include_directories(bench_decode SYSTEM PRIVATE ${CUDA_INCLUDE})
target_link_libraries(bench_decode PRIVATE benchmark::benchmark ${KDA_CUDART} dl rt pthread)
set_target_properties(bench_decode PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_SOURCE_DIR}/build/bench
                      BUILD_RPATH "$ORIGIN" BUILD_RPATH_USE_ORIGIN ON SKIP_BUILD_RPATH OFF)
add_custom_command(TARGET bench_decode POST_BUILD COMMAND ${CMAKE_COMMAND} -E copy
                   $<TARGET_FILE:benchmark::benchmark>
                   ${PROJECT_SOURCE_DIR}/build/bench/$<TARGET_SONAME_FILE_NAME:benchmark::benchmark>)
