// The one place where C++ exceptions become the classes of chainfed_engine.errors. The Python module is imported
// when an error is first raised, so that `_native` can be loaded without the package.
#include <pybind11/pybind11.h>

#include <exception>

#include "bind/functions.h"
#include "chainfed/error.h"

namespace chainfed::bind {
namespace {

namespace py = pybind11;

void raise(const char* class_name, const char* message) {
  const py::object error_class = py::module_::import("chainfed_engine.errors").attr(class_name);
  PyErr_SetString(error_class.ptr(), message);
}

void translate(std::exception_ptr pointer) {
  if (!pointer) return;
  try {
    std::rethrow_exception(pointer);
  } catch (const InvalidArgument& error) {
    raise("InvalidArgument", error.what());
  } catch (const CorruptFile& error) {
    raise("CorruptFile", error.what());
  } catch (const IoError& error) {
    raise("StorageError", error.what());
  } catch (const UnsupportedHardware& error) {
    raise("UnsupportedHardware", error.what());
  } catch (const OutOfMemory& error) {
    raise("MemoryBudgetExceeded", error.what());
  } catch (const Error& error) {
    raise("ChainfedError", error.what());
  }
}

}  // namespace

void register_errors() { py::register_local_exception_translator(translate); }

}  // namespace chainfed::bind
