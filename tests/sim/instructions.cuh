/* Every function of cuda/ptx.cuh on fixed inputs, compiled by nvcc for a GPU and by g++ for the simulator. */
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>
#include <vector>

constexpr int kInstructionThreads = 64, kInstructionWords = 256;

struct Instruction {
    const char *name;
    void (*kernel)(const uint32_t *in, uint32_t *out); // [256] both
    int ulp; // each word is a float and may be off by so many of its last places; 0: bits
};

extern const Instruction kInstructions[];
extern const int kNumInstructions;

/* Word i of what every kernel reads. */
uint32_t instruction_input(int i);

/* What the kernel makes of it, [256]; words that it leaves alone are 0. */
cudaError_t instruction_run(const Instruction &instruction, std::vector<uint32_t> *out);
