// A strict stand-in for CUDA in a CPU build of torch. It takes CUDA's own dispatch key, so `device="cuda"`, `is_cuda`,
// autocast and Lightning's "gpu" behave as on a card. A tensor there is host memory; each operator
//   1. checks that its tensors are on one device, as CUDA does;
//   2. is counted: a launch, and a wait where the host would wait for the device;
//   3. is computed by the CPU's kernel on an alias of the same memory.
// No numerics of a card, no times, no NCCL. Load it before torch is imported: strict_cuda.py.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using Names = std::unordered_set<std::string>;

constexpr DeviceIndex N_DEVICES = 2;
thread_local DeviceIndex current = 0;
DeviceIndex or_current(DeviceIndex index) { return index < 0 ? current : index; }

// ---- what is counted
enum Kind { LAUNCH, WAIT };
using Callback = void (*)(int kind, const char* op);
std::atomic<Callback> callback{nullptr};
std::atomic<bool> waits_raise{false};  // torch.cuda.set_sync_debug_mode("error")
thread_local int inside = 0;           // within a kernel: what it calls is its own

void count(Kind kind, const std::string& op) {
  if (inside) return;
  TORCH_CHECK(kind != WAIT || !waits_raise, "called a synchronizing CUDA operation (strict device: ", op, ")");
  if (auto call = callback.load()) call(kind, op.c_str());
}

struct Kernel {  // on the CPU, below autograd
  c10::impl::ExcludeDispatchKeyGuard below{c10::autograd_dispatch_keyset_with_ADInplaceOrView};
  Kernel() { inside++; }
  ~Kernel() { inside--; }
};

// ---- memory that can run out
std::atomic<long> live{0}, peak{0}, limit{0}, failing{0}, allocations_left{-1};

void take(long bytes) {
  if (allocations_left >= 0 && allocations_left-- == 0) {
    failing--;
    allocations_left = failing > 0 ? 0 : -1;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes (as told).");
  }
  long now = live += bytes;
  if (limit && now > limit) {
    live -= bytes;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " of ", limit.load(), " bytes.");
  }
  if (now > peak) peak = now;
}

struct Block { void* memory; long bytes; };
void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  live -= block->bytes;
  free(block->memory);
  delete block;
}
struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    Device device(DeviceType::CUDA, current);
    if (!bytes) return {nullptr, nullptr, &free_block, device};
    take(static_cast<long>(bytes));
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes)) {
      live -= static_cast<long>(bytes);
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes.");
    }
    return {memory, new Block{memory, static_cast<long>(bytes)}, &free_block, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
} device_memory;

std::mutex pins_lock;
std::map<const char*, size_t> pins;
void free_pinned(void* memory) {
  { std::lock_guard<std::mutex> guard(pins_lock); pins.erase(static_cast<char*>(memory)); }
  free(memory);
}
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    TORCH_CHECK(!posix_memalign(&memory, 64, bytes ? bytes : 1), "no memory");
    std::lock_guard<std::mutex> guard(pins_lock);
    pins[static_cast<char*>(memory)] = bytes ? bytes : 1;
    return {memory, memory, &free_pinned, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
} pinned_memory;
bool is_pinned(const void* at) {
  std::lock_guard<std::mutex> guard(pins_lock);
  auto next = pins.upper_bound(static_cast<const char*>(at));
  if (next == pins.begin()) return false;
  auto [begin, bytes] = *--next;
  return static_cast<const char*>(at) < begin + bytes;
}

// ---- generators: the CPU's numbers under a CUDA name
struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator host = at::detail::createCPUGenerator();
  explicit DeviceGenerator(DeviceIndex index)
      : GeneratorImpl(Device(DeviceType::CUDA, index), c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator(device().index());
    copy->host = host.clone();
    return copy;
  }
};
at::Generator& host_of(const at::Generator& generator) {
  return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->host;
}
const at::Generator& default_generator(DeviceIndex index) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (DeviceIndex i = 0; i < N_DEVICES; i++) made.push_back(at::make_generator<DeviceGenerator>(i));
    for (auto& generator : made) generator.set_current_seed(c10::default_rng_seed_val);
    return made;
  }();
  return all[or_current(index)];
}

