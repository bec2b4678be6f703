# Whether the CUDA backend is part of this build. Sets CUMOE_CUDA_STATE, a line for the summary.
# This version has no CUDA sources; the toolkit is looked for so that the answer says which of the two is missing.

set(CUMOE_CUDA auto CACHE STRING "CUDA backend: auto (with a CUDA toolkit) or off")
set_property(CACHE CUMOE_CUDA PROPERTY STRINGS auto off)

if(CUMOE_CUDA STREQUAL "off")
  set(CUMOE_CUDA_STATE "left out: CUMOE_CUDA=off")
elseif(CUMOE_CUDA STREQUAL "auto")
  include(CheckLanguage)
  set(CMAKE_MESSAGE_LOG_LEVEL WARNING) # the summary says it
  check_language(CUDA)
  unset(CMAKE_MESSAGE_LOG_LEVEL)
  if(CMAKE_CUDA_COMPILER)
    set(CUMOE_CUDA_STATE "not in this version (toolkit found: ${CMAKE_CUDA_COMPILER})")
  else()
    set(CUMOE_CUDA_STATE "left out: no CUDA toolkit found; nor is it in this version")
  endif()
else()
  message(FATAL_ERROR "CUMOE_CUDA = ${CUMOE_CUDA}, but must be auto or off")
endif()
