#include "tests/sim/print_instructions.h"

#include "tests/sim/instructions.cuh"

#include <fstream>
#include <map>
#include <sstream>
#include <stdio.h>
#include <string>

namespace
{

typedef std::map<std::string, std::vector<std::string>> golden_t; // lines of a name, without it

/* FNV-1a over the bytes, low ones first. */
uint64_t hash(const std::vector<uint32_t> &words)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (const uint32_t word : words)
        for (int byte = 0; byte < 4; byte++) h = (h ^ (word >> 8 * byte & 0xff)) * 0x100000001b3u;
    return h;
}

std::string line_of(const Instruction &instruction, const std::vector<uint32_t> &words)
{
    char text[32];
    if (instruction.ulp == 0) {
        snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash(words)));
        return text;
    }
    std::string line;
    for (const uint32_t word : words) {
        snprintf(text, sizeof text, "%s%08x", line.empty() ? "" : " ", word);
        line += text;
    }
    return line;
}

bool agrees(const Instruction &instruction, const std::vector<uint32_t> &words, const std::string &golden)
{
    if (instruction.ulp == 0) return line_of(instruction, words) == golden;
    std::istringstream in(golden);
    in >> std::hex;
    for (const uint32_t word : words) {
        uint32_t expected;
        if (!(in >> expected)) return false;
        const int64_t difference = static_cast<int64_t>(word) - static_cast<int64_t>(expected);
        if (difference > instruction.ulp || difference < -instruction.ulp) return false;
    }
    return true;
}

bool read_golden(const char *file, golden_t *golden)
{
    std::ifstream in(file);
    for (std::string line; std::getline(in, line);) {
        const size_t space = line.find(' ');
        if (line[0] != '#' && space != std::string::npos)
            (*golden)[line.substr(0, space)].push_back(line.substr(space + 1));
    }
    return in.eof();
}

} // namespace

int print_instructions(int ordinal, char **files)
{
    golden_t golden;
    int different = 0, unconfirmed = 0;
    for (; *files; files++)
        if (!read_golden(*files, &golden)) return fprintf(stderr, "cannot read %s\n", *files), 2;
    const cudaError_t entered = cudaSetDevice(ordinal);
    if (entered) return fprintf(stderr, "CUDA device %d: %s\n", ordinal, cudaGetErrorString(entered)), 2;
    for (int i = 0; i < kNumInstructions; i++) {
        const Instruction &instruction = kInstructions[i];
        std::vector<uint32_t> words;
        const cudaError_t error = instruction_run(instruction, &words);
        if (error) return fprintf(stderr, "%s: %s\n", instruction.name, cudaGetErrorString(error)), 2;
        printf("%s %s\n", instruction.name, line_of(instruction, words).c_str());
        const std::vector<std::string> &lines = golden[instruction.name];
        for (const std::string &line : lines) {
            if (agrees(instruction, words, line)) continue;
            different++;
            fprintf(stderr, "%s: differs from %s\n", instruction.name, line.c_str());
        }
        if (!lines.empty()) continue;
        unconfirmed++;
        fprintf(stderr, "%s: not confirmed on a GPU yet\n", instruction.name);
    }
    fprintf(stderr, "%d instructions: %d differ, %d not confirmed on a GPU yet\n", kNumInstructions, different,
            unconfirmed);
    return different ? 1 : 0;
}