// ---- what torch asks a backend
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;
  Guard() = default;
  explicit Guard(DeviceType) {}
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    auto before = getDevice();
    if (device.index() >= 0) setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < N_DEVICES, "CUDA error: invalid device ordinal");
    current = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device.index() < 0 ? getDevice() : device, 0);
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  DeviceIndex deviceCount() const noexcept override { return N_DEVICES; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { count(WAIT, "stream"); }
  void synchronizeEvent(void*) const override { count(WAIT, "event"); }
  void synchronizeDevice(const DeviceIndex) const override { count(WAIT, "device"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}  // namespace

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const Generator& getDefaultGenerator(DeviceIndex index = -1) const override { return default_generator(index); }
  Generator getNewGenerator(DeviceIndex index = -1) const override {
    return make_generator<DeviceGenerator>(or_current(index));
  }
  Device getDeviceFromPtr(void*) const override { return Device(DeviceType::CUDA, current); }
  bool isPinnedPtr(const void* at) const override { return is_pinned(at); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  DeviceIndex deviceCount() const override { return N_DEVICES; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return std::exchange(current, index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return std::exchange(current, or_current(index)); }
  int getNumGPUs() const override { return N_DEVICES; }
  void deviceSynchronize(DeviceIndex) const override { count(WAIT, "device"); }
  std::string showConfig() const override { return "strict device"; }
};
using at::CUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

namespace {
// ---- one operator's tensors as the CPU sees them, and back
class Aliases {
  struct Pair { c10::Storage device, host; c10::DispatchKeySet keys; };
  std::unordered_map<c10::StorageImpl*, Pair> pairs;
  std::vector<std::pair<Tensor, Tensor>> given;

  // Host memory that a CPU kernel made, as a storage of the device that keeps it alive.
  static void release(void* context) {
    auto* kept = static_cast<c10::Storage*>(context);
    live -= static_cast<long>(kept->nbytes());
    delete kept;
  }
  static c10::DataPtr adopt(const c10::Storage& host, Device device) {
    take(static_cast<long>(host.nbytes()));
    return {const_cast<void*>(host.data()), new c10::Storage(host), &release, device};
  }
  static void dress(const Tensor& like, const Tensor& made) {
    auto* impl = made.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    made._set_conj(like.is_conj());
    made._set_neg(like.is_neg());
  }

 public:
  Tensor to_host(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    const auto& own = tensor.storage();
    auto found = pairs.find(own.unsafeGetStorageImpl());
    if (found == pairs.end()) {
      c10::DataPtr memory(const_cast<void*>(own.data()), Device(DeviceType::CPU));
      c10::Storage host(c10::Storage::use_byte_size_t(), own.nbytes(), std::move(memory), c10::GetCPUAllocator(), true);
      found = pairs.emplace(own.unsafeGetStorageImpl(), Pair{own, host, tensor.key_set()}).first;
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second.host), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    dress(tensor, made);
    given.emplace_back(tensor, made);
    return made;
  }

  Tensor to_device(const Tensor& tensor, Device device) {
    if (!tensor.defined() || !tensor.is_cpu() || tensor.layout() != c10::kStrided) return tensor;
    for (auto& [own, host] : given)
      if (tensor.is_same(host)) return own;
    const auto& storage = tensor.storage();
    Tensor made;
    for (auto& [_, pair] : pairs) {
      if (pair.host.unsafeGetStorageImpl() != storage.unsafeGetStorageImpl() &&
          !(storage.data() && storage.data() == pair.device.data()))
        continue;
      made = at::detail::make_tensor<c10::TensorImpl>(
          c10::TensorImpl::VIEW, c10::Storage(pair.device), pair.keys, tensor.dtype());
      break;
    }
    if (!made.defined()) {
      c10::Storage own(c10::Storage::use_byte_size_t(), storage.nbytes(), adopt(storage, device), &device_memory, true);
      made = at::detail::make_tensor<c10::TensorImpl>(
          std::move(own), c10::DispatchKeySet(c10::DispatchKey::CUDA), tensor.dtype());
    }
    dress(tensor, made);
    return made;
  }

  // What the kernel did to its arguments: storages that it made anew, tensors of another shape.
  void settle() {
    for (auto& [own, host] : given) {
      auto& pair = pairs.at(own.storage().unsafeGetStorageImpl());
      if (pair.host.data() != pair.device.data() || pair.host.nbytes() != pair.device.nbytes()) {
        pair.device.set_data_ptr(adopt(pair.host, own.device()));
        pair.device.set_nbytes(pair.host.nbytes());
      }
      if (own.sizes() != host.sizes() || own.strides() != host.strides() || own.storage_offset() != host.storage_offset())
        own.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }
};

// ---- what CUDA's operators are like
// May take one number that is a tensor of the CPU.
const Names NUMBERS = {
    "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "remainder", "fmod", "pow", "atan2", "maximum", "minimum",
    "fmax", "fmin", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or",
    "bitwise_xor", "copysign", "hypot", "xlogy", "heaviside", "where", "clamp_min", "clamp_max", "addcmul", "addcdiv", "lerp",
    "masked_fill", "fill_", "index_put", "_index_put_impl_", "index_fill", "_foreach_mul", "_foreach_div", "_foreach_add",
    "nextafter", "logaddexp"};
// Launch nothing.
const Names FREE = {"view", "as_strided", "_reshape_alias", "alias", "resize_", "unfold", "is_set_to", "_conj", "_neg_view",
                    "view_as_real", "view_as_complex", "resize_as_", "as_strided_", "_unsafe_view", "_has_compatible_shallow_copy_type"};
// End with the host waiting for the device: a size or a number is needed.
const Names WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "unique_consecutive", "argwhere", "equal",
                       "unique_dim_consecutive", "_unique", "_unique2", "bincount", "is_nonzero", "_linalg_check_errors", "ctc_loss"};
// Have no kernel for whole numbers.
const Names FLOATING = {"mm", "addmm", "bmm", "baddbmm", "dot", "mv", "addmv", "addmv_", "addmm_", "addbmm", "baddbmm_", "vdot"};
const Names INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"};

bool takes_number(const std::string& name) {
  if (NUMBERS.count(name)) return true;
  return !name.empty() && name.back() == '_' && NUMBERS.count(name.substr(0, name.size() - 1));
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string full = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const std::string name = schema.name().substr(schema.name().find("::") + 2);
  const size_t n = schema.arguments().size(), begin = stack->size() - n;
  const bool indexing = INDEXING.count(name);

  std::vector<Tensor> tensors;
  std::optional<Device> asked;
  bool host_index = false, mask = false, own_generator = false;
  for (size_t i = begin; i < begin + n; i++) {
    auto& value = (*stack)[i];
    if (value.isTensor() && value.toTensor().defined()) tensors.push_back(value.toTensor());
    else if (value.isTensorList())
      for (const auto& tensor : value.toTensorVector()) tensors.push_back(tensor);
    else if (value.isOptionalTensorList()) {
      for (const auto& tensor : value.toOptionalTensorVector()) {
        if (!tensor || !tensor->defined()) continue;
        mask |= tensor->scalar_type() == at::kBool || tensor->scalar_type() == at::kByte;
        if (indexing && tensor->is_cpu()) host_index = true;
        else tensors.push_back(*tensor);
      }
    } else if (value.isDevice()) asked = value.toDevice();
    else if (value.isGenerator() && value.toGenerator().defined()) {
      auto generator = value.toGenerator();
      TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found '", generator.device(), "'");
      own_generator = true;
      value = host_of(generator);
    }
  }

  std::optional<Device> device;
  for (const auto& tensor : tensors)
    if (tensor.is_cuda() && !device) device = tensor.device();
  const bool any = device.has_value();
  if (!device) device = Device(DeviceType::CUDA, or_current(asked && asked->is_cuda() ? asked->index() : -1));
  int numbers = 0;
  for (const auto& tensor : tensors) {
    if (tensor.device() == *device || tensor.is_meta()) continue;
    const bool written = tensor.is_same(tensors[0]) && name.back() == '_';
    if (tensor.is_cpu() && tensor.dim() == 0 && takes_number(name) && !written) {
      numbers += !tensor.unsafeGetTensorImpl()->is_wrapped_number();
      continue;
    }
    TORCH_CHECK(!(indexing && any && tensors[0].is_cpu()),
                "indices should be either on cpu or on the same device as the indexed tensor (cpu) (strict device: ", full, ")");
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", *device, " and ",
                tensor.device(), "! (strict device: ", full, ", ", tensor.sizes(), ")");
  }
  TORCH_CHECK(numbers < 2, "Trying to pass too many CPU scalars to non-CPU kernel! (strict device: ", full, ")");
  if (FLOATING.count(name))
    for (const auto& tensor : tensors)
      TORCH_CHECK(!at::isIntegralType(tensor.scalar_type(), true), "\"", name, "_cuda\" not implemented for '", tensor.scalar_type(), "'");

  if (host_index) count(WAIT, full + " (index on the CPU)");
  if (WAITING.count(name)) count(WAIT, full);
  else if (mask && name.find("index_put") != std::string::npos) {
    // One number of the CPU under a mask is a masked_fill, which does not wait.
    const auto& value = (*stack)[begin + 2];
    if (!value.isTensor() || !value.toTensor().is_cpu() || value.toTensor().numel() != 1) count(WAIT, full + " (mask)");
  } else if (name == "repeat_interleave" && schema.overload_name() == "Tensor" && (*stack)[begin + 1].isNone()) count(WAIT, full);
  if (!FREE.count(name)) count(LAUNCH, full);
  for (size_t i = 0; i < n && !own_generator; i++)
    if (schema.arguments()[i].name() == "generator" && (*stack)[begin + i].isNone())
      (*stack)[begin + i] = host_of(default_generator(device->index()));

  Aliases aliases;
  for (size_t i = begin; i < begin + n; i++) {
    auto& value = (*stack)[i];
    if (value.isTensor() && value.toTensor().defined()) value = aliases.to_host(value.toTensor());
    else if (value.isTensorList()) {
      std::vector<Tensor> all;
      for (const auto& tensor : value.toTensorVector()) all.push_back(aliases.to_host(tensor));
      value = c10::List<Tensor>(all);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> all;
      for (const auto& tensor : value.toOptionalTensorVector())
        all.push_back(tensor && tensor->defined() ? std::optional<Tensor>(aliases.to_host(*tensor)) : tensor);
      value = all;
    } else if (value.isDevice()) value = Device(DeviceType::CPU);
  }
  {
    Kernel kernel;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  aliases.settle();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) value = aliases.to_device(value.toTensor(), *device);
    else if (value.isTensorList()) {
      std::vector<Tensor> all;
      for (const auto& tensor : value.toTensorVector()) all.push_back(aliases.to_device(tensor, *device));
      value = c10::List<Tensor>(all);
    }
  }
}

// ---- operators that torch asks of each backend, and those that the CPU has in parts
using Sizes = c10::IntArrayRef;

struct On {  // that device is the current one
  DeviceIndex before = current;
  explicit On(std::optional<Device> device) {
    if (!device || !device->has_index()) return;
    TORCH_CHECK(device->index() < N_DEVICES, "CUDA error: invalid device ordinal");
    current = device->index();
  }
  ~On() { current = before; }
};
Tensor empty(Sizes size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
             std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  On there(device);
  return at::detail::empty_generic(size, &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   dtype.value_or(c10::get_default_dtype_as_scalartype()), format);
}
Tensor empty_strided(Sizes size, Sizes stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  On there(device);
  return at::detail::empty_strided_generic(size, stride, &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           dtype.value_or(c10::get_default_dtype_as_scalartype()));
}
Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (!from.defined() || self.is_same(from) || self.is_meta()) return self;
  if (from.numel()) {
    if (self.is_cuda() && from.is_cuda()) count(LAUNCH, "aten::copy_");
    else if (self.is_cuda()) non_blocking ? count(LAUNCH, "aten::copy_ (upload)") : count(WAIT, "aten::copy_ (upload)");
    else if (non_blocking && is_pinned(self.storage().data())) count(LAUNCH, "aten::copy_ (download)");
    else count(WAIT, "aten::copy_ (download)");
  }
  Aliases aliases;
  auto to = aliases.to_host(self), source = aliases.to_host(from);
  Kernel kernel;
  to.copy_(source);
  return self;
}
Tensor& set_storage(Tensor& self, at::Storage from, int64_t offset, Sizes size, Sizes stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(from));
  std::vector<int64_t> steps(stride.begin(), stride.end());
  if (steps.empty() && !size.empty()) {
    steps.assign(size.size(), 1);
    for (size_t i = size.size() - 1; i > 0; i--) steps[i - 1] = steps[i] * std::max<int64_t>(size[i], 1);
  }
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, steps, offset);
  return self;
}
Tensor& set_whole_storage(Tensor& self, at::Storage from) {
  const auto n = static_cast<int64_t>(from.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(from), 0, {n}, {1});
}
Tensor& set_tensor(Tensor& self, const Tensor& from) {
  return set_storage(self, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}
Tensor& set_nothing(Tensor& self) {
  self.unsafeGetTensorImpl()->set_sizes_and_strides(Sizes{0}, Sizes{1}, 0);
  return self;
}
void record_stream(Tensor&, c10::Stream) {}
int64_t attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                  std::optional<double>, bool) {
  return 0;  // by products and a softmax
}

