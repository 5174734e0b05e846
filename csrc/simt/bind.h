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

class Session : public Device {
  public:
    // Keys, all optional: schedule, seed, resident_blocks, timeout, and misalign: {buffer's name: bytes}.
    explicit Session(const py::dict& options) : Device(parse(options)) {
        if (options.contains("misalign"))
            misalign_ = options["misalign"].cast<std::map<std::string, std::size_t>>();
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
        for (auto& f : faults) {
            py::dict d;
            d["kind"] = f.kind, d["kernel"] = f.kernel, d["address"] = f.address, d["message"] = f.message;
            d["block"] = py::make_tuple(f.block.x, f.block.y, f.block.z);
            d["thread"] = py::make_tuple(f.thread.x, f.thread.y, f.thread.z);
            d["pc"] = f.pc, d["count"] = f.count;
            found.append(d);
        }
        py::dict kernels, result;
        for (auto& [name, c] : counts) {
            py::dict d;
            d["loads"] = traffic(c.loads), d["stores"] = traffic(c.stores), d["atomics"] = traffic(c.atomics);
            d["shared_requests"] = c.shared_requests, d["bank_conflicts"] = c.bank_conflicts;
            kernels[name.c_str()] = d;
        }
        result["faults"] = found, result["kernels"] = kernels, result["trace"] = trace;
        return result;
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
    static Options parse(const py::dict& given) {
        Options o;
        for (auto [key, value] : given) {
            auto k = key.cast<std::string>();
            if (k == "schedule") {
                o.schedule = value.cast<std::string>();
            } else if (k == "seed") {
                o.seed = value.cast<std::uint64_t>();
            } else if (k == "resident_blocks") {
                o.resident_blocks = value.cast<unsigned>();
            } else if (k == "timeout") {
                o.timeout = value.cast<double>();
            } else if (k != "misalign") {
                throw std::invalid_argument("simt: no option '" + k + "'");
            }
        }
        return o;
    }
    static py::dict traffic(const Traffic& t) {
        py::dict d;
        d["requests"] = t.requests, d["bytes"] = t.bytes, d["sectors"] = t.sectors;
        return d;
    }

    std::map<std::string, std::size_t> misalign_;
    std::vector<Output> outputs_;
};

// Every module: tests/simt.py passes the linker's table of `__shared__` variables as (name, offset, bytes).
inline void bind(py::module_& m) {
    m.def("set_shared_variables",
          [](const std::vector<std::tuple<std::string, std::size_t, std::size_t>>& table) {
              std::vector<SharedVariable> variables;
              for (auto& [name, offset, bytes] : table) variables.push_back({name, offset, bytes});
              set_shared_variables(std::move(variables));
          });
}

}  // namespace simt
