# Ranks as processes, without Criterion.

function(add_mpi_test name label)
  add_test(NAME ${name} COMMAND "${CMAKE_CURRENT_SOURCE_DIR}/parallel/mpi.sh" "${MPIEXEC_EXECUTABLE}" ${ARGN})
  set_tests_properties(${name} PROPERTIES LABELS ${label} TIMEOUT 300 PROCESSORS 2
    FAIL_REGULAR_EXPRESSION "runtime error:;AddressSanitizer")
endfunction()

# cumoe-check with transport mpi, once more: in messages of 100 bytes, and on the simulated GPU.
function(add_check_program name library)
  add_executable(${name} check/main.c check/checks.c check/ranks.c
    ${PROJECT_SOURCE_DIR}/mpi/processes.c ${PROJECT_SOURCE_DIR}/mpi/comm_mpi.c)
  target_link_libraries(${name} PRIVATE cumoe_test_support ${library} MPI::MPI_C m)
endfunction()

# Other cases for each number of ranks: each process takes its time to make them.
set(check $<TARGET_FILE:cumoe-check>)
add_mpi_test(parallel.mpi.1 parallel check ${check} ${check} 1 --filter pairwise --filter recompute)
add_mpi_test(parallel.mpi.2 parallel check ${check} ${check} 2 --filter pairwise --filter bf16)
add_mpi_test(parallel.mpi.4 parallel check ${check} ${check} 4 --filter pairwise --filter f32)
add_check_program(check_mpi_pieces cumoe_static)
target_compile_definitions(check_mpi_pieces PRIVATE CUMOE_MPI_MOST_BYTES=100)
add_mpi_test(parallel.mpi.pieces parallel check ${check} $<TARGET_FILE:check_mpi_pieces> 2 --filter small,)
if(TARGET cumoe_sim)
  add_check_program(check_mpi_sim cumoe_sim)
  add_mpi_test(sim.parallel.mpi sim check $<TARGET_FILE:check_sim> $<TARGET_FILE:check_mpi_sim> 2
    --backend cuda --filter small, --filter f32)
endif()

add_executable(mpi_failures parallel/mpi_failures.c)
target_link_libraries(mpi_failures PRIVATE cumoe_test_support cumoe_mpi m)
foreach(way differs late aborts killed leaves refusals)
  add_mpi_test(parallel.mpi.${way} parallel failure $<TARGET_FILE:mpi_failures> ${way})
endforeach()
add_mpi_test(parallel.mpi.kill parallel kill ${check} 1)
