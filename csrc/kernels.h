// What the kernels and their door, module.cpp, both know: element types, and how a kernel is described. No Python, no
// torch.
//
// A kernel takes a struct of addresses, shapes and strides (in elements). Its file, csrc/<operation>.cpp, describes the
// struct's fields in a table (declare.h), which the door reads: it makes the function that Python calls, and the stub
// cogsym/_C.pyi. setup.py finds the files; nothing lists them.
//
// Each kernel file is compiled once for every instruction set in COGSYM_VARIANTS, inside a namespace of that name, and
// the door picks the tables of one at run time. So a kernel file must not instantiate templates or inline functions of
// the standard library: the linker would keep one copy, perhaps the one with AVX-512 in it, for every caller. For the
// same reason a table is a constant: nothing runs before a variant is known to suit the processor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cogsym {

enum class DType : int { float32, bfloat16, float16, float64 };

// How many values an enum has that Python names by its place in a list.
template <class E>
constexpr int choices = 0;
template <>
inline constexpr int choices<DType> = 4;

// Memory to work in, as much as the kernel returned when it was called with none; that call does nothing else.
struct Scratch {
    void* memory;
    explicit operator bool() const { return memory != nullptr; }
};

// A field of the struct that a kernel takes.
struct Field {
    enum class Kind { address, integer, small_integer, number, flag, choice, scratch };
    const char* name;
    Kind kind;
    std::size_t offset;
    int64_t count;  // of integers: how many, in a tuple if it is more than one; of choices: among how many
};

struct Kernel {
    const char* name;
    const char* text;                 // what it computes, for Python's help
    int64_t (*run)(const void*);      // of the struct; bytes of scratch, or negative: not computed
    std::size_t size;                 // of the struct
    const Field* fields;              // in the order of Python's arguments, scratch left out
    std::size_t field_count;
};

}  // namespace cogsym
