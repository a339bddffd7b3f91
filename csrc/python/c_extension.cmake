# _C: what was built, for whom, and what the compiler said of every variant.
set(PYTHON_INCLUDE "" CACHE PATH "Directory of Python.h")
set(PYBIND11_INCLUDE "" CACHE PATH "Directory of pybind11/pybind11.h")
set(PYTHON_SUFFIX ".so" CACHE STRING "Suffix of extension modules")
set(KDA_BUILD_INFO "{}" CACHE STRING "JSON of versions, from setup.py")

set(header ${CMAKE_BINARY_DIR}/generated/build_info.inc)
add_custom_command(
  OUTPUT ${header}
  COMMAND ${KDA_PYTHON} ${PROJECT_SOURCE_DIR}/csrc/tools/resource_table.py --header ${header} --info "${KDA_BUILD_INFO}"
          ${KDA_RESOURCE_REPORTS}
  DEPENDS ${KDA_RESOURCE_REPORTS} ${PROJECT_SOURCE_DIR}/csrc/tools/resource_table.py
  VERBATIM)
add_library(kda_c MODULE ${PROJECT_SOURCE_DIR}/csrc/python/module.cpp ${PROJECT_SOURCE_DIR}/csrc/python/signature.cpp ${header})
set_target_properties(kda_c PROPERTIES PREFIX "" OUTPUT_NAME _C SUFFIX ${PYTHON_SUFFIX} LIBRARY_OUTPUT_DIRECTORY ${KDA_OUTPUT})
target_include_directories(kda_c PRIVATE ${CMAKE_BINARY_DIR}/generated ${PROJECT_SOURCE_DIR}/csrc)
target_include_directories(kda_c SYSTEM PRIVATE ${PYTHON_INCLUDE} ${PYBIND11_INCLUDE})
target_link_options(kda_c PRIVATE -Wl,-s)
