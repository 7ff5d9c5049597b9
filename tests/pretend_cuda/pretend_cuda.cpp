// A GPU that is none. Tensors of cuda:0 have their bytes in the CPU's memory, and every operator on them is run by the CPU's
// kernel, unless a GPU would refuse it: then it is refused here, in PyTorch's words.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <string>
#include <unordered_set>

namespace {
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DispatchKey;
using c10::Storage;
using Names = std::unordered_set<std::string>;

const Device GPU(c10::DeviceType::CUDA, 0);
std::atomic<long> calls{0};
std::atomic<bool> capturing{false};

// Memory: what a storage on the GPU owns is a storage on the CPU with the same bytes.

Storage storage_of(c10::DataPtr bytes, size_t count, c10::Allocator* allocator) {
  return c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), count, std::move(bytes), allocator, true);
}

c10::DataPtr bytes_of(const Storage& on_cpu) {
  auto release = [](void* owned) { delete static_cast<Storage*>(owned); };
  return c10::DataPtr(on_cpu.mutable_data(), new Storage(on_cpu), release, GPU);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t count) override {
    auto* cpu = c10::GetCPUAllocator();
    return bytes_of(storage_of(cpu->allocate(count), count, cpu));
  }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
} memory;

Storage to_gpu(const Storage& on_cpu) { return storage_of(bytes_of(on_cpu), on_cpu.nbytes(), &memory); }
const Storage& to_cpu(const Storage& on_gpu) { return *static_cast<Storage*>(on_gpu.data_ptr().get_context()); }

Tensor alias(const Tensor& of, const Storage& storage, DispatchKey key) {
  auto made = c10::make_intrusive<c10::TensorImpl>(Storage(storage), c10::DispatchKeySet(key), of.dtype());
  made->set_sizes_and_strides(of.sizes(), of.strides(), of.storage_offset());
  if (of.unsafeGetTensorImpl()->is_wrapped_number()) made->set_wrapped_number(true);
  made->_set_conj(of.is_conj());
  made->_set_neg(of.is_neg());
  return Tensor(std::move(made));
}

// Random numbers: a generator on the GPU has one of the CPU behind it.

struct Random final : c10::GeneratorImpl {
  at::Generator cpu;
  explicit Random(at::Generator from = at::detail::createCPUGenerator())
      : c10::GeneratorImpl(GPU, c10::DispatchKeySet(DispatchKey::CUDA)), cpu(std::move(from)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Random* clone_impl() const override { return new Random(cpu.clone()); }
};

const at::Generator& default_random() {
  static const at::Generator made = at::make_generator<Random>();
  return made;
}

at::Generator behind(const at::Generator& on_gpu) { return static_cast<Random*>(on_gpu.unsafeGetGeneratorImpl())->cpu; }

// What a GPU refuses.

const Names PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "addmv", "addmv_", "mv", "dot", "_addmm_activation"};
const Names WITHOUT_KERNEL = {"histogram", "quantize_per_tensor", "quantize_per_channel", "mkldnn_linear"};
const Names ANY_DEVICE = {"copy_", "_copy_from", "_copy_from_and_resize", "set_"};
const Names INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"};  // their indices may be on the CPU
const Names WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount"};
// All but these take a tensor without dimensions from the CPU beside tensors on the GPU.
const Names STRICT = {"cat",           "take",          "put_",         "gather",       "index_select", "embedding",
                      "scatter",       "scatter_",      "scatter_add",  "scatter_add_", "index_copy_",  "index_add",
                      "index_add_",    "searchsorted",  "bucketize",    "bincount",     "equal",        "nll_loss_forward",
                      "convolution",   "_fused_adamw_", "repeat_interleave", "native_layer_norm", "dot", "mv",           "addmv"};

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

struct Call {
  const c10::OperatorHandle& op;
  torch::jit::Stack& stack;
  const std::string full = op.schema().operator_name().name;
  const std::string name = full.substr(full.rfind(':') + 1);
  const size_t count = op.schema().arguments().size();
  const size_t first = stack.size() - count;
  std::vector<std::pair<Tensor, Tensor>> lowered;  // a tensor on the GPU, and its alias on the CPU
  std::vector<Tensor> from_cpu;

