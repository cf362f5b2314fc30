// The kernels by name, each with a function that takes a launch's arguments apart by the kernel's own signature.
// build.py writes kernels.inc: KERNEL(name) for each kernel.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>

#include "shim.hpp"

#include UNIT

namespace mock {

struct Kernel {
    std::function<void(void**)> call;
    std::function<std::string(void**)> describe;
};

template <class T>
T argument(void** arguments, size_t index) {
    return *static_cast<const T*>(arguments[index]);
}

// What a test wants to know of an argument: where a seed comes from, and which pointers are null.
template <class T>
void describe(std::ostream& to, const T& value) {
    if constexpr (std::is_same_v<T, Dropout>) {
        to << " seed=" << (value.seed_address ? "address" : "value");
    } else if constexpr (std::is_same_v<T, Rows>) {
        to << " dimensions=" << value.dimensions;
    } else if constexpr (std::is_pointer_v<T>) {
        to << (value ? " pointer" : " null");
    }
}

template <class... P, size_t... I>
Kernel unpack(void (*kernel)(P...), std::index_sequence<I...>) {
    return {[kernel](void** arguments) { kernel(argument<P>(arguments, I)...); },
            [](void** arguments) {
                std::ostringstream text;
                (describe(text, argument<P>(arguments, I)), ...);
                return text.str();
            }};
}

template <class... P>
Kernel unpack(void (*kernel)(P...)) {
    return unpack(kernel, std::index_sequence_for<P...>{});
}

inline const std::map<std::string, Kernel>& kernels() {
    static const std::map<std::string, Kernel> table = {
#define KERNEL(NAME) {#NAME, unpack(NAME)},
#include "kernels.inc"
#undef KERNEL
    };
    return table;
}

}  // namespace mock
