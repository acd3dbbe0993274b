// Every operation on tensors of the device: the CPU's, on an alias of the same bytes.
#pragma once

#include <torch/library.h>

#include "memory.h"

namespace {

// ---- the same bytes, for the CPU and for the device ------------------------------------------------------------------

at::Tensor tensor_on(c10::Storage storage, const at::Tensor& like, c10::DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) tensor._set_conj(true);
  if (like.is_neg()) tensor._set_neg(true);
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) tensor.unsafeGetTensorImpl()->set_wrapped_number(true);
  return tensor;
}

// A storage's bytes for somebody else, who keeps the storage.
c10::DataPtr kept(const c10::Storage& storage, Device device) {
  auto* keep = new c10::Storage(storage);
  return {keep->mutable_data(), keep, [](void* it) { delete static_cast<c10::Storage*>(it); }, device};
}

// One call's tensors of the device, and their aliases on the host.
struct Aliases {
  struct Pair {
    at::Tensor device, host;
    void* data;
  };
  std::vector<Pair> pairs;
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages;
  DeviceIndex index = -1;

  at::Tensor host(const at::Tensor& tensor) {
    for (const auto& pair : pairs) {
      if (pair.device.is_same(tensor)) return pair.host;
    }
    auto* key = tensor.storage().unsafeGetStorageImpl();
    auto found = storages.find(key);
    if (found == storages.end()) {
      const auto size = tensor.storage().nbytes();
      c10::Storage alias(c10::Storage::use_byte_size_t{}, size, kept(tensor.storage(), Device(DeviceType::CPU)),
                         c10::GetCPUAllocator(), /*resizable=*/true);
      found = storages.emplace(key, alias).first;
    }
    auto alias = tensor_on(found->second, tensor, c10::DispatchKey::CPU);
    pairs.push_back({tensor, alias, alias.storage().mutable_data()});
    return alias;
  }

  // What an operation did to the shape or the room of its outputs.
  void write_back() {
    for (auto& pair : pairs) {
      auto* to = pair.device.unsafeGetTensorImpl();
      if (pair.host.storage().data() != pair.data) {
        const auto& host = pair.host.storage();
        const auto size = static_cast<int64_t>(host.nbytes());
        pair.device.storage().set_data_ptr(on_device(kept(host, Device(DeviceType::CPU)), size, pair.device.device().index()));
        pair.device.storage().unsafeGetStorageImpl()->set_nbytes(size);
      }
      if (pair.host.sizes() != pair.device.sizes() || pair.host.strides() != pair.device.strides() ||
          pair.host.storage_offset() != pair.device.storage_offset()) {
        to->set_sizes_and_strides(pair.host.sizes(), pair.host.strides(), pair.host.storage_offset());
      }
    }
  }

  at::Tensor device(const at::Tensor& result) {
    if (!result.defined() || !result.device().is_cpu()) return result;
    for (const auto& pair : pairs) {
      if (pair.host.is_same(result)) return pair.device;
    }
    for (const auto& pair : pairs) {
      if (pair.host.storage().data() == result.storage().data() && result.storage().data() != nullptr) {
        return tensor_on(pair.device.storage(), result, c10::DispatchKey::CUDA);
      }
    }
    const auto size = static_cast<int64_t>(result.storage().nbytes());
    auto owner = on_device(kept(result.storage(), Device(DeviceType::CPU)), size, index < 0 ? current : index);
    c10::Storage storage(c10::Storage::use_byte_size_t{}, size, std::move(owner), &memory, /*resizable=*/true);
    return tensor_on(storage, result, c10::DispatchKey::CUDA);
  }
};

// ---- every operation -------------------------------------------------------------------------------------------------

const std::set<std::string> waiting{
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::equal", "aten::bincount", "aten::histc",
    "aten::repeat_interleave", "aten::is_nonzero", "aten::_assert_async_wait", "aten::linalg_eigh", "aten::_linalg_eigh",
};

// Operations that take indices, sizes or points on the host, as CUDA's own do.
const std::set<std::string> mixed{"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
                                  "aten::_unsafe_index", "aten::_unsafe_index_put", "aten::tensor_split"};

struct Check {
  const c10::OperatorHandle& op;
  Device device{DeviceType::CPU};
  bool seen = false, host_seen = false;