  Tensor lower(const Tensor& tensor, const c10::Argument& argument, bool is_index) {
    if (!tensor.defined()) return tensor;
    if (tensor.is_cuda()) {
      for (auto& [gpu, cpu] : lowered)
        if (gpu.is_same(tensor)) return cpu;
      lowered.emplace_back(tensor, alias(tensor, to_cpu(tensor.storage()), DispatchKey::CPU));
      return lowered.back().second;
    }
    const bool written = argument.alias_info() && argument.alias_info()->isWrite();
    const bool a_number = tensor.dim() == 0 && !written && !STRICT.count(name) && name.rfind("linalg_", 0) != 0;
    TORCH_CHECK(ANY_DEVICE.count(name) || (is_index && INDEXED.count(name)) || a_number,
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (argument ",
                argument.name(), " of ", full, ")");
    from_cpu.push_back(tensor);
    return tensor;
  }

  void lower_arguments() {
    for (size_t i = 0; i < count; i++) {
      auto& value = stack[first + i];
      const auto& argument = op.schema().arguments()[i];
      const bool of_tensors = value.isList() && argument.type()->str().find("Tensor") != std::string::npos;
      if (value.isTensor()) {
        value = lower(value.toTensor(), argument, false);
      } else if (value.isTensorList()) {
        c10::List<Tensor> tensors;
        for (const Tensor& each : value.toTensorVector()) tensors.push_back(lower(each, argument, false));
        value = tensors;
      } else if (of_tensors) {  // of tensors that may be missing: indices
        c10::List<std::optional<Tensor>> tensors;
        for (const at::IValue& each : value.toListRef())
          tensors.push_back(each.isNone() ? std::optional<Tensor>() : lower(each.toTensor(), argument, true));
        value = tensors;
      } else if (value.isDevice()) {
        value = Device(c10::DeviceType::CPU);
      } else if (value.isStorage() && value.toStorage().device() == GPU) {
        value = to_cpu(value.toStorage());
      } else if (value.isGenerator()) {
        const auto given = value.toGenerator();
        TORCH_CHECK(given.device() == GPU, "Expected a 'cuda' device type for generator but found '", given.device().type(), "'");
        value = behind(given);
      } else if (value.isNone() && argument.type()->str().find("Generator") != std::string::npos) {
        value = behind(default_random());
      }
    }
  }

  void refuse() const {
    const bool known = full.rfind("aten::", 0) == 0 || full.rfind("bitsandbytes::", 0) == 0;
    TORCH_CHECK_NOT_IMPLEMENTED(known && !WITHOUT_KERNEL.count(name) && !ends_with(name, "_for_cpu"), "Could not run '", full,
                                "' with arguments from the 'CUDA' backend.");
    const bool waits = WAITS.count(name) || (ANY_DEVICE.count(name) && !from_cpu.empty());
    TORCH_CHECK(!(capturing && waits), "CUDA error: operation not permitted when stream is capturing (", full, ")");
    if (PRODUCTS.count(name))
      for (auto& [gpu, cpu] : lowered)
        TORCH_CHECK_NOT_IMPLEMENTED(!isIntegralType(gpu.scalar_type(), true), "\"addmm_cuda\" not implemented for '",
                                    c10::toString(gpu.scalar_type()), "'");
    if (name == "_int_mm") {
      const auto &left = stack[first].toTensor(), &right = stack[first + 1].toTensor();
      TORCH_CHECK(left.size(0) > 16, "self.size(0) needs to be greater than 16, but got ", left.size(0));
      TORCH_CHECK(left.size(1) % 8 == 0, "self.size(1) needs to be a multiple of 8, but got ", left.size(1));
      TORCH_CHECK(right.size(1) % 8 == 0, "mat2.size(1) needs to be a multiple of 8, but got ", right.size(1));
    }
  }

  // The storage on the GPU with the bytes of a tensor on the CPU: that of an argument, where they share them.
  Storage storage_for(const Tensor& on_cpu) const {
    for (auto& [gpu, cpu] : lowered)
      if (to_cpu(gpu.storage()).is_alias_of(on_cpu.storage())) return gpu.storage();
    return to_gpu(on_cpu.storage());
  }

  void update_arguments() {  // what was resized, or was given another storage
    for (auto& [gpu, cpu] : lowered) {
      auto* impl = gpu.unsafeGetTensorImpl();
      if (!to_cpu(gpu.storage()).is_alias_of(cpu.storage())) impl->set_storage_keep_dtype(storage_for(cpu));
      const Storage owned = to_cpu(gpu.storage());
      if (owned.data() != gpu.storage().data() || owned.nbytes() != gpu.storage().nbytes()) {
        gpu.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(bytes_of(owned));
        gpu.storage().unsafeGetStorageImpl()->set_nbytes(owned.nbytes());
      }
      if (gpu.sizes() != cpu.sizes() || gpu.strides() != cpu.strides() || gpu.storage_offset() != cpu.storage_offset())
        impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

  Tensor raised(const Tensor& result) const {
    if (!result.defined() || result.is_cuda()) return result;
    for (auto& [gpu, cpu] : lowered)
      if (cpu.is_same(result)) return gpu;
    for (auto& given : from_cpu)
      if (given.is_same(result)) return given;
    return alias(result, storage_for(result), DispatchKey::CUDA);
  }

  void raise_results() {
    for (size_t i = stack.size() - op.schema().returns().size(); i < stack.size(); i++) {
      if (stack[i].isTensor()) {
        stack[i] = raised(stack[i].toTensor());
      } else if (stack[i].isTensorList()) {
        c10::List<Tensor> tensors;
        for (const Tensor& each : stack[i].toTensorVector()) tensors.push_back(raised(each));
        stack[i] = tensors;
      }
    }
  }
};

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  calls++;
  Call call{op, *stack};
  if (call.name == "_fused_sdp_choice") {  // attention by its formula
    torch::jit::drop(*stack, call.count);
    stack->push_back(at::IValue(int64_t(0)));
    return;
  }
  call.lower_arguments();
  call.refuse();
  at::AutoDispatchBelowADInplaceOrView below;
  // A softmax that widens while it is at work has no kernel on the CPU.
  if (call.name == "_softmax" || call.name == "_log_softmax") {
    if ((*stack)[call.first + 2].toBool()) {
      (*stack)[call.first] = (*stack)[call.first].toTensor().to(at::kFloat);
      (*stack)[call.first + 2] = false;
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
  call.update_arguments();
  call.raise_results();
}

// What PyTorch asks a device for: there is one, with one stream, and nothing on it takes time.

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return GPU.type(); }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream getDefaultStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  void deviceSynchronize(DeviceIndex) const override {}
  Device getDeviceFromPtr(void*) const override { return GPU; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return default_random(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<Random>(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, all) { all.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, those) {  // these have kernels for every device, which would be found before the fallback
  for (auto* name : {"copy_", "_fused_sdp_choice"}) those.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
}

extern "C" {
void start() { c10::SetAllocator(GPU.type(), &memory); }
int capture(int on) { return capturing.exchange(on != 0); }  // what it was before
long operations() { return calls; }
}
