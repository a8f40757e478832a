// CHAINFED_FAKE_CUDA in the environment, "name=number;name=number", read at every call so that a test changes it.
#pragma once
#include <cstdlib>
#include <cstring>

namespace fake_cuda {

inline int setting(const char* name, int otherwise) {
  const size_t length = std::strlen(name);
  for (const char* at = std::getenv("CHAINFED_FAKE_CUDA"); at != nullptr; at = std::strchr(at, ';')) {
    if (*at == ';') ++at;
    if (std::strncmp(at, name, length) == 0 && at[length] == '=') return std::atoi(at + length + 1);
  }
  return otherwise;
}

}  // namespace fake_cuda
