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
