// How a kernel file describes its kernels: a table of fields for each, and at its end, FILE being its name,
//
//     COGSYM_KERNELS(FILE) = {kernel<function>("name", "text", fields), ..., {}};
#pragma once

#include "kernels.h"

namespace cogsym {
namespace COGSYM_ISA {

template <class T>
struct Described;
template <class T>
struct Described<T*> {
    static constexpr Field::Kind kind = Field::Kind::address;
    static constexpr int64_t count = 1;
};
template <>
struct Described<int64_t> {
    static constexpr Field::Kind kind = Field::Kind::integer;
    static constexpr int64_t count = 1;
};
template <std::size_t n>
struct Described<int64_t[n]> {
    static constexpr Field::Kind kind = Field::Kind::integer;
    static constexpr int64_t count = int64_t(n);
};
template <>
struct Described<int> {
    static constexpr Field::Kind kind = Field::Kind::small_integer;
    static constexpr int64_t count = 1;
};
template <>
struct Described<double> {
    static constexpr Field::Kind kind = Field::Kind::number;
    static constexpr int64_t count = 1;
};
template <>
struct Described<bool> {
    static constexpr Field::Kind kind = Field::Kind::flag;
    static constexpr int64_t count = 1;
};
template <>
struct Described<Scratch> {
    static constexpr Field::Kind kind = Field::Kind::scratch;
    static constexpr int64_t count = 1;
};
template <class E>
struct Described {
    static_assert(choices<E> > 0, "kernels.h has no kind for this type");
    static constexpr Field::Kind kind = Field::Kind::choice;
    static constexpr int64_t count = choices<E>;
};

#define COGSYM_FIELD(Arguments, field)                                                             \
    ::cogsym::Field {                                                                              \
        #field, Described<decltype(Arguments::field)>::kind, offsetof(Arguments, field),           \
            Described<decltype(Arguments::field)>::count                                           \
    }

// A kernel by the address of its struct.
template <auto function>
struct Erased;
template <class A, void (*function)(const A&)>
struct Erased<function> {
    using Arguments = A;
    static int64_t run(const void* arguments) {
        function(*static_cast<const A*>(arguments));
        return 0;
    }
};
template <class A, int64_t (*function)(const A&)>
struct Erased<function> {
    using Arguments = A;
    static int64_t run(const void* arguments) { return function(*static_cast<const A*>(arguments)); }
};

template <auto function, std::size_t n>
constexpr Kernel kernel(const char* name, const char* text, const Field (&fields)[n]) {
    using Function = Erased<function>;
    return {name, text, Function::run, sizeof(typename Function::Arguments), fields, n};
}

#define COGSYM_KERNELS(file)               \
    extern const Kernel file##_kernels[]; \
    constexpr Kernel file##_kernels[]

}  // namespace COGSYM_ISA
}  // namespace cogsym
