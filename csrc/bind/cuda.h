// The way from a checked call to the CUDA library (cuda/table.h). The library lies beside `_native` and is opened by
// the first call that needs it; a build without it, or a machine without a driver, is an UnsupportedHardware error
// there and then, never at import.
#pragma once
#include <optional>
#include <string>
#include <utility>

#include "bind/array.h"
#include "cuda/table.h"

namespace chainfed::bind {

const cuda::Table& cuda_table();
// Turns a status that is not ok into the chainfed error, "function: message".
void check_cuda(const char* function, cuda::Status status, const cuda::Message& message);

// call_cuda("name", [&](const Table& table, Message* message) { return table.linear(...); })
template <typename Body>
void call_cuda(const char* function, Body body) {
  cuda::Message message{};
  const cuda::Table& table = cuda_table();
  check_cuda(function, body(table, &message), message);
}

// The number of a device given from Python, None: the CPU. Throws InvalidArgument for a negative one.
int place_of_device(const char* function, const std::optional<int>& device);

}  // namespace chainfed::bind
