// How a call treats its activations, as Python names it.
#pragma once
#include <string>

#include "bind/array.h"
#include "chainfed/kernels.h"

namespace chainfed::bind {

inline Activation parse_activation(const Arguments& args, const std::string& name) {
  if (name == "int8") return Activation::int8;
  if (name == "f32") return Activation::f32;
  args.fail("activation must be int8 or f32, got " + name);
}

}  // namespace chainfed::bind
