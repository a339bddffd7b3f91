# Objects of every kernel. nvcc is called by hand, because CMake's CUDA language cannot use an nvcc that
# comes from PyPI; its resource report is kept beside each object for the table of variants. An object whose report says
# that wgmma was serialised is no object: ptxas itself takes that for an information.
find_program(KDA_NVCC nvcc REQUIRED)
set(KDA_ARCHS "80;90a" CACHE STRING "Compute capabilities, such as 80;90a")
set(KDA_CUDART "" CACHE FILEPATH "libcudart_static.a")

set(compiler ${KDA_NVCC})
if(KDA_CCACHE)
  set(compiler "${KDA_CCACHE} ${KDA_NVCC}")
endif()
set(KDA_KERNEL_OBJECTS)
set(KDA_RESOURCE_REPORTS)
foreach(source ${KDA_VARIANTS})
  file(RELATIVE_PATH name ${PROJECT_SOURCE_DIR}/csrc/kda ${source})
  string(REPLACE "/variants/" "_" name ${name})
  string(REPLACE "/" "_" name ${name})
  set(archs ${KDA_ARCHS})
  if(name MATCHES "_sm90[.]cu$")  # wgmma, TMA: Hopper only
    list(FILTER archs INCLUDE REGEX "^90a$")
  endif()
  if(NOT archs)
    continue()
  endif()
  set(gencode)
  foreach(arch ${archs})
    list(APPEND gencode -gencode arch=compute_${arch},code=sm_${arch})
  endforeach()
  set(object ${CMAKE_BINARY_DIR}/kernels/${name}.o)
  set(report ${CMAKE_BINARY_DIR}/kernels/${name}.ptxas)
  list(JOIN gencode " " gencode_text)
  add_custom_command(
    OUTPUT ${object} ${report}
    COMMAND sh -c "${compiler} -std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden \
-Xptxas=-v ${gencode_text} -I${PROJECT_SOURCE_DIR}/csrc -MD -MF ${object}.d -c ${source} -o ${object} 2> ${report} \
|| { cat ${report} >&2; exit 1; }"
    COMMAND ${KDA_PYTHON} ${PROJECT_SOURCE_DIR}/csrc/tools/resource_table.py --guard ${report}
    DEPENDS ${source}
    DEPFILE ${object}.d
    COMMENT "nvcc ${name} for ${archs}"
    VERBATIM)
  list(APPEND KDA_KERNEL_OBJECTS ${object})
  list(APPEND KDA_RESOURCE_REPORTS ${report})
endforeach()