void same_device(std::initializer_list<Tensor> tensors, Device device) {
  for (const auto& tensor : tensors)
    TORCH_CHECK(!tensor.defined() || tensor.device() == device, "Input type and weight type should be the same: ", device, " and ",
                tensor.device(), " (strict device: convolution)");
}
Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Sizes stride, Sizes padding,
                   Sizes dilation, bool transposed, Sizes output_padding, int64_t groups) {
  same_device({x, weight, bias.value_or(Tensor())}, x.device());
  count(LAUNCH, "aten::convolution");
  if (bias && bias->defined()) count(LAUNCH, "aten::convolution (bias)");
  Aliases aliases;
  auto on_host = [&](const Tensor& tensor) { return aliases.to_host(tensor); };
  std::optional<Tensor> b = bias && bias->defined() ? std::optional<Tensor>(on_host(*bias)) : std::nullopt;
  auto a = on_host(x), w = on_host(weight);
  Kernel kernel;
  auto y = at::convolution(a, w, b, stride, padding, dilation, transposed, output_padding, groups);
  return aliases.to_device(y, x.device());
}
std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, at::OptionalIntArrayRef bias, Sizes stride, Sizes padding,
    Sizes dilation, bool transposed, Sizes output_padding, int64_t groups, std::array<bool, 3> mask) {
  same_device({x, weight}, grad.device());
  count(LAUNCH, "aten::convolution_backward (input)");
  count(LAUNCH, "aten::convolution_backward (weight)");
  Aliases aliases;
  auto g = aliases.to_host(grad), a = aliases.to_host(x), w = aliases.to_host(weight);
  Kernel kernel;
  auto [p, q, r] = at::convolution_backward(g, a, w, bias, stride, padding, dilation, transposed, output_padding, groups, mask);
  auto back = [&](const Tensor& tensor) { return aliases.to_device(tensor, grad.device()); };
  return {back(p), back(q), back(r)};
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_nothing);
  m.impl("record_stream", record_stream);
  m.impl("convolution", convolution);
  m.impl("convolution_backward", convolution_backward);
}
struct Start {
  Start() {
    c10::SetAllocator(DeviceType::CUDA, &device_memory, 1);
    at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&attention);
  }
} start;
}  // namespace

