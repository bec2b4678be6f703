# Whether the kernels of cuda/ are compiled. Sets CUMOE_CUDA_STATE, a line for the summary. The library has no CUDA
# backend yet: kernels are compiled and simulated as part of the tests.

set(CUMOE_CUDA auto CACHE STRING "CUDA kernels: auto (with a CUDA toolkit) or off")
set_property(CACHE CUMOE_CUDA PROPERTY STRINGS auto off)
set(CUMOE_CUDA_TOOLKIT 13.0) # the oldest: knows sm_120, and the tested one

if(CUMOE_CUDA STREQUAL "off")
  set(CUMOE_CUDA_STATE "left out: CUMOE_CUDA=off")
elseif(CUMOE_CUDA STREQUAL "auto")
  include(CheckLanguage)
  set(CMAKE_MESSAGE_LOG_LEVEL WARNING) # the summary says it
  check_language(CUDA)
  unset(CMAKE_MESSAGE_LOG_LEVEL)
  set(version "")
  if(CMAKE_CUDA_COMPILER)
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE version)
    string(REGEX MATCH "release ([0-9.]+)" version "${version}")
    set(version ${CMAKE_MATCH_1})
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    set(CUMOE_CUDA_STATE "left out: no CUDA toolkit found; nor is it in this version")
  elseif(NOT version VERSION_GREATER_EQUAL CUMOE_CUDA_TOOLKIT)
    set(CUMOE_CUDA_STATE "left out: toolkit ${version}, but ${CUMOE_CUDA_TOOLKIT} is needed (${CMAKE_CUDA_COMPILER})")
  elseif(NOT CUMOE_TESTS)
    set(CUMOE_CUDA_STATE "not in this version")
  else()
    enable_language(CUDA)
    set(CUMOE_CUDA_STATE "not in this version; first kernels are compiled and simulated (${CMAKE_CUDA_COMPILER})")
  endif()
else()
  message(FATAL_ERROR "CUMOE_CUDA = ${CUMOE_CUDA}, but must be auto or off")
endif()
