// A call as a struct, filled from the keywords of a Python call: the bind_*() of each operation lists its fields, a line
// a field. What is not given is 0, and an address of 0 an absent array.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

namespace stable_rlhf {

template <typename T>
void from_python(PyObject* value, T* field) {
    if constexpr (std::is_same_v<T, const char*>) {
        *field = PyUnicode_AsUTF8(value);
    } else if constexpr (std::is_pointer_v<T>) {
        *field = static_cast<T>(PyLong_AsVoidPtr(value));
    } else if constexpr (std::is_floating_point_v<T>) {
        *field = static_cast<T>(PyFloat_AsDouble(value));
    } else {  // whole numbers, truth values and enumerations
        *field = static_cast<T>(PyLong_AsLongLong(value));
    }
}

template <typename Call>
struct Field {
    const char* name;
    void (*set)(PyObject* value, Call* call);
};

template <typename Call, auto member>
void set_field(PyObject* value, Call* call) {
    from_python(value, &(call->*member));
}
#define STABLE_RLHF_FIELD(Call, name) {#name, set_field<Call, &Call::name>}

// A function of keywords alone, which are the fields of a Call. By hand and not by pybind11's dispatcher: calls of a few
// microseconds would feel it.
template <typename Call, typename Work>
class Function {
public:
    Function(const std::string& name, std::initializer_list<Field<Call>> fields, Work work) : name_(name), work_(work) {
        for (const Field<Call>& field : fields) entries_.push_back({PyUnicode_InternFromString(field.name), field.set});
        method_ = {name_.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Function::run)),
                   METH_FASTCALL | METH_KEYWORDS, nullptr};
    }

    pybind11::object python() {
        const pybind11::capsule self(this);
        return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method_, self.ptr()));
    }

private:
    struct Entry {
        PyObject* name;
        void (*set)(PyObject* value, Call* call);
    };

    static PyObject* run(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
        const Function& function = *static_cast<Function*>(PyCapsule_GetPointer(self, nullptr));
        try {
            if (positional > 0) throw pybind11::type_error(function.name_ + " takes keywords alone");
            const Call call = function.read(values, names);
            if constexpr (std::is_void_v<std::invoke_result_t<Work, const Call&>>) {
                pybind11::gil_scoped_release without;
                function.work_(call);
            } else {
                const auto result = [&] {
                    pybind11::gil_scoped_release without;
                    return function.work_(call);
                }();
                return pybind11::cast(result).release().ptr();
            }
        } catch (pybind11::error_already_set& error) {
            error.restore();
            return nullptr;
        } catch (const pybind11::builtin_exception& error) {
            error.set_error();
            return nullptr;
        } catch (const std::exception& error) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
            return nullptr;
        }
        Py_RETURN_NONE;
    }

    Call read(PyObject* const* values, PyObject* names) const {
        Call call{};
        const Py_ssize_t given = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
        size_t next = 0;
        for (Py_ssize_t i = 0; i < given; ++i) {
            PyObject* const name = PyTuple_GET_ITEM(names, i);
            const Entry& field = entry(name, &next);
            field.set(values[i], &call);
        }
        if (PyErr_Occurred()) throw pybind11::error_already_set();
        return call;
    }

    // Keywords mostly come in the order of the fields: the search begins behind the last one. Both are interned.
    const Entry& entry(PyObject* name, size_t* next) const {
        for (size_t i = 0; i < entries_.size(); ++i) {
            const size_t at = (*next + i) % entries_.size();
            if (entries_[at].name == name) {
                *next = at + 1;
                return entries_[at];
            }
        }
        throw pybind11::type_error(name_ + " has no field " + pybind11::cast<std::string>(name));
    }

    std::string name_;
    std::vector<Entry> entries_;
    Work work_;
    PyMethodDef method_;
};

// m.name(**fields) = work(call), the interpreter's lock released meanwhile.
template <typename Call, typename Work>
void define(pybind11::module_& m, const std::string& name, std::initializer_list<Field<Call>> fields, Work work) {
    m.attr(name.c_str()) = (new Function<Call, Work>(name, fields, work))->python();  // for as long as the module
}

}  // namespace stable_rlhf
