// Encoding to int8 records, eight tokens at a time, each a lane of a vector: one search among the groups' maxima then
// finds the next outlier of all eight, and one tree of maxima reduces what each of them leaves in its group. The values
// themselves are read by token, 64 at a time, by a Simd class:
//   max_of_group(values)        eight lanes, the largest of which is the largest magnitude of 64 values
//   distances(values, bits)     how far magnitudes lie above `bits`: see Distances
//   position(bit)               which value a bit of Distances::equal stands for
//   quantize(values, inv, codes)  64 codes; anything in the place of an outlier
// Included by one file an instruction set, AVX2 or more; everything has internal linkage. The result is that of
// encode_int8-inl.h, which takes the outliers of one token after another.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "boundary/codec.h"
#include "boundary/record.h"

namespace chainfed {
namespace {

constexpr int64_t kLanes = kTokensAtOnce;
constexpr int64_t kLineFloats = 16;
constexpr int64_t kWidestFetched = 768;  // two times eight rows of that many values take 48 KiB

// By group, then by token.
struct Work {
  alignas(64) uint32_t max_bits[kMaxGroups][kLanes];
  alignas(64) float inverse[kMaxGroups][kLanes];
  alignas(64) uint16_t halves[kMaxGroups][kLanes];
  float tails[kLanes][kGroupSize];  // the last group, filled up with zeros, of rows that do not fill it
};

// Up to eight tokens. `kEven`: eight tokens whose rows fill their last group; knowing it saves a tenth.
template <typename Simd, bool kEven>
struct Batch {
  Work& work;
  const float* rows;
  uint8_t* records;
  int64_t hidden_size, groups, slots, slots_offset, bytes, some;
  bool fetch_next;  // as many tokens follow, and there is room for them in the first-level cache

