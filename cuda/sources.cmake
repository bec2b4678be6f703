# The files of the CUDA backend; the library and the simulator compile the same ones.
set(CUMOE_CUDA_SOURCES
  "${CMAKE_CURRENT_LIST_DIR}/permute.cu")
