// NF4 in integers, for dots with int8 activations: table[q] is replaced by slope * codebook[q] + intercept, with codes
// of 7 bits where two products must fit the int16 of `maddubs` (2 * 127 * 127 = 32258), of 8 bits where the
// instruction adds up in 32 bits. Codes, slope and intercept minimise the squared error weighted by how often a normal
// distribution uses each entry: 0.71 % of the weights' root mean square with 7 bits, 0.33 % with 8.
#pragma once
#include <cstdint>

namespace chainfed {

struct Nf4Codebook {
  uint8_t codes[16];
  float slope, intercept;
};
static constexpr Nf4Codebook kNf4Codebook7 = {
    {0, 19, 30, 38, 45, 51, 57, 63, 68, 73, 78, 84, 90, 98, 108, 125}, 0.01597967044f, -1.0028300396f};
static constexpr Nf4Codebook kNf4Codebook8 = {
    {0, 38, 59, 75, 89, 101, 113, 124, 134, 144, 155, 166, 179, 194, 214, 248}, 0.00805716954f, -1.0003781207f};

}  // namespace chainfed
