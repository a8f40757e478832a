#include "cuda/table.h"

#include <cstdio>

#include "cuda/boundary.h"
#include "cuda/head.h"
#include "cuda/linear.h"
#include "cuda/runtime.h"

namespace chainfed::cuda {
namespace {

Status tell(Message* message, const char* text, Status status) {
  std::snprintf(message->text, sizeof message->text, "%s", text);
  return status;
}

template <typename Body>
Status guarded(Message* message, Body body) {
  try {
    body();
    return Status::ok;
  } catch (const OutOfMemory& error) {
    return tell(message, error.what(), Status::out_of_memory);
  } catch (const InvalidArgument& error) {
    return tell(message, error.what(), Status::invalid_argument);
  } catch (const UnsupportedHardware& error) {
    return tell(message, error.what(), Status::unsupported_hardware);
  } catch (const std::exception& error) {
    return tell(message, error.what(), Status::failed);
  }
}

// body(device) with that device current.
template <typename Body>
Status on_device(int32_t index, Message* message, Body body) {
  return guarded(message, [&] {
    Device& chosen = device(index);
    const CurrentDevice current(index);
    body(chosen);
  });
}

Status count_devices(int32_t* count, Message* message) {
  return guarded(message, [&] { *count = num_devices(); });
}

Status describe(int32_t index, DeviceInfo* info, Message* message) {
  return guarded(message, [&] { *info = device_info(index); });
}

Status set_library_from_tokens(int32_t index, int64_t tokens, Message* message) {
  return guarded(message, [&] {
    if (tokens < 1) throw InvalidArgument("library_from_tokens must be at least 1");
    device(index).library_from_tokens = tokens;
  });
}

Status run_linear(int32_t index, Stream stream, const LinearCall* call, void* workspace, Message* message) {
  return on_device(index, message, [&](Device& chosen) { linear(chosen, stream, *call, workspace); });
}

Status size_linear(int32_t index, BlockFormat format, Direction direction, int64_t num_tokens, int64_t num_rows,
                   int64_t num_cols, int64_t* bytes, Message* message) {
  return guarded(message, [&] {
    *bytes = linear_workspace_bytes(device(index), format, direction, num_tokens, num_rows, num_cols);
  });
}

Status run_update(int32_t index, Stream stream, const CrossEntropyCall* call, void* workspace, Message* message) {
  return on_device(index, message, [&](Device& chosen) { cross_entropy_update(chosen, stream, *call, workspace); });
}

Status run_finish(int32_t index, Stream stream, const FinishCall* call, Message* message) {
  return on_device(index, message, [&](Device&) { cross_entropy_finish(stream, *call); });
}

Status size_update(int32_t index, BlockFormat format, int64_t num_tokens, int64_t num_rows, int64_t hidden_size,
                   int64_t* bytes, Message* message) {
  return guarded(message, [&] {
    *bytes = cross_entropy_workspace_bytes(device(index), format, num_tokens, num_rows, hidden_size);
  });
}

Status run_encode(int32_t index, Stream stream, const EncodeCall* call, Message* message) {
  return on_device(index, message, [&](Device&) { boundary_encode(stream, *call); });
}

Status run_decode(int32_t index, Stream stream, const DecodeCall* call, Message* message) {
  return on_device(index, message, [&](Device&) { boundary_decode(stream, *call); });
}

Status run_copy(int32_t index, Stream stream, void* to, const void* from, int64_t bytes, Message* message) {
  return on_device(index, message, [&](Device&) { copy_to_device(stream, to, from, bytes); });
}

Status run_pin(int32_t index, void* host, int64_t bytes, Message* message) {
  return on_device(index, message, [&](Device&) { pin(host, bytes); });
}

Status run_unpin(int32_t index, void* host, Message* message) {
  return on_device(index, message, [&](Device&) { unpin(host); });
}

Status find_pointer(int32_t index, const void* host, const void** pointer, Message* message) {
  return on_device(index, message, [&](Device&) { *pointer = device_pointer(host); });
}

}  // namespace
}  // namespace chainfed::cuda

extern "C" __attribute__((visibility("default"))) const chainfed::cuda::Table* chainfed_cuda_table() {
  using namespace chainfed::cuda;
  static const Table table{kTableVersion, sizeof(Table), built_architectures(),
                           count_devices, describe,      set_library_from_tokens,
                           run_linear,    size_linear,   run_update,
                           run_finish,    size_update,   run_encode,
                           run_decode,    run_copy,      run_pin,
                           run_unpin,     find_pointer};
  return &table;
}
