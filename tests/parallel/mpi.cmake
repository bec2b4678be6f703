# Ranks as processes, without Criterion.

add_executable(mpi_failures parallel/mpi_failures.c)
target_link_libraries(mpi_failures PRIVATE cumoe_test_support cumoe_mpi m)

function(add_mpi_test name label)
  add_test(NAME ${name} COMMAND "${CMAKE_CURRENT_SOURCE_DIR}/parallel/mpi.sh" "${MPIEXEC_EXECUTABLE}" ${ARGN})
  set_tests_properties(${name} PROPERTIES LABELS ${label} TIMEOUT 300 PROCESSORS 2
    FAIL_REGULAR_EXPRESSION "runtime error:;AddressSanitizer")
endfunction()

foreach(ranks 1 2 4)
  add_mpi_test(parallel.mpi.${ranks} parallel check $<TARGET_FILE:cumoe-check> ${ranks} --filter pairwise)
endforeach()
foreach(way differs late aborts killed leaves refusals)
  add_mpi_test(parallel.mpi.${way} parallel failure $<TARGET_FILE:mpi_failures> ${way})
endforeach()
