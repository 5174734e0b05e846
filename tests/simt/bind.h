// simt for pybind11: a Session is one Device whose buffers are NumPy arrays. A module's binding of a kernel
// reads
//
//     m.def("scale", [](py::dict options, py::array x, py::array y, float factor) {
//         simt::Session s(options);
//         const float* in = s.input<float>("x", x);
//         float* out = s.output<float>("y", y);
//         s.launch("scale", grid, block, 0, scale_kernel, in, out, x.size(), factor);
//         return s.report();
//     });
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "simt.h"

namespace simt {
namespace py = pybind11;
using namespace pybind11::literals;

class Session : public Device {
  public:
    // Keys, all optional: schedule, seed, resident_blocks, timeout, and misalign: {buffer's name: bytes}.
    explicit Session(const py::dict& options) : Device({}), given_(options.attr("copy")()) {
        take("schedule", this->options.schedule);
        take("seed", this->options.seed);
        take("resident_blocks", this->options.resident_blocks);
        take("timeout", this->options.timeout);
        take("misalign", misalign_);
        for (auto [key, value] : given_)
            throw std::invalid_argument("simt: no option '" + key.cast<std::string>() + "'");
    }

    template <class T>
    T* input(const std::string& name, const py::array& a) {
        return buffer<T>(name, a, true);
    }
    template <class T>  // what the kernels leave; nothing before
    T* output(const std::string& name, py::array& a) {
        T* p = buffer<T>(name, a, false);
        outputs_.push_back({p, a.mutable_data(), std::size_t(a.nbytes()), true});
        return p;
    }
    template <class T>
    T* inout(const std::string& name, py::array& a) {
        T* p = buffer<T>(name, a, true);
        outputs_.push_back({p, a.mutable_data(), std::size_t(a.nbytes()), false});
        return p;
    }
    template <class T>  // memory of the device's own: zeros, or nothing yet
    T* scratch(const std::string& name, std::size_t count, bool zeros = false) {
        return static_cast<T*>(allocate(name, count * sizeof(T), sizeof(T), zeros, misalign_[name]));
    }

    // Copies the outputs back, and tells what was found.
    py::dict report() {
        for (auto& o : outputs_) {
            if (o.must_be_written && faults.empty()) host_reads(o.device);
            std::memcpy(o.host, o.device, o.bytes);
        }
        py::list found;
        for (auto& f : faults)
            found.append(py::dict("kind"_a = f.kind, "kernel"_a = f.kernel, "address"_a = f.address,
                                  "message"_a = f.message,
                                  "block"_a = py::make_tuple(f.block.x, f.block.y, f.block.z),
                                  "thread"_a = py::make_tuple(f.thread.x, f.thread.y, f.thread.z),
                                  "pc"_a = f.pc, "count"_a = f.count));
        py::dict kernels;
        auto traffic = [](const Traffic& t) {
            return py::dict("requests"_a = t.requests, "bytes"_a = t.bytes, "sectors"_a = t.sectors);
        };
        for (auto& [name, c] : counts)
            kernels[name.c_str()] =
                py::dict("loads"_a = traffic(c.loads), "stores"_a = traffic(c.stores),
                         "atomics"_a = traffic(c.atomics), "shared_requests"_a = c.shared_requests,
                         "bank_conflicts"_a = c.bank_conflicts);
        return py::dict("faults"_a = found, "kernels"_a = kernels, "trace"_a = trace);
    }

  private:
    struct Output {
        const void* device;
        void* host;
        std::size_t bytes;
        bool must_be_written;
    };

    template <class T>
    T* buffer(const std::string& name, const py::array& a, bool filled) {
        if (a.itemsize() != sizeof(T) || !(a.flags() & py::array::c_style))
            throw std::invalid_argument(name + ": expected a C-contiguous array of " +
                                        std::to_string(sizeof(T)) + "-byte elements");
        void* p = allocate(name, a.nbytes(), sizeof(T), filled, misalign_[name]);
        if (filled) std::memcpy(p, a.data(), a.nbytes());
        return static_cast<T*>(p);
    }
    template <class T>
    void take(const char* key, T& value) {
        if (given_.contains(key)) value = given_.attr("pop")(key).cast<T>();
    }

    py::dict given_;
    std::map<std::string, std::size_t> misalign_;
    std::vector<Output> outputs_;
};

// Every module: tests/simt_build.py passes the linker's table of `__shared__` variables as (name, offset,
// bytes).
inline void bind(py::module_& m) {
    m.def("set_shared_variables",
          [](const std::vector<std::tuple<std::string, std::size_t, std::size_t>>& table) {
              std::vector<SharedVariable> variables;
              for (auto& [name, offset, bytes] : table) variables.push_back({name, offset, bytes});
              set_shared_variables(std::move(variables));
          });
}

}  // namespace simt
