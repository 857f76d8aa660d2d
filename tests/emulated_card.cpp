// What torch must believe of the emulated card: a device cuda:0 whose memory is the processor's.
//
// A tensor on the card is a tensor on the CPU whose device and dispatch keys say CUDA. Each operation on it arrives at
// `compute`, which looks whether devices are mixed, says "CPU" of all of them, lets the CPU compute, and says "CUDA"
// again. Autograd, autocast, views and modules are above that, and torch's own.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <mutex>
#include <set>
#include <string>
#include <vector>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;
using c10::Stream;

static const Device card(DeviceType::CUDA, 0), cpu(DeviceType::CPU);

// ---- what emulated_card.py hears

using Listener = void (*)(const char* kind, const char* what, int64_t bytes);
static Listener listener = nullptr;
static int in_float32 = 0;  // how many functions that must compute in float32 are running

extern "C" void tell(Listener to) { listener = to; }
extern "C" void expect_float32(int change) { in_float32 += change; }

static void note(const char* kind, const std::string& what, int64_t bytes = 0) {
  if (listener) listener(kind, what.c_str(), bytes);
}

// ---- where a tensor says it is

struct Open : c10::TensorImpl {  // may name what is protected
  static auto device() { return &Open::device_opt_; }
};

static void say(const c10::Storage& storage, Device device) {
  storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().unsafe_set_device(device);
}

static void say(const Tensor& tensor, Device device) {
  auto* inner = tensor.unsafeGetTensorImpl();
  inner->_change_backend_component_keys(device);
  inner->*Open::device() = device;
  if (tensor.has_storage()) say(tensor.storage(), device);
}

template <class Act>
static void each_tensor(const IValue& value, Act&& act) {
  if (value.isTensor() && value.toTensor().defined()) act(value.toTensor());
  if (value.isList())
    for (const IValue& item : value.toListRef()) each_tensor(item, act);
}

// ---- operations

static const std::set<std::string> WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::equal", "aten::bincount"};
static const std::set<std::string> INDEXING = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
static const std::set<std::string> ABOUT_BOTH = {
    "aten::set_", "aten::is_same_size", "aten::_has_compatible_shallow_copy_type"};

static bool is_half(const Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

static bool makes_views(const c10::FunctionSchema& schema) {
  return !schema.returns().empty() && schema.returns()[0].alias_info() && !schema.returns()[0].alias_info()->isWrite();
}

static void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.operator_name().name;
  const bool indexing = INDEXING.count(name);
  const size_t first = stack->size() - op.schema().arguments().size();
  std::vector<Tensor> ours, theirs;
  std::vector<c10::Storage> storages;
  bool made_on_card = false;
  for (size_t i = first; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    const bool is_index = indexing && i == first + 1;
    if (value.isDevice() && value.toDevice().is_cuda()) {
      value = cpu;
      made_on_card = true;
    } else if (value.isStorage() && value.toStorage().device().is_cuda()) {
      storages.push_back(value.toStorage());
    }
    each_tensor(value, [&](const Tensor& tensor) {
      if (tensor.is_cuda()) {
        ours.push_back(tensor);
        const bool is_mask = tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
        if (is_index && is_mask && name != "aten::index")  // that one has asked for nonzero before
          note("wait", name + " by a mask");
      } else if (is_index) {
        note("wait", name + " by an index on the CPU");
      } else if (tensor.dim() > 0 && tensor.is_cpu()) {
        theirs.push_back(tensor);
      }
    });
  }
  TORCH_CHECK(
      ours.empty() || theirs.empty() || ABOUT_BOTH.count(name),
      "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", name, ", ",
      theirs.empty() ? at::IntArrayRef() : theirs[0].sizes(), " is on the CPU)");
  if (!ours.empty() && WAITING.count(name)) note("wait", name);
  if (in_float32 && !makes_views(op.schema()) && std::any_of(ours.begin(), ours.end(), is_half)) note("half", name);

  auto say_all = [&](Device device) {
    for (const auto& tensor : ours) say(tensor, device);
    for (const auto& storage : storages) say(storage, device);
  };
  say_all(cpu);
  try {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  } catch (...) {
    say_all(card);
    throw;
  }
  say_all(card);
  if (made_on_card || !ours.empty())
    for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i)
      each_tensor((*stack)[i], [](const Tensor& tensor) { say(tensor, card); });
}

static Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  const bool up = !from.is_cuda(), down = !to.is_cuda();
  if (up || down) {
    const std::string way = up ? "to the card" : "from the card";
    note("copy", way, to.nbytes());
    if (!non_blocking || !(up ? from : to).is_pinned()) note("wait", "copy " + way, to.nbytes());
  }
  if (!up) say(from, cpu);
  if (!down) say(to, cpu);
  to.copy_(from);
  if (!up) say(from, card);
  if (!down) say(to, card);
  return to;
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("copy_", TORCH_FN(copy_));
  // made of smaller operations, of which only CUDA's own would be chosen on a card
  for (const char* name : {"convolution", "convolution_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&compute>());
}

// ---- what torch asks of a card

struct Memory : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto data = c10::GetCPUAllocator()->allocate(bytes);
    data.unsafe_set_device(card);
    return data;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

static std::mutex lock;
static std::set<const void*> pinned;

struct PinnedMemory : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    std::lock_guard<std::mutex> locked(lock);
    pinned.insert(data);
    return {data, data, &free, cpu};
  }
  static void free(void* data) {
    std::lock_guard<std::mutex> locked(lock);
    pinned.erase(data);
    c10::free_cpu(data);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

struct Guard : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return card; }
  Device getDevice() const override { return card; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, card); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, card); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, card); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const { return true; }  // not yet asked by torch 2.6, and so no override
  bool isAvailable() const { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return card; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedMemory memory;
    return &memory;
  }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> locked(lock);
    return pinned.count(data) > 0;
  }
};

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
}

extern "C" void insert() {
  static Guard guard;
  static Memory memory;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
  c10::SetAllocator(DeviceType::CUDA, &memory);
}
