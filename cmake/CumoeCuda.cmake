# Whether the library gets the CUDA backend, and from which toolkit. Sets CUMOE_WITH_CUDA, CUMOE_CUDA_STATE, a line for
# the summary, CUMOE_CUDART, CUDA's runtime to link, and CUMOE_CUDA_HEADERS, where the simulator finds its types.

set(CUMOE_CUDA auto CACHE STRING "CUDA backend: auto (where a toolkit is found), system (must be found), wheels \
(a toolkit is fetched from PyPI into the build folder) or off")
set_property(CACHE CUMOE_CUDA PROPERTY STRINGS auto system wheels off)
set(CUMOE_CUDA_TOOLKIT 13.0) # the oldest: knows sm_120, and the tested one
set(CUMOE_CUDA_ARCHITECTURES "80-real;90-real;100-real;120-real;90-virtual" CACHE STRING
  "What kernels are compiled for, as in CMAKE_CUDA_ARCHITECTURES; each takes its time")
set(CUMOE_CUDA_LAUNCHER "${PROJECT_SOURCE_DIR}/cuda/ptxas.sh" ${CMAKE_CUDA_COMPILER_LAUNCHER})

set(CUMOE_WITH_CUDA FALSE)
set(CUMOE_CUDART "")
set(CUMOE_CUDART_LIBS "")
# Presets share one fetched toolkit.
cmake_path(GET PROJECT_BINARY_DIR PARENT_PATH toolkit)
if(NOT toolkit STREQUAL "${PROJECT_SOURCE_DIR}/build")
  set(toolkit "${PROJECT_BINARY_DIR}")
endif()
string(APPEND toolkit "/toolkit")

# Sets CUMOE_CUDA_STATE to the reason why there is none, or enables the language.
macro(cumoe_find_toolkit)
  if(CUMOE_CUDA STREQUAL "wheels" AND NOT CMAKE_CUDA_COMPILER_LOADED)
    execute_process(COMMAND "${PROJECT_SOURCE_DIR}/cmake/toolkit.sh" "${toolkit}"
      RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
    if(failed)
      message(FATAL_ERROR "CUMOE_CUDA=wheels, but the toolkit could not be fetched:\n${said}")
    endif()
    set(CMAKE_CUDA_COMPILER "${toolkit}/cuda/bin/nvcc" CACHE FILEPATH "CUDA compiler" FORCE)
  endif()
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(CUMOE_NVCC nvcc PATHS /usr/local/cuda/bin /opt/cuda/bin DOC "nvcc of an installed toolkit")
    if(CUMOE_NVCC)
      set(ENV{CUDACXX} "${CUMOE_NVCC}")
    endif()
  endif()
  include(CheckLanguage)
  set(CMAKE_MESSAGE_LOG_LEVEL WARNING) # the summary says it
  check_language(CUDA)
  unset(CMAKE_MESSAGE_LOG_LEVEL)
  set(CUMOE_CUDA_STATE "")
  if(NOT CMAKE_CUDA_COMPILER)
    set(CUMOE_CUDA_STATE "no CUDA toolkit found (CUMOE_CUDA=wheels fetches one)")
  else()
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE version)
    string(REGEX MATCH "release ([0-9.]+)" version "${version}")
    set(version ${CMAKE_MATCH_1})
    if(NOT version VERSION_GREATER_EQUAL CUMOE_CUDA_TOOLKIT)
      set(CUMOE_CUDA_STATE
        "toolkit ${version}, but ${CUMOE_CUDA_TOOLKIT} or later is needed (${CMAKE_CUDA_COMPILER})")
    endif()
  endif()
  if(NOT CUMOE_CUDA_STATE)
    enable_language(CUDA)
    find_path(CUMOE_CUDA_HEADERS cuda_runtime_api.h HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} NO_DEFAULT_PATH
      DOC "Folder of the CUDA toolkit's headers")
    # By its path, as a static archive: no program needs CUDA's runtime, or a driver, to start.
    find_library(CUMOE_CUDART_LIBRARY libcudart_static.a HINTS ${CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES}
      ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} NO_DEFAULT_PATH DOC "CUDA's runtime, the static archive")
    if(NOT CUMOE_CUDART_LIBRARY)
      message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} has no libcudart_static.a beside it")
    endif()
  endif()
endmacro()

if(CUMOE_CUDA STREQUAL "off")
  set(CUMOE_CUDA_STATE "left out: CUMOE_CUDA=off")
elseif(NOT CUMOE_CUDA MATCHES "^(auto|system|wheels)$")
  message(FATAL_ERROR "CUMOE_CUDA = ${CUMOE_CUDA}, but must be auto, system, wheels or off")
else()
  include("${PROJECT_SOURCE_DIR}/cuda/sources.cmake")
  cumoe_find_toolkit()
  if(CUMOE_CUDA_STATE AND (CUMOE_CUDA STREQUAL "system" OR CUMOE_STRICT))
    message(FATAL_ERROR "CUMOE_CUDA=${CUMOE_CUDA}: ${CUMOE_CUDA_STATE}. Without the CUDA backend: CUMOE_CUDA=off")
  elseif(CUMOE_CUDA_STATE)
    string(PREPEND CUMOE_CUDA_STATE "left out: ")
  elseif(CUMOE_SANITIZE OR CUMOE_COVERAGE)
    # What can be looked at with these is the code of the host, and the simulator runs all of it.
    set(CUMOE_CUDA_STATE "in the simulator alone, as CUMOE_SANITIZE or CUMOE_COVERAGE is set")
  else()
    set(CUMOE_WITH_CUDA TRUE)
    set(CUMOE_CUDART "${CUMOE_CUDART_LIBRARY}")
    set(CUMOE_CUDART_FOLDER "${CMAKE_INSTALL_LIBDIR}/cumoe") # where it is installed
    set(CUMOE_CUDART_LIBS -lrt -lpthread -ldl)
    string(REPLACE ";" " " architectures "${CUMOE_CUDA_ARCHITECTURES}")
    set(CUMOE_CUDA_STATE "toolkit ${version} (${CMAKE_CUDA_COMPILER}) for ${architectures}")
  endif()
endif()
