# How everything in this tree is compiled. The rules that decide the library's bits are here.

if(PROJECT_IS_TOP_LEVEL AND NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Release, Debug, RelWithDebInfo or MinSizeRel" FORCE)
endif()

set(CMAKE_C_STANDARD 17)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS OFF)

# Contraction is the compiler's choice per call site: two copies of one formula would round differently, and
# the noise must have the same bits everywhere. Where a fused multiply-add is wanted, the code says fma().
# -fno-math-errno and -fno-trapping-math change no bits: they let sqrt() be one instruction, and loops with
# comparisons vector code. -ffast-math is never used.
add_compile_options(-ffp-contract=off -fno-math-errno -fno-trapping-math)

add_compile_options(
  -Wall -Wextra -Wpedantic -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith -Wwrite-strings
  -Wundef -Wvla)

if(CUMOE_SANITIZE)
  set(sanitize "-fsanitize=${CUMOE_SANITIZE}" -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_compile_options(${sanitize})
  add_link_options(${sanitize})
endif()
if(CUMOE_COVERAGE)
  add_compile_options(--coverage -fprofile-update=atomic)
  add_link_options(--coverage)
endif()

find_package(OpenMP COMPONENTS C)
if(NOT OpenMP_C_FOUND)
  message(FATAL_ERROR
    "cumoe needs a C compiler with OpenMP, and ${CMAKE_C_COMPILER} has none. "
    "GCC brings it (Debian: apt-get install gcc); Clang needs libomp-dev.")
endif()
