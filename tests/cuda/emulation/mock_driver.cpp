// A libcuda.so.1 for tests on machines without a GPU: device memory is the process's own, a launch runs the kernel's source
// on the host. What it checks is everything above the machine code: names, the order and width of arguments, grids, streams,
// contexts, errors. It says nothing about CUDA's memory model, nor about time.
//
// Environment, read at each call:
//   VHEAD_MOCK_DEVICES   how many devices there are (1)
//   VHEAD_MOCK_ARCH      their compute capability (9.0)
//   VHEAD_MOCK_DRIVER    the CUDA version that the driver knows (12090)
//   VHEAD_MOCK_FAIL      function=code: calls of that function answer that CUresult
//   VHEAD_MOCK_SEED      seed of the order in which threads run (0: in order)
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "mock_kernels.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

using Result = int;
constexpr Result SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
                 INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NO_BINARY = 209, NOT_FOUND = 500, LAUNCH_FAILED = 719, NOT_SUPPORTED = 801;

namespace {

struct Context {
    int device = 0;
    int held = 0;
};

struct Module {
    Context* context;
};

struct State {
    std::mutex mutex;
    pid_t process = 0;
    std::vector<Context> contexts = std::vector<Context>(16);
    std::set<Module*> modules;
    std::set<void*> allocations;
    long foreign_frees = 0;
    std::string log;
};

State& state() {
    static State it;
    return it;
}

thread_local std::vector<Context*> context_stack;

std::string setting(const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return value && *value ? value : otherwise;
}

int devices() { return std::atoi(setting("VHEAD_MOCK_DEVICES", "1").c_str()); }

// What the test asks `function` to answer, else what a forked child gets, else nothing wrong.
Result trouble(const char* function) {
    const std::string fail = setting("VHEAD_MOCK_FAIL", "");
    const size_t equals = fail.find('=');
    if (equals != std::string::npos && fail.substr(0, equals) == function) return std::atoi(fail.c_str() + equals + 1);
    return state().process && state().process != getpid() ? NOT_INITIALIZED : SUCCESS;
}

#define CHECKED(FUNCTION)                             \
    if (const Result wrong = trouble(FUNCTION); wrong) return wrong

Context* current() { return context_stack.empty() ? nullptr : context_stack.back(); }

// The architecture that a cubin's ELF header or a PTX text names, times ten; zero for what is neither.
int architecture(const char* image) {
    if (std::memcmp(image, "\x7f" "ELF", 4) == 0) {
        constexpr char NEWER_ABI = 0x41;
        std::uint32_t flags;
        std::memcpy(&flags, image + 48, sizeof flags);
        return static_cast<int>((image[7] == NEWER_ABI ? flags >> 8 : flags) & 0xff);
    }
    const char* target = std::strstr(image, ".target sm_");
    return target ? std::atoi(target + 11) : 0;
}

thread_local int takes_memory = 0;

int capability() {
    const std::string text = setting("VHEAD_MOCK_ARCH", "9.0");
    return std::atoi(text.c_str()) * 10 + std::atoi(text.c_str() + text.find('.') + 1);
}

// Machine code runs on its own major version from its minor one on, PTX on everything later.
bool runs_here(const char* image) {
    const int made_for = architecture(image);
    const bool is_machine = image[0] == '\x7f';
    return made_for && made_for <= capability() && (!is_machine || made_for / 10 == capability() / 10);
}

}  // namespace

// --- What tests ask ---------------------------------------------------------------------------------------------------

// Marks this library: addresses of the process are addresses of device 0. Whether this thread's CPU tensors are to be taken
// for tensors of that device; otherwise they are the CPU's.
EXPORT int vhead_mock_takes_memory() { return takes_memory; }
EXPORT void vhead_mock_take_memory(int yes) { takes_memory = yes; }
// A line for each launch: kernel, grid, block, stream, and what is known of the arguments.
EXPORT const char* vhead_mock_log() { return state().log.c_str(); }
EXPORT void vhead_mock_clear_log() { state().log.clear(); }
EXPORT int vhead_mock_context_depth() { return static_cast<int>(context_stack.size()); }
EXPORT int vhead_mock_held_contexts(int device) { return state().contexts.at(device).held; }
EXPORT long vhead_mock_loaded_modules() { return static_cast<long>(state().modules.size()); }
EXPORT long vhead_mock_live_allocations() { return static_cast<long>(state().allocations.size()); }
EXPORT long vhead_mock_foreign_frees() { return state().foreign_frees; }

