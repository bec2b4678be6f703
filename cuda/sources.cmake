# The files of the CUDA backend; the library and the simulator compile the same ones.
set(CUMOE_CUDA_SOURCES
  "${CMAKE_CURRENT_LIST_DIR}/combine.cu"
  "${CMAKE_CURRENT_LIST_DIR}/initialize.cu"
  "${CMAKE_CURRENT_LIST_DIR}/optimizer.cu"
  "${CMAKE_CURRENT_LIST_DIR}/optimizer_means.cu"
  "${CMAKE_CURRENT_LIST_DIR}/optimizer_update.cu"
  "${CMAKE_CURRENT_LIST_DIR}/permute_sorted.cu"
  "${CMAKE_CURRENT_LIST_DIR}/sort.cu"
  "${CMAKE_CURRENT_LIST_DIR}/gate.cu"
  "${CMAKE_CURRENT_LIST_DIR}/gate_backward.cu"
  "${CMAKE_CURRENT_LIST_DIR}/gate_balanced.cu"
  "${CMAKE_CURRENT_LIST_DIR}/gate_balanced_backward.cu"
  "${CMAKE_CURRENT_LIST_DIR}/gate_balanced_rows.cu"
  "${CMAKE_CURRENT_LIST_DIR}/gate_balanced_select.cu"
  "${CMAKE_CURRENT_LIST_DIR}/gate_bias.cu"
  "${CMAKE_CURRENT_LIST_DIR}/gate_scratch.cu"
  "${CMAKE_CURRENT_LIST_DIR}/experts.cu"
  "${CMAKE_CURRENT_LIST_DIR}/experts_bf16.cu"
  "${CMAKE_CURRENT_LIST_DIR}/experts_exact.cu"
  "${CMAKE_CURRENT_LIST_DIR}/experts_f16.cu"
  "${CMAKE_CURRENT_LIST_DIR}/experts_sums.cu"
  "${CMAKE_CURRENT_LIST_DIR}/experts_tf32.cu"
  "${CMAKE_CURRENT_LIST_DIR}/gemm_exact.cu"
  "${CMAKE_CURRENT_LIST_DIR}/exchange.cu"
  "${CMAKE_CURRENT_LIST_DIR}/permute.cu")

# What has no kernels: the table, the device, and the messages between ranks.
set(CUMOE_CUDA_BACKEND_SOURCES
  "${CMAKE_CURRENT_LIST_DIR}/backend.cu"
  "${CMAKE_CURRENT_LIST_DIR}/comm_nccl.cu"
  "${CMAKE_CURRENT_LIST_DIR}/device.cu"
  "${CMAKE_CURRENT_LIST_DIR}/nccl.cu")
