/* The instructions for a GPU. A file of its own, since the simulator compiles instructions.cu as C++. */
#include "tests/sim/instructions.cu"