  void look(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.device().is_cuda()) {
      TORCH_CHECK(!seen || device == tensor.device(), "Expected all tensors to be on the same device, but found at least two devices, ",
                  device, " and ", tensor.device(), "! (", op.schema().name(), ")");
      device = tensor.device();
      seen = true;
    } else if (tensor.dim() > 0) {
      host_seen = true;
    }
  }
  void end() const {
    TORCH_CHECK(!seen || !host_seen || mixed.count(op.schema().name()),
                "Expected all tensors to be on the same device, but found at least two devices, ", device, " and cpu! (",
                op.schema().name(), ")");
  }
};

// An argument or a result with each tensor in it put through a function; lists of lists too, as collectives have them.
template <typename Function>
IValue each_tensor(const IValue& value, const Function& function) {
  if (value.isTensor()) return value.toTensor().defined() ? IValue(function(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const auto& tensor : value.toTensorVector()) list.push_back(function(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector())
      list.push_back(tensor && tensor->defined() ? std::optional<at::Tensor>(function(*tensor)) : tensor);
    return list;
  }
  if (value.isList() && !value.toListRef().empty() && value.toListRef()[0].isTensorList()) {
    c10::List<c10::List<at::Tensor>> lists;
    for (const auto& inner : value.toListRef()) lists.push_back(each_tensor(inner, function).toTensorList());
    return lists;
  }
  return value;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  Check check{op};
  for (const auto& value : arguments) {
    each_tensor(value, [&](const at::Tensor& tensor) { return check.look(tensor), tensor; });
  }
  check.end();
  if (waiting.count(schema.name())) waits_for_device(schema.name());

  Aliases aliases;
  aliases.index = check.seen ? check.device.index() : current;
  const auto first = stack->size() - arguments.size();
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    auto& value = (*stack)[first + i];
    if (value.isDevice() && value.toDevice().is_cuda()) {
      if (value.toDevice().has_index()) aliases.index = value.toDevice().index();
      value = Device(DeviceType::CPU);
    } else if (value.isGenerator() && value.toGenerator().defined()) {
      const auto type = value.toGenerator().device().type();
      TORCH_CHECK(type == DeviceType::CUDA, "Expected a 'cuda' device type for generator but found '", type, "'");
      value = host_generator(value.toGenerator());
    } else if (value.isNone() && schema.arguments()[i].type()->str() == "Generator?") {
      value = host_generator(default_generator(aliases.index));
    } else {
      value = each_tensor(value, [&](const at::Tensor& tensor) { return tensor.device().is_cuda() ? aliases.host(tensor) : tensor; });
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  aliases.write_back();
  const auto result = stack->size() - schema.returns().size();
  for (size_t i = result; i < stack->size(); ++i) {
    (*stack)[i] = each_tensor((*stack)[i], [&](const at::Tensor& tensor) { return aliases.device(tensor); });
  }
}

// ---- what makes tensors, or moves them -------------------------------------------------------------------------------

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard on(device.value_or(Device(DeviceType::CUDA, current)));
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  const c10::DeviceGuard on(device.value_or(Device(DeviceType::CUDA, current)));
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.device().type() != from.device().type() && !non_blocking && from.numel() > 0)
    waits_for_device(from.device().is_cuda() ? "copy to the host" : "copy from the host");
  Aliases aliases;
  auto host = [&](const at::Tensor& tensor) { return tensor.device().is_cuda() ? aliases.host(tensor) : tensor; };
  auto target = host(to);
  target.copy_(host(from));
  return to;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  auto target = to;
  return copy(target, from, non_blocking);
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  auto target = to;
  target.resize_(from.sizes());
  return copy(target, from, false);
}

at::Tensor as_strided(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(),
                                                         self.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(self.storage_offset()));
  return result;
}

void resize_bytes(const c10::Storage& storage, size_t bytes) {
  const c10::DeviceGuard on(storage.device());
  auto fresh = memory.allocate(bytes);
  if (const auto both = std::min(bytes, storage.nbytes())) std::memcpy(fresh.get(), storage.data(), both);
  auto* impl = storage.unsafeGetStorageImpl();
  impl->set_data_ptr_noswap(std::move(fresh));
  impl->set_nbytes(bytes);
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const auto bytes = (impl->storage_offset() + impl->numel()) * self.element_size();
  if (bytes > self.storage().nbytes()) resize_bytes(self.storage(), bytes);
  if (format) impl->empty_tensor_restride(*format);
  return self;
}

void resize_storage(const at::Tensor& self, int64_t bytes) { resize_bytes(self.storage(), bytes); }

