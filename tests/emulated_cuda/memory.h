// What the emulated device keeps: its memory, what made the host wait, devices, generators.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;

thread_local DeviceIndex current = 0;
DeviceIndex devices = 1;

std::mutex guard;
std::map<std::string, int64_t> waits;
int wait_mode = 0;  // 0: not counted, 1: counted, 2: an error
void (*told)(const char*) = nullptr;  // who is told of each instead of being warned

std::atomic<int64_t> allocated{0}, peak{0};

void waits_for_device(const std::string& what) {
  if (wait_mode == 0) return;
  TORCH_CHECK(wait_mode == 1, "called a synchronizing CUDA operation: ", what);
  {
    std::lock_guard<std::mutex> hold(guard);
    ++waits[what];
  }
  if (told != nullptr) return told(what.c_str());
  TORCH_WARN("called a synchronizing CUDA operation: ", what);
}

// ---- memory ----------------------------------------------------------------------------------------------------------

struct Block {
  c10::DataPtr host;
  int64_t size;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= block->size;
  delete block;
}

c10::DataPtr on_device(c10::DataPtr host, int64_t size, DeviceIndex index) {
  void* data = host.get();
  auto* block = new Block{std::move(host), size};
  const int64_t now = allocated += size;
  int64_t before = peak.load();
  while (now > before && !peak.compare_exchange_weak(before, now)) {
  }
  return {data, block, &release, Device(DeviceType::CUDA, index)};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    return on_device(c10::GetCPUAllocator()->allocate(size), static_cast<int64_t>(size), current);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};

Memory memory;

// ---- devices, streams, events ----------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device to) const override {
    const Device from(DeviceType::CUDA, current);
    if (to.index() >= 0) current = to.index();
    return from;
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device to) const override { if (to.index() >= 0) current = to.index(); }
  void uncheckedSetDevice(Device to) const noexcept override { if (to.index() >= 0) current = to.index(); }
  c10::Stream getStream(Device device) const override { return stream(device); }
  c10::Stream getDefaultStream(Device device) const override { return stream(device); }
  c10::Stream getNewStream(Device device, int) const override { return stream(device); }
  c10::Stream exchangeStream(c10::Stream given) const override { return stream(given.device()); }
  DeviceIndex deviceCount() const noexcept override { return devices; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}

 private:
  static c10::Stream stream(Device device) {
    return c10::Stream(c10::Stream::DEFAULT, Device(DeviceType::CUDA, device.index() < 0 ? current : device.index()));
  }
};

// ---- generators ------------------------------------------------------------------------------------------------------

struct Generator final : c10::GeneratorImpl {
  explicit Generator(DeviceIndex index)
      : c10::GeneratorImpl(Device(DeviceType::CUDA, index), c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        host(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  at::Generator host;

 private:
  Generator* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->host = host.clone();
    return copy;
  }
};

at::Generator& default_generator(DeviceIndex index) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (DeviceIndex i = 0; i < 16; ++i) made.push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return all[index < 0 ? current : index];
}

at::Generator host_generator(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->host;
}

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex deviceCount() const override { return devices; }
  int getNumGPUs() const override { return devices; }
  void setCurrentDevice(DeviceIndex to) const override { current = to; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex to) const override { return std::exchange(current, to); }
  DeviceIndex maybeExchangeDevice(DeviceIndex to) const override { return std::exchange(current, to); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  at::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  void deviceSynchronize(DeviceIndex) const override {}
};

}  // namespace
