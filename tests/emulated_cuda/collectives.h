// NCCL, which is Gloo on the host's view of the tensors (see nccl.py).
#pragma once

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

#include "operations.h"

namespace {

// DDP asks how long its parts took.
struct Timer final : c10d::Timer {
  explicit Timer(Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    const auto from = getTimestamp(start), to = getTimestamp(end);
    return from && to ? std::optional<int64_t>(*to - *from) : std::nullopt;
  }
};

bool is(const IValue& value, const char* name) { return value.isCustomClass() && value.type()->str().ends_with(name); }

// What a group made for CUDA alone says of a tensor of the host. (Gloo serves its tensors of the device; see nccl.py.)
void refuse(const c10::OperatorHandle& op, const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  TORCH_CHECK(group->getBackendType() != c10d::ProcessGroup::BackendType::NCCL ||
                  group->getBackend(DeviceType::CPU) != group->getBackend(DeviceType::CUDA),
              "No backend type associated with device type cpu (", op.schema().name(), ")");
}

void refuse_host(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (is(value, "ProcessGroup")) refuse(op, value.toCustomClass<c10d::ProcessGroup>());
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

// The same of a functional collective, which names its group last.
void refuse_host_by_name(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  refuse(op, c10d::resolve_process_group(stack->back().toStringRef()));
  op.redispatchBoxed(c10::DispatchKeySet(), stack);
}

// Gloo knows no mean, and writes its outputs again whenever somebody waits: what is summed is divided before.
void collective(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  c10d::ReduceOp* mean = nullptr;
  int ranks = 1;
  for (const auto& value : arguments) {
    if (is(value, "ProcessGroup")) ranks = value.toCustomClass<c10d::ProcessGroup>()->getSize();
    if (is(value, "ReduceOp") && value.toCustomClass<c10d::ReduceOp>()->op_ == c10d::ReduceOp::AVG)
      mean = value.toCustomClass<c10d::ReduceOp>().get();
  }
  if (mean != nullptr) {
    const auto first = stack->size() - arguments.size();
    const bool in_place = op.schema().name().find("reduce_scatter") == std::string::npos;
    auto& summed = (*stack)[first + (in_place ? 0 : 1)];
    summed = each_tensor(summed, [&](at::Tensor tensor) { return in_place ? tensor.div_(ranks) : tensor.div(ranks); });
    for (auto i = first; i < stack->size(); ++i) {
      if (is((*stack)[i], "ReduceOp")) (*stack)[i] = IValue(c10::make_intrusive<c10d::ReduceOp>(c10d::ReduceOp::SUM));
    }
  }
  fallback(op, stack);
}

constexpr const char* collectives[] = {
    "_allgather_base_", "_reduce_scatter_base_", "allgather_", "allgather_coalesced_", "allgather_into_tensor_coalesced_",
    "allreduce_", "allreduce_coalesced_", "alltoall_", "alltoall_base_", "barrier", "broadcast_", "gather_", "recv_",
    "recv_any_source_", "reduce_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_", "scatter_", "send",
};

TORCH_LIBRARY_IMPL(c10d, CUDA, library) {
  for (const auto* name : collectives) library.impl(name, torch::CppFunction::makeFromBoxedFunction<&collective>());
}

TORCH_LIBRARY_IMPL(c10d, AutogradCPU, library) {
  for (const auto* name : collectives) {
    if (std::string(name) != "barrier") library.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_host>());
  }
}

TORCH_LIBRARY_IMPL(_c10d_functional, CPU, library) {
  for (const auto* name : {"all_reduce", "all_reduce_", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single",
                           "broadcast", "broadcast_"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_host_by_name>());
  }
}

}  // namespace

namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::DeviceType::CUDA, ::Timer);
}