at::Tensor& set_source(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(size, stride.empty() && !size.empty() ? at::IntArrayRef(c10::contiguous_strides(size)) : stride, offset);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  const int64_t count = source.nbytes() / self.element_size();
  return set_source(self, std::move(source), 0, {count}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_source(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  c10::Storage storage(c10::Storage::use_byte_size_t{}, 0, memory.allocate(0), &memory, true);
  return set_source(self, storage, 0, {0}, {1});
}

int64_t choose_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
                         std::optional<double>, bool) {
  return 0;  // plain products
}

void record_stream(at::Tensor&, c10::Stream) {}

// CUDA's own is one kernel for bf16 and asks for rows of whole 16 bytes; in any other type PyTorch loops on the host.
at::Tensor grouped_mm(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& ends,
                      const std::optional<at::Tensor>& bias, std::optional<at::ScalarType> type) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::_grouped_mm", "").typed<decltype(grouped_mm)>();
  const bool kernel = a.scalar_type() == at::kBFloat16 && b.scalar_type() == at::kBFloat16;
  if (!kernel) return op.redispatch(c10::DispatchKeySet(c10::DispatchKey::CompositeExplicitAutograd), a, b, ends, bias, type);
  for (const auto& matrix : {a, b}) {
    const auto stride = std::max(matrix.stride(-1), matrix.stride(-2));
    TORCH_CHECK(stride * matrix.element_size() % 16 == 0, "strides should be multiple of 16 bytes");
  }
  Check check{op};
  for (const auto* tensor : {&a, &b}) check.look(*tensor);
  if (ends) check.look(*ends);
  check.end();
  Aliases aliases;
  aliases.index = a.device().index();
  const auto host_ends = ends ? std::optional<at::Tensor>(aliases.host(*ends)) : std::nullopt;
  const auto host_bias = bias ? std::optional<at::Tensor>(aliases.host(*bias)) : std::nullopt;
  return aliases.device(op.call(aliases.host(a), aliases.host(b), host_ends, host_bias, type));
}

// CUDA's counts whole numbers too.
at::Tensor histc(const at::Tensor& values, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  waits_for_device("aten::histc");
  Aliases aliases;
  aliases.index = values.device().index();
  const auto host = aliases.host(values);
  return aliases.device(at::histc(at::isIntegralType(host.scalar_type()) ? host.to(at::kFloat) : host, bins, least, most)
                            .to(host.scalar_type()));
}

// The host's view of a tensor of the device, the same bytes: what a library of the device would compute on.
at::Tensor host_view(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.device().is_cuda(), "expected a tensor of the device, got one on ", tensor.device());
  c10::Storage storage(c10::Storage::use_byte_size_t{}, tensor.storage().nbytes(), kept(tensor.storage(), Device(DeviceType::CPU)),
                       nullptr, /*resizable=*/false);
  return tensor_on(storage, tensor, c10::DispatchKey::CPU);
}

// A convolution of each channel by itself, which on a CPU has no operation of its own.
at::Tensor depthwise(const at::Tensor& x, const at::Tensor& weight, c10::SymIntArrayRef, const std::optional<at::Tensor>& bias,
                     c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation) {
  Aliases aliases;
  aliases.index = x.device().index();
  const auto host_bias = bias && bias->defined() ? std::optional<at::Tensor>(aliases.host(*bias)) : std::nullopt;
  return aliases.device(at::conv2d_symint(aliases.host(x), aliases.host(weight), host_bias, stride, padding, dilation, x.sym_size(1)));
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("copy_", TORCH_FN(copy));
  library.impl("_copy_from", TORCH_FN(copy_from));
  library.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  library.impl("as_strided", TORCH_FN(as_strided));
  library.impl("resize_", TORCH_FN(resize));
  library.impl("set_.source_Storage", TORCH_FN(set_storage));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_source));
  library.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  library.impl("set_", TORCH_FN(set_nothing));
  library.impl("_fused_sdp_choice", TORCH_FN(choose_attention));
  library.impl("record_stream", TORCH_FN(record_stream));
  library.impl("_grouped_mm", TORCH_FN(grouped_mm));
  library.impl("histc", TORCH_FN(histc));
  library.impl("_conv_depthwise2d", TORCH_FN(depthwise));
}

TORCH_LIBRARY(emulated_cuda, library) { 
  library.def("host_view(Tensor tensor) -> Tensor");
  library.def("resize_storage(Tensor(a!) tensor, int bytes) -> ()");
}
TORCH_LIBRARY_IMPL(emulated_cuda, CUDA, library) { 
  library.impl("host_view", TORCH_FN(host_view));
  library.impl("resize_storage", TORCH_FN(resize_storage));
}

}  // namespace
