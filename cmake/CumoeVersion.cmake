# The version stands in include/cumoe/version.h and nowhere else. Sets CUMOE_VERSION and CUMOE_SOVERSION.

set(version_header "${CMAKE_CURRENT_LIST_DIR}/../include/cumoe/version.h")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${version_header}")

foreach(part MAJOR MINOR PATCH)
  file(STRINGS "${version_header}" line REGEX "^#define CUMOE_VERSION_${part} +[0-9]+$")
  if(NOT line)
    message(FATAL_ERROR "${version_header}: no line '#define CUMOE_VERSION_${part} <number>'")
  endif()
  string(REGEX MATCH "[0-9]+$" version_${part} "${line}")
endforeach()
set(CUMOE_VERSION "${version_MAJOR}.${version_MINOR}.${version_PATCH}")

# Until 1.0 a minor version may change the interface, so it is part of the soname.
if(version_MAJOR EQUAL 0)
  set(CUMOE_SOVERSION "0.${version_MINOR}")
else()
  set(CUMOE_SOVERSION "${version_MAJOR}")
endif()