// --- The driver and its devices ---------------------------------------------------------------------------------------

EXPORT Result cuInit(unsigned) {
    CHECKED("cuInit");
    if (devices() < 1) return NO_DEVICE;
    state().process = getpid();
    return SUCCESS;
}

EXPORT Result cuDriverGetVersion(int* version) {
    CHECKED("cuDriverGetVersion");
    *version = std::atoi(setting("VHEAD_MOCK_DRIVER", "12090").c_str());
    return SUCCESS;
}

EXPORT Result cuDeviceGetCount(int* count) {
    CHECKED("cuDeviceGetCount");
    *count = devices();
    return SUCCESS;
}

EXPORT Result cuDeviceGet(int* device, int ordinal) {
    CHECKED("cuDeviceGet");
    if (ordinal < 0 || ordinal >= devices()) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

EXPORT Result cuDeviceGetName(char* name, int length, int) {
    CHECKED("cuDeviceGetName");
    std::snprintf(name, static_cast<size_t>(length), "emulated device");
    return SUCCESS;
}

EXPORT Result cuDeviceGetAttribute(int* value, int attribute, int) {
    CHECKED("cuDeviceGetAttribute");
    constexpr int MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76;
    switch (attribute) {
        case MULTIPROCESSORS: *value = 132; break;
        case MAJOR: *value = capability() / 10; break;
        case MINOR: *value = capability() % 10; break;
        default: *value = 1;
    }
    return SUCCESS;
}

EXPORT Result cuGetErrorName(int code, const char** name) {
    switch (code) {
        case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
        case NO_BINARY: *name = "CUDA_ERROR_NO_BINARY_FOR_GPU"; break;
        case LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
        default: *name = nullptr; return INVALID_VALUE;
    }
    return SUCCESS;
}

EXPORT Result cuGetErrorString(int code, const char** text) { return cuGetErrorName(code, text); }

// --- Contexts ---------------------------------------------------------------------------------------------------------

EXPORT Result cuDevicePrimaryCtxRetain(Context** context, int device) {
    CHECKED("cuDevicePrimaryCtxRetain");
    const std::lock_guard<std::mutex> lock(state().mutex);
    *context = &state().contexts.at(device);
    (*context)->device = device;
    (*context)->held += 1;
    return SUCCESS;
}

EXPORT Result cuDevicePrimaryCtxRelease_v2(int device) {
    const std::lock_guard<std::mutex> lock(state().mutex);
    state().contexts.at(device).held -= 1;
    return SUCCESS;
}

EXPORT Result cuCtxPushCurrent_v2(Context* context) {
    CHECKED("cuCtxPushCurrent");
    if (!context || context->held < 1) return INVALID_CONTEXT;
    context_stack.push_back(context);
    return SUCCESS;
}

EXPORT Result cuCtxPopCurrent_v2(Context** context) {
    if (context_stack.empty()) return INVALID_CONTEXT;
    *context = context_stack.back();
    context_stack.pop_back();
    return SUCCESS;
}

EXPORT Result cuCtxGetCurrent(Context** context) {
    *context = current();
    return SUCCESS;
}

EXPORT Result cuCtxSetCurrent(Context* context) {
    if (!context_stack.empty()) context_stack.pop_back();
    if (context) context_stack.push_back(context);
    return SUCCESS;
}

EXPORT Result cuCtxSynchronize() { return SUCCESS; }

// --- Modules and launches ---------------------------------------------------------------------------------------------

EXPORT Result cuModuleLoadData(Module** module, const void* image) {
    CHECKED("cuModuleLoadData");
    if (!current()) return INVALID_CONTEXT;
    if (!architecture(static_cast<const char*>(image))) return INVALID_IMAGE;
    if (!runs_here(static_cast<const char*>(image))) return NO_BINARY;
    const std::lock_guard<std::mutex> lock(state().mutex);
    *module = new Module{current()};
    state().modules.insert(*module);
    return SUCCESS;
}

EXPORT Result cuModuleUnload(Module* module) {
    const std::lock_guard<std::mutex> lock(state().mutex);
    if (!state().modules.erase(module)) return INVALID_VALUE;
    delete module;
    return SUCCESS;
}

EXPORT Result cuModuleGetFunction(const std::pair<const std::string, mock::Kernel>** function, Module*, const char* name) {
    CHECKED("cuModuleGetFunction");
    const auto found = mock::kernels().find(name);
    if (found == mock::kernels().end()) return NOT_FOUND;
    *function = &*found;
    return SUCCESS;
}

EXPORT Result cuLaunchKernel(const std::pair<const std::string, mock::Kernel>* function, unsigned grid_x, unsigned grid_y,
                             unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                             void* stream, void** arguments, void**) {
    CHECKED("cuLaunchKernel");
    if (!current()) return INVALID_CONTEXT;
    const bool grid_fits = grid_x && grid_x <= 0x7fffffff && grid_y && grid_y <= 65535 && grid_z && grid_z <= 65535;
    const std::uint64_t threads = std::uint64_t{block_x} * block_y * block_z;
    if (!grid_fits || threads < 1 || threads > 1024 || shared > 48 << 10) return INVALID_VALUE;
    std::ostringstream line;
    line << function->first << " grid=" << grid_x << "," << grid_y << " block=" << block_x << "," << block_y
         << " stream=" << reinterpret_cast<std::uintptr_t>(stream) << " device=" << current()->device
         << function->second.describe(arguments) << "\n";
    const std::uint64_t seed = std::strtoull(setting("VHEAD_MOCK_SEED", "0").c_str(), nullptr, 0);
    const auto kernel = [&] { function->second.call(arguments); };
    // One launch at a time: the emulation's shared memory is the process's.
    const std::lock_guard<std::mutex> lock(state().mutex);
    state().log += line.str();
    try {
        emulation::launch({grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, seed, kernel);
    } catch (const emulation::Error& problem) {
        state().log += std::string("error: ") + problem.what() + "\n";
        return LAUNCH_FAILED;
    }
    return SUCCESS;
}

// --- Memory and streams -----------------------------------------------------------------------------------------------

EXPORT Result cuMemAlloc_v2(void** address, size_t bytes) {
    CHECKED("cuMemAlloc");
    const std::lock_guard<std::mutex> lock(state().mutex);
    *address = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!*address) return OUT_OF_MEMORY;
    state().allocations.insert(*address);
    return SUCCESS;
}

EXPORT Result cuMemFree_v2(void* address) {
    const std::lock_guard<std::mutex> lock(state().mutex);
    if (!state().allocations.erase(address)) {
        state().foreign_frees += 1;
        return INVALID_VALUE;
    }
    std::free(address);
    return SUCCESS;
}

EXPORT Result cuMemAllocAsync(void** address, size_t bytes, void*) { return cuMemAlloc_v2(address, bytes); }
EXPORT Result cuMemFreeAsync(void* address, void*) { return cuMemFree_v2(address); }

static Result copy(void* to, const void* from, size_t bytes) {
    std::memmove(to, from, bytes);
    return SUCCESS;
}

EXPORT Result cuMemcpyDtoDAsync_v2(void* to, void* from, size_t bytes, void*) { return copy(to, from, bytes); }
EXPORT Result cuMemcpyDtoHAsync_v2(void* to, void* from, size_t bytes, void*) { return copy(to, from, bytes); }
EXPORT Result cuMemcpyHtoDAsync_v2(void* to, void* from, size_t bytes, void*) { return copy(to, from, bytes); }

EXPORT Result cuMemsetD8Async(void* address, unsigned char value, size_t bytes, void* stream) {
    CHECKED("cuMemsetD8Async");
    if (!current()) return INVALID_CONTEXT;
    std::memset(address, value, bytes);
    const std::lock_guard<std::mutex> lock(state().mutex);
    state().log += "cuMemsetD8Async bytes=" + std::to_string(bytes) +
                   " stream=" + std::to_string(reinterpret_cast<std::uintptr_t>(stream)) + "\n";
    return SUCCESS;
}

EXPORT Result cuStreamSynchronize(void*) { return SUCCESS; }
EXPORT Result cuStreamDestroy_v2(void*) { return SUCCESS; }
EXPORT Result cuStreamIsCapturing(void*, int* status) { *status = 0; return SUCCESS; }
EXPORT Result cuStreamWaitEvent(void*, void*, unsigned) { return SUCCESS; }
EXPORT Result cuEventCreate(void** event, unsigned) { *event = new char; return SUCCESS; }
EXPORT Result cuEventDestroy_v2(void* event) { delete static_cast<char*>(event); return SUCCESS; }
EXPORT Result cuEventRecord(void*, void*) { return SUCCESS; }
EXPORT Result cuModuleLoad(void**, const char*) { return NOT_SUPPORTED; }
EXPORT Result cuMemcpyPeerAsync(void*, void*, void*, void*, size_t, void*) { return NOT_SUPPORTED; }
EXPORT Result cuCtxDestroy_v2(void*) { return SUCCESS; }
