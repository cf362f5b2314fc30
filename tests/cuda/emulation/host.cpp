// The kernels of UNIT as a shared library for ctypes; with VHEAD_REPLAY, as a program that runs launches from a file, for
// sanitizers to watch. build.py writes kernels.inc: KERNEL(name) for each kernel.
#include "shim.hpp"

#include <cstdio>
#include <map>
#include <type_traits>
#include <utility>

#ifdef VHEAD_REPLAY
#include <iostream>
#endif

#include UNIT

namespace {

template <class... P, std::size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<P>*>(arguments[I])...);
}

// Takes a launch's arguments apart by the kernel's own signature.
template <class... P>
std::function<void(void**)> bind(void (*kernel)(P...)) {
    return [kernel](void** arguments) { call(kernel, arguments, std::index_sequence_for<P...>{}); };
}

const std::map<std::string, std::function<void(void**)>>& kernels() {
    static const std::map<std::string, std::function<void(void**)>> table = {
#define KERNEL(NAME) {#NAME, bind(NAME)},
#include "kernels.inc"
#undef KERNEL
    };
    return table;
}

}  // namespace

// Runs a kernel as cuLaunchKernel would, in the memory of `count` allocations. Not 0 where it failed: `error` then says why.
extern "C" int vhead_emulation_launch(const char* name, const unsigned* grid, const unsigned* block, void** arguments,
                                      std::uint64_t seed, emulation::Range* allocations, std::uint64_t count, char* error,
                                      std::uint64_t error_bytes) {
    try {
        const auto& kernel = kernels().at(name);
        std::vector<emulation::Range> ranges(allocations, allocations + count);
        const auto run = [&] { kernel(arguments); };
        emulation::launch({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, seed, run, &ranges);
        std::copy(ranges.begin(), ranges.end(), allocations);
        return 0;
    } catch (const emulation::Error& problem) {
        std::snprintf(error, error_bytes, "%s", problem.what());
    } catch (const std::out_of_range&) {
        std::snprintf(error, error_bytes, "no kernel named %s", name);
    }
    return 1;
}

#ifdef VHEAD_REPLAY

namespace {

template <class T>
T take() {
    T value;
    std::cin.read(reinterpret_cast<char*>(&value), sizeof(T));
    return value;
}

std::string take_bytes() {
    std::string bytes(take<std::uint64_t>(), '\0');
    std::cin.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    return bytes;
}

// Of its own, so that a sanitizer sees both ends of it.
struct Allocation {
    std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
    std::size_t size;
};

Allocation take_allocation() {
    const std::string bytes = take_bytes();
    Allocation allocation{{static_cast<char*>(std::malloc(bytes.size())), std::free}, bytes.size()};
    std::memcpy(allocation.memory.get(), bytes.data(), bytes.size());
    return allocation;
}

// An argument's bytes, with the addresses in it put to where the allocations are here.
std::string take_argument(const std::vector<Allocation>& allocations) {
    std::string bytes = take_bytes();
    for (auto addresses = take<std::uint64_t>(); addresses > 0; --addresses) {
        const auto offset = take<std::uint64_t>(), number = take<std::uint64_t>(), distance = take<std::uint64_t>();
        const char* address = allocations.at(number).memory.get() + distance;
        std::memcpy(bytes.data() + offset, &address, sizeof(address));
    }
    return bytes;
}

void take_launch(const std::vector<Allocation>& allocations) {
    const std::string name = take_bytes();
    unsigned shape[6];
    for (unsigned& number : shape) number = static_cast<unsigned>(take<std::uint64_t>());
    const auto seed = take<std::uint64_t>();
    // Each in memory of its own, which malloc aligns.
    std::vector<std::string> arguments(take<std::uint64_t>());
    std::vector<void*> pointers;
    for (std::string& argument : arguments) {
        argument = take_argument(allocations);
        argument.reserve(64);
        pointers.push_back(argument.data());
    }
    const auto& kernel = kernels().at(name);
    const auto run = [&] { kernel(pointers.data()); };
    emulation::launch({shape[0], shape[1], shape[2]}, {shape[3], shape[4], shape[5]}, seed, run);
}

}  // namespace

// Allocations, then launches, then the allocations as they are left; every number is a uint64.
int main() {
    std::vector<Allocation> allocations(take<std::uint64_t>());
    for (Allocation& allocation : allocations) allocation = take_allocation();
    try {
        for (auto launches = take<std::uint64_t>(); launches > 0; --launches) take_launch(allocations);
    } catch (const emulation::Error& problem) {
        std::cerr << problem.what() << "\n";
        return 1;
    }
    for (const Allocation& allocation : allocations) {
        std::cout.write(allocation.memory.get(), static_cast<std::streamsize>(allocation.size));
    }
    return 0;
}

#endif
