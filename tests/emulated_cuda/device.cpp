// A CUDA device that is not there: its memory is the host's, and every operation is the CPU's.
//
// Tensors are of device "cuda:N" for PyTorch's dispatcher, autograd, autocast and generators, so that an operation that
// mixes devices is refused as on a real device, and one that would make the host wait is counted.
#include "collectives.h"
#include "memory.h"
#include "operations.h"

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}

static const bool placed = [] {
  c10::SetAllocator(DeviceType::CUDA, &memory);
  return true;
}();

extern "C" {
void emulated_devices(int count) { devices = static_cast<DeviceIndex>(count); }
void emulated_set_device(int index) { current = static_cast<DeviceIndex>(index); }
int emulated_current_device() { return current; }
void emulated_wait_mode(int mode) { wait_mode = mode; }
void emulated_tell_of_waits(void (*whom)(const char*)) { told = whom; }
int emulated_wait_mode_now() { return wait_mode; }
int64_t emulated_allocated() { return allocated; }
int64_t emulated_peak() { return peak; }
void emulated_reset_peak() { peak = allocated.load(); }
int64_t emulated_waits(char* text, int64_t room) {
  std::lock_guard<std::mutex> hold(guard);
  std::string all;
  int64_t total = 0;
  for (const auto& [what, count] : waits) {
    all += what + "\t" + std::to_string(count) + "\n";
    total += count;
  }
  snprintf(text, room, "%s", all.c_str());
  return total;
}
void emulated_forget_waits() { waits.clear(); }
}
