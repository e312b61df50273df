// cogsym._C: the CPU kernels for Python. Tensors arrive as addresses, shapes and strides in elements, so that one build
// serves every version of torch; the operations' files in cogsym/ops check them, and nothing else should call this.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "kernels.h"

// From setup.py: COGSYM_VARIANTS(V) is V(baseline) V(avx2) ..., COGSYM_FILES(F, isa) is F(rms_norm, isa) ...
#define COGSYM_DECLARE_FILE(file, isa) extern const Kernel file##_kernels[];
#define COGSYM_DECLARE(isa)                \
    namespace isa {                        \
    COGSYM_FILES(COGSYM_DECLARE_FILE, isa) \
    }
#define COGSYM_FILE_ENTRY(file, isa) isa::file##_kernels,
#define COGSYM_ENTRY(isa) {#isa, supports_##isa, {COGSYM_FILES(COGSYM_FILE_ENTRY, isa)}},
#define COGSYM_COUNT(file, isa) +1

namespace py = pybind11;

namespace cogsym {

COGSYM_VARIANTS(COGSYM_DECLARE)

namespace {

constexpr std::size_t file_count = 0 COGSYM_FILES(COGSYM_COUNT, );

struct Variant {
    const char* name;
    bool (*supported)();
    const Kernel* files[file_count];
};

const Variant variants[] = {COGSYM_VARIANTS(COGSYM_ENTRY)};  // from the slowest to the fastest

const Variant* fastest() {
    const Variant* best = variants;
    for (const Variant& v : variants)
        if (v.supported()) best = &v;
    return best;
}

const Variant* active = fastest();

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Variant& v : variants)
        if (v.supported()) names.push_back(v.name);
    return names;
}

void set_isa(const std::string& name) {
    for (const Variant& v : variants)
        if (name == v.name && v.supported()) {
            active = &v;
            return;
        }
    throw std::invalid_argument("the extension has no variant '" + name + "' that this processor runs");
}

// A kernel for Python, in whatever variant is active.
struct Function {
    const Kernel* described;  // in the slowest variant
    std::size_t file, place;
    std::size_t argument_count;
    std::string text;  // Python's signature, and what it computes
    PyMethodDef method;

    const Kernel& kernel() const { return active->files[file][place]; }
};

constexpr std::size_t most_bytes = 512;  // of a kernel's struct

// The thread's own memory of at least so many bytes, or null where there is not so much.
void* scratch_of(int64_t bytes, std::unique_ptr<char[]>& large) {
    // The C library returns blocks of more than 32 MiB to the system at once, and getting their pages anew costs a
    // third of the time at a few thousand tokens. So a thread keeps one, up to a size beyond which they matter less.
    constexpr int64_t most_kept = 64 << 20, alignment = 64;
    static thread_local std::unique_ptr<char[]> kept;
    static thread_local int64_t kept_bytes = 0;
    std::unique_ptr<char[]>& from = bytes > most_kept ? large : kept;
    if (bytes > most_kept || bytes > kept_bytes || !kept) {
        from.reset(new (std::nothrow) char[std::size_t(bytes + alignment)]);
        if (bytes <= most_kept) kept_bytes = from ? bytes : 0;
    }
    if (!from) return nullptr;
    const auto address = reinterpret_cast<std::uintptr_t>(from.get());
    return reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
}

// Writes a Python value into its field; false with a Python exception set where it is none for it.
bool read(const Field& field, PyObject* value, char* arguments) {
    char* const to = arguments + field.offset;
    const auto put = [&](auto x) { std::memcpy(to, &x, sizeof x); };
    switch (field.kind) {
        case Field::Kind::address: {
            const unsigned long long address = PyLong_AsUnsignedLongLong(value);
            if (address == static_cast<unsigned long long>(-1) && PyErr_Occurred()) return false;
            put(reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)));
            return true;
        }
        case Field::Kind::integer: {
            const bool several = field.count > 1;
            if (several && !(PyTuple_Check(value) && PyTuple_GET_SIZE(value) == field.count)) {
                PyErr_Format(PyExc_TypeError, "%s is not a tuple of %zd integers", field.name, Py_ssize_t(field.count));
                return false;
            }
            for (int64_t i = 0; i < field.count; ++i) {
                const int64_t x = PyLong_AsLongLong(several ? PyTuple_GET_ITEM(value, i) : value);
                if (x == -1 && PyErr_Occurred()) return false;
                std::memcpy(to + i * int64_t(sizeof x), &x, sizeof x);
            }
            return true;
        }
        case Field::Kind::small_integer:
        case Field::Kind::choice: {
            const long x = PyLong_AsLong(value);
            if (x == -1 && PyErr_Occurred()) return false;
            if (field.kind == Field::Kind::choice && (x < 0 || x >= field.count)) {
                PyErr_Format(PyExc_ValueError, "%s is %ld, expected 0 to %d", field.name, x, int(field.count) - 1);
                return false;
            }
            put(int(x));
            return true;
        }
        case Field::Kind::number: {
            const double x = PyFloat_AsDouble(value);
            if (x == -1.0 && PyErr_Occurred()) return false;
            put(x);
            return true;
        }
        case Field::Kind::flag: {
            const int x = PyObject_IsTrue(value);
            if (x < 0) return false;
            put(x == 1);
            return true;
        }
        case Field::Kind::scratch: return true;
    }
    return true;
}