  int64_t count() const { return kEven ? kLanes : some; }
  const float* group(int64_t token, int64_t g) const {
    if (!kEven && (g + 1) * kGroupSize > hidden_size) return work.tails[token];
    return rows + token * hidden_size + g * kGroupSize;
  }
  uint8_t* record(int64_t token) const { return records + token * bytes; }
};

__m256i load(const void* values) { return _mm256_load_si256(static_cast<const __m256i*>(values)); }

void store(void* target, __m256i values) { _mm256_store_si256(static_cast<__m256i*>(target), values); }

__m256i all_lanes(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }

// Magnitudes are below 2^31, so that signed and unsigned maxima of them are the same; distances (below) are unsigned.
__m256i max_of(__m256i a, __m256i b) { return _mm256_max_epu32(a, b); }

// Lane t of the result: the largest lane of vector(t).
template <typename Vector>
__m256i max_of_each(Vector vector) {
  __m256i two[4], four[2];
  for (int i = 0; i < 4; ++i) {
    const __m256i a = vector(2 * i), b = vector(2 * i + 1);
    two[i] = max_of(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    four[i] =
        max_of(_mm256_unpacklo_epi64(two[2 * i], two[2 * i + 1]), _mm256_unpackhi_epi64(two[2 * i], two[2 * i + 1]));
  }
  return max_of(_mm256_permute2x128_si256(four[0], four[1], 0x20), _mm256_permute2x128_si256(four[0], four[1], 0x31));
}

template <typename Simd, bool kEven>
void find_maxima(const Batch<Simd, kEven> batch) {
  const int64_t count = batch.count(), whole = batch.hidden_size / kGroupSize;
  for (int64_t t = 0; !kEven && t < count; ++t) {
    const float* row = batch.rows + t * batch.hidden_size;
    float* tail = batch.work.tails[t];
    std::fill(std::copy(row + whole * kGroupSize, row + batch.hidden_size, tail), tail + kGroupSize, 0.0f);
  }
  for (int64_t g = 0; g < batch.groups; ++g) {
    store(batch.work.max_bits[g], max_of_each([&](int t) {
            return t < count ? Simd::max_of_group(batch.group(t, g)) : _mm256_setzero_si256();
          }));
  }
}

// What a lane's token has in sight: the largest magnitude left in the row, the first group that has it, and, once it is
// taken, the largest left in that group.
struct Largest {
  __m256i bits, group, below;
};

// The group's maxima after the outliers found last.
__m256i maxima_left(const uint32_t* maxima, __m256i group, const Largest& last) {
  return _mm256_blendv_epi8(load(maxima), last.below, _mm256_cmpeq_epi32(last.group, group));
}

void find_largest(int64_t groups, uint32_t (*max_bits)[kLanes], Largest& largest) {
  const Largest last = largest;
  __m256i bits = _mm256_setzero_si256(), first = _mm256_setzero_si256(), group = _mm256_setzero_si256();
  for (int64_t g = 0; g < groups; ++g) {
    const __m256i maxima = maxima_left(max_bits[g], group, last);
    store(max_bits[g], maxima);
    first = _mm256_blendv_epi8(first, group, _mm256_cmpgt_epi32(maxima, bits));
    bits = max_of(bits, maxima);
    group = _mm256_add_epi32(group, all_lanes(1));
  }
  largest.bits = bits;
  largest.group = first;
}

void write_slot(uint8_t* slot, int64_t column, const float* value) {
  const auto narrow = static_cast<uint16_t>(column);
  std::memcpy(slot, &narrow, sizeof narrow);
  std::memcpy(slot + sizeof narrow, value, sizeof *value);
}

uint16_t slot_column(const uint8_t* slot) {
  uint16_t column;
  std::memcpy(&column, slot, sizeof column);
  return column;
}

// How far each value lies above the bits asked for, modulo 2^32: 0 if equal, and what lies below wraps around, the
// nearest to the greatest number. Comparing twice would take two instructions more a vector.
struct Distances {
  __m256i largest;  // the largest of them is the largest of eight lanes
  uint64_t equal;   // a bit for each value that is equal
};

// One of several equal values: the first that has not been taken. `again`: there is another one.
template <typename Simd>
int64_t first_not_taken(uint64_t equal, const uint8_t* slots, int64_t slot, int64_t group, bool& again) {
  uint64_t ordered = 0;
  for (; equal != 0; equal &= equal - 1) {
    ordered |= uint64_t{1} << Simd::position(__builtin_ctzll(equal));
  }
  for (int64_t s = 0; s < slot; ++s) {
    const int64_t column = slot_column(slots + s * kOutlierBytes);
    if (column / kGroupSize == group) ordered &= ~(uint64_t{1} << column % kGroupSize);
  }
  again = (ordered & (ordered - 1)) != 0;
  return __builtin_ctzll(ordered);
}

template <typename Simd, bool kEven>
void take_largest(const Batch<Simd, kEven> batch, int64_t slot, Largest& largest) {
  alignas(32) uint32_t bits[kLanes], groups[kLanes];
  __m256i nearest[kLanes];
  store(bits, largest.bits);
  store(groups, largest.group);
  const int64_t count = batch.count();
  uint32_t any_again = 0;  // a bit for each token whose group has the same magnitude once more
  uint8_t* target = batch.records + batch.slots_offset + slot * kOutlierBytes;
  for (int64_t t = 0; t < count; ++t, target += batch.bytes) {
    const int64_t group = groups[t];
    const float* values = batch.group(t, group);
    const Distances found = Simd::distances(values, bits[t]);
    nearest[t] = found.largest;
    int64_t index = Simd::position(__builtin_ctzll(found.equal));
    if (__builtin_expect((found.equal & (found.equal - 1)) != 0 || bits[t] == 0, 0)) {
      if (bits[t] == 0) {  // only zeros are left: a slot that holds one buys nothing
        const float nothing = 0.0f;
        write_slot(target, kUnusedColumn, &nothing);
        continue;
      }
      bool again;
      index = first_not_taken<Simd>(found.equal, batch.record(t) + batch.slots_offset, slot, group, again);
      any_again |= static_cast<uint32_t>(again) << t;
    }
    write_slot(target, group * kGroupSize + index, values + index);
  }
  for (int64_t t = count; t < kLanes; ++t) nearest[t] = _mm256_setzero_si256();
  const __m256i distance = max_of_each([&](int t) { return nearest[t]; });
  // Positive: nothing lies below.
  largest.below = _mm256_and_si256(_mm256_add_epi32(distance, largest.bits), _mm256_srai_epi32(distance, 31));
  if (any_again != 0) {
    const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i same = _mm256_cmpeq_epi32(_mm256_and_si256(all_lanes(any_again), lane_bits), lane_bits);
    largest.below = _mm256_blendv_epi8(largest.below, largest.bits, same);
  }
}

// group_scale() of every group; whether one has only codes of 0.
bool find_scales(int64_t groups, Work& work, const Largest& last) {
  const __m256i largest_half = _mm256_set1_epi32(kInfinityHalf - 1);
  __m256i any_without = _mm256_setzero_si256(), group = _mm256_setzero_si256();
  for (int64_t g = 0; g < groups; ++g) {
    const __m256 largest = _mm256_castsi256_ps(maxima_left(work.max_bits[g], group, last));
    group = _mm256_add_epi32(group, all_lanes(1));
    const __m128i rounded_up = _mm256_cvtps_ph(_mm256_div_ps(largest, _mm256_set1_ps(127.0f)), _MM_FROUND_TO_POS_INF);
    // An infinite or NaN maximum gives an infinite or NaN half, too.
    const __m256i wide = _mm256_cvtepu16_epi32(rounded_up);
    const __m256i bad = _mm256_cmpgt_epi32(wide, largest_half);
    const __m256i half = _mm256_blendv_epi8(wide, _mm256_set1_epi32(kNanHalf), bad);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
    _mm_store_si128(reinterpret_cast<__m128i*>(work.halves[g]), _mm256_castsi256_si128(packed));
    const __m256i without = _mm256_or_si256(bad, _mm256_cmpeq_epi32(wide, _mm256_setzero_si256()));
    const __m256 reciprocal = _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_cvtph_ps(rounded_up));
    _mm256_store_ps(work.inverse[g], _mm256_andnot_ps(_mm256_castsi256_ps(without), reciprocal));
    any_without = _mm256_or_si256(any_without, without);
  }
  return _mm256_testz_si256(any_without, any_without) == 0;
}

template <typename Simd, bool kEven>
void write_codes(const Batch<Simd, kEven> batch, int64_t token) {
  const float* inverse = &batch.work.inverse[0][token];
  const uint16_t* halves = &batch.work.halves[0][token];
  uint8_t* record = batch.record(token);
  uint8_t* scales = record + batch.groups * kGroupSize;
  for (int64_t g = 0; g < batch.groups; ++g) {
    if (kEven && batch.fetch_next) {
      const float* next = batch.group(token + kLanes, g);
      for (int64_t i = 0; i < kGroupSize; i += kLineFloats) __builtin_prefetch(next + i);
    }
    Simd::quantize(batch.group(token, g), inverse + g * kLanes, record + g * kGroupSize);
    std::memcpy(scales + 2 * g, halves + g * kLanes, sizeof *halves);
  }
}

// infinity * 0 does not give 0.
template <typename Simd, bool kEven>
void clear_groups_without_codes(const Batch<Simd, kEven> batch, int64_t token) {
  for (int64_t g = 0; g < batch.groups; ++g) {
    if (batch.work.inverse[g][token] == 0.0f) std::memset(batch.record(token) + g * kGroupSize, 0, kGroupSize);
  }
}

template <typename Simd, bool kEven>
void clear_outliers(const Batch<Simd, kEven> batch, int64_t token) {
  uint8_t* record = batch.record(token);
  for (const uint8_t* slot = record + batch.slots_offset; slot < record + batch.bytes; slot += kOutlierBytes) {
    const uint16_t column = slot_column(slot);
    if (column != kUnusedColumn) record[column] = 0;
  }
}

template <typename Simd, bool kEven>
void encode_batch(const Batch<Simd, kEven> batch) {
  find_maxima(batch);
  Largest largest = {_mm256_setzero_si256(), all_lanes(~0u), _mm256_setzero_si256()};  // of no group yet
  for (int64_t slot = 0; slot < batch.slots; ++slot) {
    find_largest(batch.groups, batch.work.max_bits, largest);
    take_largest(batch, slot, largest);
  }
  const bool some_without = find_scales(batch.groups, batch.work, largest);
  for (int64_t t = 0; t < batch.count(); ++t) {
    write_codes(batch, t);
    if (some_without) clear_groups_without_codes(batch, t);
    clear_outliers(batch, t);
  }
}

template <typename Simd>
void encode_int8_lanes(const float* rows, int64_t num_tokens, int64_t hidden_size, uint8_t* records) {
  Work work;
  const int64_t groups = num_groups(hidden_size), slots = num_outliers(hidden_size);
  const int64_t offset = outliers_offset(hidden_size), bytes = int8_record_bytes(hidden_size);
  for (int64_t t = 0; t < num_tokens; t += kLanes) {
    const float* row = rows + t * hidden_size;
    uint8_t* record = records + t * bytes;
    if (t + kLanes <= num_tokens && hidden_size % kGroupSize == 0) {
      const bool fetch_next = hidden_size <= kWidestFetched && t + 2 * kLanes <= num_tokens;
      encode_batch(Batch<Simd, true>{work, row, record, hidden_size, groups, slots, offset, bytes, kLanes, fetch_next});
    } else {
      const int64_t count = std::min(kLanes, num_tokens - t);
      encode_batch(Batch<Simd, false>{work, row, record, hidden_size, groups, slots, offset, bytes, count, false});
    }
  }
}

}  // namespace
}  // namespace chainfed
