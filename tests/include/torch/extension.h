// Of torch's header what DeepSpeed's CPU Adam needs; all of it takes 20 s of a core in each of its two files.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

namespace torch {
using namespace at;
constexpr auto kFloat32 = at::kFloat;
}  // namespace torch
