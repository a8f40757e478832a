// One exception family for the whole core. The binding translates each to the Python class of the same
// name; nothing in the core aborts, exits or prints.
#pragma once
#include <stdexcept>
#include <string>

namespace chainfed {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// The caller's fault: what was expected, what came.
struct InvalidArgument : Error {
  using Error::Error;
};
// Bytes on disk that do not keep the format's promises.
struct CorruptFile : Error {
  using Error::Error;
};
// The operating system refused a read or write; the message holds the path and strerror.
struct IoError : Error {
  using Error::Error;
};
// A SIMD level that this CPU or this build does not have.
struct UnsupportedHardware : Error {
  using Error::Error;
};

// A device or the system cannot give as much memory (pinned memory, a workspace).
struct OutOfMemory : Error {
  using Error::Error;
};

}  // namespace chainfed