// ---- for strict_cuda.py
extern "C" {
void strict_callback(Callback call) { callback = call; }
void strict_count(const char* op) { count(WAIT, op); }
void strict_waits_raise(int yes) { waits_raise = yes; }
long strict_live() { return live; }
long strict_peak() { return peak; }
void strict_reset_peak() { peak = live.load(); }
long strict_limit() { return limit; }
void strict_set_limit(long bytes) { limit = bytes; }
void strict_fail(long after, long times) { failing = times; allocations_left = times > 0 ? after : -1; }
int strict_devices() { return N_DEVICES; }
void strict_seed(int device, unsigned long long seed) { default_generator(device).unsafeGetGeneratorImpl()->set_current_seed(seed); }
unsigned long long strict_initial_seed(int device) { return default_generator(device).current_seed(); }
long strict_get_state(int device, void* out, long bytes) {
  auto state = default_generator(device).get_state();
  if (out && bytes >= static_cast<long>(state.nbytes())) memcpy(out, state.data_ptr(), state.nbytes());
  return static_cast<long>(state.nbytes());
}
void strict_set_state(int device, const void* in, long bytes) {
  auto state = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));
  memcpy(state.data_ptr(), in, bytes);
  auto generator = default_generator(device);
  generator.set_state(state);
}
}