// What Python calls. True where it was computed; a kernel says when it is not.
PyObject* call_kernel(PyObject* self, PyObject* const* values, Py_ssize_t count) {
    const auto& function = *static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr));
    const Kernel& kernel = function.kernel();
    if (count != Py_ssize_t(function.argument_count))
        return PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, %zd were given", kernel.name,
                            Py_ssize_t(function.argument_count), count);
    alignas(16) char arguments[most_bytes] = {};
    const Field* scratch = nullptr;
    for (const Field* field = kernel.fields; field < kernel.fields + kernel.field_count; ++field) {
        if (field->kind == Field::Kind::scratch)
            scratch = field;
        else if (!read(*field, *values++, arguments))
            return nullptr;
    }
    int64_t bytes = 0;
    std::unique_ptr<char[]> large;
    bool memory = true;
    Py_BEGIN_ALLOW_THREADS;
    bytes = kernel.run(arguments);
    if (scratch && bytes >= 0) {
        void* const place = scratch_of(bytes, large);
        memory = place != nullptr;
        std::memcpy(arguments + scratch->offset, &place, sizeof place);
        if (memory) kernel.run(arguments);
    }
    Py_END_ALLOW_THREADS;
    if (!memory) return PyErr_NoMemory();
    return PyBool_FromLong(bytes >= 0);
}

std::deque<Function>& functions() {
    static std::deque<Function> all;  // stays where it is: Python holds pointers to it
    return all;
}

std::string type_of(const Field& field) {
    switch (field.kind) {
        case Field::Kind::address: return "address";
        case Field::Kind::number: return "float";
        case Field::Kind::flag: return "bool";
        case Field::Kind::integer: return field.count == 1 ? "int" : "tuple[int, ...]";
        default: return "int";
    }
}

using Signature = std::vector<std::tuple<std::string, std::string>>;

// (kernel, what it computes, its arguments as (name, type)), from which cogsym/_C.pyi is written. An address is an int.
std::vector<std::tuple<std::string, std::string, Signature>> signatures() {
    std::vector<std::tuple<std::string, std::string, Signature>> all;
    for (const Function& function : functions()) {
        const Kernel& kernel = *function.described;
        Signature arguments;
        for (std::size_t i = 0; i < kernel.field_count; ++i)
            if (const Field& field = kernel.fields[i]; field.kind != Field::Kind::scratch)
                arguments.emplace_back(field.name, type_of(field));
        all.emplace_back(kernel.name, kernel.text, arguments);
    }
    return all;
}

void add_kernels(py::module_& m) {
    for (std::size_t file = 0; file < file_count; ++file)
        for (const Kernel* kernel = variants[0].files[file]; kernel->name; ++kernel) {
            if (kernel->size > most_bytes) throw std::length_error(std::string(kernel->name) + " takes a larger struct");
            functions().push_back({kernel, file, std::size_t(kernel - variants[0].files[file]), 0, kernel->name, {}});
            Function& function = functions().back();
            const char* before = "(";
            for (std::size_t i = 0; i < kernel->field_count; ++i)
                if (kernel->fields[i].kind != Field::Kind::scratch) {
                    function.text += before + std::string(kernel->fields[i].name);
                    ++function.argument_count;
                    before = ", ";
                }
            function.text += std::string(", /)\n--\n\n") + kernel->text;
            const auto call = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_kernel));
            function.method = {kernel->name, call, METH_FASTCALL, function.text.c_str()};
            const auto self = py::reinterpret_steal<py::object>(PyCapsule_New(&function, nullptr, nullptr));
            const auto name = py::str("cogsym._C");
            m.attr(kernel->name) = py::reinterpret_steal<py::object>(
                PyCFunction_NewEx(&function.method, self.ptr(), name.ptr()));
        }
}

}  // namespace
}  // namespace cogsym

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    using namespace cogsym;
    using py::arg;

    m.doc() = "CPU kernels of cogsym, called by cogsym.ops with addresses, shapes and strides in elements.";
    m.attr("DTYPES") = py::make_tuple("float32", "bfloat16", "float16", "float64");  // place: the dtype code
#ifdef _OPENMP
    m.attr("OPENMP") = true;
#else
    m.attr("OPENMP") = false;
#endif
    m.def("cpu_features", &cpu_features, "Vector and matrix extensions that this processor has.");
    m.def("isas", &isas, "Variants of the kernels that this processor runs, from the slowest to the fastest.");
    m.def("isa", [] { return active->name; }, "The variant in use.");
    m.def("set_isa", &set_isa, arg("name"), "Use another variant; ValueError where this processor cannot run it.");
    m.def("signatures", &signatures, "(name, what it computes, [(argument, type)]) of every kernel.");
    add_kernels(m);
}
