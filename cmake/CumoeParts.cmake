# Parts of the build that need a package of their own.

find_package(PkgConfig QUIET)

# Find pkg-config module MODULE as PkgConfig::PREFIX. Without it, PART is left out and the summary says so; with
# CUMOE_STRICT that is an error.
macro(cumoe_pkg_config PREFIX MODULE PART DEBIAN_PACKAGE)
  set(${PREFIX}_FOUND FALSE)
  if(PkgConfig_FOUND)
    pkg_check_modules(${PREFIX} QUIET IMPORTED_TARGET ${MODULE})
  endif()
  if(NOT ${PREFIX}_FOUND)
    set(reason "${PART}: pkg-config does not find ${MODULE} (Debian: apt-get install pkg-config ${DEBIAN_PACKAGE})")
    if(CUMOE_STRICT)
      message(FATAL_ERROR "${reason}")
    endif()
    list(APPEND CUMOE_LEFT_OUT "${reason}")
  endif()
endmacro()

# Sets lines to the NAME FILE TEST of each fault in LIST, where TEST matches REGEX. What stands behind them has characters
# that mean something in a list of CMake.
macro(cumoe_read_faults LIST REGEX)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${LIST}")
  file(READ "${LIST}" lines)
  string(REGEX MATCHALL "\n[a-z][a-z0-9-]* " names "${lines}")
  string(REGEX MATCHALL "\n[a-z][a-z0-9-]* +[^ \n]+ +${REGEX} " lines "${lines}")
  list(LENGTH names num_names)
  list(LENGTH lines num_lines)
  if(NOT num_names EQUAL num_lines)
    message(FATAL_ERROR "${LIST}: ${num_names} names, but ${num_lines} times NAME FILE TEST")
  endif()
endmacro()
