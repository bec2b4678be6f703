# Install rules: two libraries, the headers, a CMake package and a pkg-config file. All of it is relocatable. Those of
# libcumoe_mpi are in mpi/.

include(CMakePackageConfigHelpers)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/cumoe")

install(TARGETS cumoe EXPORT cumoe-shared)
install(TARGETS cumoe_static EXPORT cumoe-static)
install(DIRECTORY include/cumoe TYPE INCLUDE FILES_MATCHING PATTERN "*.h" PATTERN mpi.h EXCLUDE)
if(CUMOE_WITH_MPI)
  install(FILES include/cumoe/mpi.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/cumoe")
endif()
install(FILES LICENSE TYPE DOC)
if(CUMOE_WITH_CUDA)
  install(FILES "${CUMOE_CUDART}" DESTINATION "${CUMOE_CUDART_FOLDER}") # for programs with the static library
endif()

install(EXPORT cumoe-shared NAMESPACE cumoe:: DESTINATION ${package_dir} FILE cumoe-shared.cmake)
install(EXPORT cumoe-static NAMESPACE cumoe:: DESTINATION ${package_dir} FILE cumoe-static.cmake)
configure_package_config_file(cmake/cumoeConfig.cmake.in cumoeConfig.cmake INSTALL_DESTINATION ${package_dir})
if(PROJECT_VERSION_MAJOR EQUAL 0)
  set(compatibility SameMinorVersion)
else()
  set(compatibility SameMajorVersion)
endif()
write_basic_package_version_file(cumoeConfigVersion.cmake COMPATIBILITY ${compatibility})
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/cumoeConfig.cmake" "${CMAKE_CURRENT_BINARY_DIR}/cumoeConfigVersion.cmake"
  DESTINATION ${package_dir})

# From the .pc file's own folder up to the prefix, so that a moved tree still works.
cmake_path(SET pkgconfig_dir NORMALIZE "/prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig")
cmake_path(RELATIVE_PATH pkgconfig_dir BASE_DIRECTORY "/prefix" OUTPUT_VARIABLE relative)
string(REGEX REPLACE "[^/]+" ".." PC_PREFIX_FROM_HERE "${relative}")
string(JOIN " " PC_LIBS_PRIVATE ${CUMOE_STATIC_LIBS})
if(CUMOE_WITH_CUDA)
  string(PREPEND PC_LIBS_PRIVATE "-L\${libdir}/cumoe -lcudart_static ")
endif()
configure_file(cmake/cumoe.pc.in cumoe.pc @ONLY)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/cumoe.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
