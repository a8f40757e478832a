// Encoding tokens to int8 records, over a Simd class with the loops that instruction sets do better:
//   max_bits(values)              bits of the largest magnitude of 64 values
//   max_bits_of_8(values, out)    the same of eight groups in a row
//   first_of_largest(v, n)        index of the first largest of n integers (n a multiple of 16, 64-byte alignment)
//   replace(v, i, value)          v[i] = value, stored as widely as first_of_largest loads: a load that finds a
//   narrower
//                                 store on its way waits until that has reached the cache
//   take(values, bits)            one pass over 64 values: a bit for each whose magnitude has these bits, and the bits
//                                 of the largest magnitude below
//   scales(max, n, half, inv)     group_scale() of n groups (n a multiple of 16)
//   quantize(values, inv, codes)  64 codes; anything in the place of an outlier
// Included by one file an instruction set; everything has internal linkage.
//
// The outliers are found by taking the largest magnitude out of the row, slot after slot: with the maxima of the groups
// at hand that is one search among groups and one inside a group, without a branch that depends on the data. It leaves
// behind just what quantising needs, every group's maximum without its outliers. Each search waits for the one before
// it, so four tokens take turns.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "boundary/record.h"

namespace chainfed {
namespace {

constexpr int64_t kGroupPadding = 16;  // group arrays are padded with zeros to a multiple
constexpr int64_t kTokensInTurn = 4;

struct Taken {
  uint64_t equal;
  uint32_t below;
};

struct TokenState {
  alignas(64) uint32_t max_bits[kMaxGroups + kGroupPadding];
  alignas(64) float inverse[kMaxGroups + kGroupPadding];
  alignas(64) uint16_t halves[kMaxGroups + kGroupPadding];
  uint64_t taken[kMaxGroups];  // a bit for each outlier of the group
  uint16_t columns[kMaxOutliers];
  int64_t num_columns;
  const float* row;
  float tail[kGroupSize];  // the last group, filled up with zeros, when the row does not fill it

  const float* group(int64_t g, int64_t whole_groups) const { return g < whole_groups ? row + g * kGroupSize : tail; }
};

// What stays zero from token to token: the padding of the maxima, and `taken`, which write_record clears again.
static inline void clear(int64_t hidden_size, int64_t padded_groups, TokenState& token) {
  const int64_t groups = num_groups(hidden_size);
  std::fill(token.max_bits + groups, token.max_bits + padded_groups, 0u);
  std::fill(token.taken, token.taken + groups, uint64_t{0});
}

template <typename Simd>
void load_row(const float* row, int64_t hidden_size, TokenState& token) {
  const int64_t groups = num_groups(hidden_size), whole = hidden_size / kGroupSize;
  token.row = row;
  token.num_columns = 0;
  int64_t g = 0;
  for (; g + 8 <= whole; g += 8) Simd::max_bits_of_8(row + g * kGroupSize, token.max_bits + g);
  for (; g < whole; ++g) token.max_bits[g] = Simd::max_bits(row + g * kGroupSize);
  if (whole < groups) {
    std::fill(std::copy(row + whole * kGroupSize, row + hidden_size, token.tail), token.tail + kGroupSize, 0.0f);
    token.max_bits[whole] = Simd::max_bits(token.tail);
  }
}

template <typename Simd>
void take_outlier(int64_t slot, int64_t whole_groups, int64_t padded_groups, TokenState& token) {
  const int64_t group = Simd::first_of_largest(token.max_bits, padded_groups);
  // Once only zeros are left, the slots stay unused: one that holds a zero buys nothing.
  if (token.max_bits[group] == 0) return;
  const float* values = token.group(group, whole_groups);
  const Taken found = Simd::take(values, token.max_bits[group]);
  const uint64_t equal = found.equal & ~token.taken[group];
  token.columns[slot] = static_cast<uint16_t>(group * kGroupSize + __builtin_ctzll(equal));
  token.num_columns = slot + 1;
  token.taken[group] |= equal & -equal;
  // What is larger has been taken already: the next is of the same magnitude or the largest below.
  if ((equal & (equal - 1)) == 0) Simd::replace(token.max_bits, group, found.below);
}

// Eight bytes at a time, up to seven too many: they lie in the outliers' slots, which are written afterwards. A call of
// memcpy takes as long as a group.
static inline void copy_halves(const uint16_t* halves, int64_t groups, uint8_t* target) {
  static_assert(kOutlierBytes >= 6, "a record ends no sooner than the last eight bytes");
  for (int64_t g = 0; g < groups; g += 4) {
    std::memcpy(target + 2 * g, halves + g, 8);
    __asm__ volatile("" : : : "memory");  // or the compiler makes the loop a call again
  }
}

template <typename Simd>
void write_record(int64_t hidden_size, int64_t padded_groups, TokenState& token, uint8_t* record) {
  Simd::scales(token.max_bits, padded_groups, token.halves, token.inverse);
  int8_t* codes = reinterpret_cast<int8_t*>(record);
  for (int64_t g = 0; g < num_groups(hidden_size); ++g) {
    if (token.inverse[g] == 0.0f) {
      std::memset(codes + g * kGroupSize, 0, kGroupSize);  // infinity * 0 would not give 0
    } else {
      Simd::quantize(token.group(g, hidden_size / kGroupSize), token.inverse[g], codes + g * kGroupSize);
    }
  }
  for (int64_t i = 0; i < token.num_columns; ++i) {
    codes[token.columns[i]] = 0;
    token.taken[token.columns[i] / kGroupSize] = 0;
  }
  copy_halves(token.halves, num_groups(hidden_size), record + scales_offset(hidden_size));
  write_outliers(token.row, hidden_size, token.columns, token.num_columns, record);
}

template <typename Simd>
void encode_int8_rows(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records) {
  TokenState tokens[kTokensInTurn];
  const int64_t padded_groups = (num_groups(hidden_size) + kGroupPadding - 1) / kGroupPadding * kGroupPadding;
  const int64_t slots = num_outliers(hidden_size), bytes = int8_record_bytes(hidden_size);
  for (TokenState& token : tokens) clear(hidden_size, padded_groups, token);
  for (int64_t first = 0; first < num_tokens; first += kTokensInTurn) {
    const int64_t count = std::min(kTokensInTurn, num_tokens - first);
    for (int64_t t = 0; t < count; ++t) {
      load_row<Simd>(rows + (first + t) * hidden_size, hidden_size, tokens[t]);
    }
    for (int64_t slot = 0; slot < slots; ++slot) {
      for (int64_t t = 0; t < count; ++t) take_outlier<Simd>(slot, hidden_size / kGroupSize, padded_groups, tokens[t]);
    }
    for (int64_t t = 0; t < count; ++t) {
      write_record<Simd>(hidden_size, padded_groups, tokens[t], records + (first + t) * bytes);
    }
  }
}

}  // namespace
}  // namespace chainfed
