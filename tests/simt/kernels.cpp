// The product's kernels on the execution model, for tests/test_cuda_kernels.py: launched as csrc/cuda/*.cu
// launch them, by the same geometry.
#include "accumulate.cuh"
#include "bind.h"
#include "channel_statistics.cuh"
#include "compact.cuh"
#include "contribution.cuh"
#include "relu_backward.cuh"

namespace py = pybind11;
using namespace taylored;
using namespace taylored::cuda;
using simt::Session;

// Calls f with a value of the element type of that name.
template <class F>
py::dict with_type(const std::string& type, F f) {
    if (type == "float64") return f(double{});
    if (type == "float32") return f(float{});
    if (type == "bfloat16") return f(__nv_bfloat16{});
    if (type == "float16") return f(__half{});
    throw std::invalid_argument("no dtype " + type);
}

template <class T>
T* optional_input(Session& s, const char* name, py::object array) {
    return array.is_none() ? nullptr : s.input<T>(name, array.cast<py::array>());
}
template <class T>
T* optional_output(Session& s, const char* name, py::object array) {
    if (array.is_none()) return nullptr;
    auto out = array.cast<py::array>();
    return s.output<T>(name, out);
}

// view: what map_view takes, of x. results: arrays for sum, squares and zeros.
template <template <class> class Op>
py::dict reduce(const py::dict& options, const std::string& type,
                const std::tuple<int64_t, int64_t, int64_t, bool>& view, py::array x, py::object g,
                py::object out, std::vector<py::array> results) {
    return with_type(type, [&](auto zero) {
        using T = decltype(zero);
        constexpr int sums = Op<T>::sums;
        Session s(options);
        const Maps<T> maps{s.input<T>("x", x), optional_input<T>(s, "g", g),
                           optional_output<T>(s, "out", out)};
        Results<Sum<T>> to{s.output<Sum<T>>("sum", results.at(0))};
        if constexpr (sums == 3) {
            to.squares = s.output<Sum<T>>("squares", results.at(1));
            to.zeros = s.output<long long>("zeros", results.at(2));
        }
        const auto addresses = reinterpret_cast<uint64_t>(maps.x) | reinterpret_cast<uint64_t>(maps.g) |
                               reinterpret_cast<uint64_t>(maps.out);
        const MapGrid grid = map_grid<T>(shape_of(std::apply(map_view, view)), sums, addresses % 16 == 0);
        if (grid.splits > 1) to.partial = s.scratch<Sum<T>>("partial", grid.partial_sums(sums));
        reduce_map<Op, T>(maps, grid, to,
                          [&](const char* name, int64_t blocks, auto kernel, auto... arguments) {
                              s.launch(name, blocks, kThreads, 0, kernel, arguments...);
                          });
        return s.report();
    });
}

// t: [N, units] each, float32 or float64.
py::dict accumulate_into(const py::dict& options, py::array total, std::vector<py::array> t,
                         int64_t reduction, double scale) {
    Session s(options);
    Consumers consumers{};
    for (const py::array& one : t) {
        const std::string name = "t" + std::to_string(consumers.count);
        consumers.is_double[consumers.count] = one.itemsize() == sizeof(double);
        consumers.t[consumers.count++] = one.itemsize() == sizeof(double)
                                             ? static_cast<const void*>(s.input<double>(name, one))
                                             : s.input<float>(name, one);
    }
    const auto run = [&](auto* out) {
        s.launch("accumulate", accumulate_blocks(total.size()), 32 * kPhases, 0,
                 accumulate<std::remove_pointer_t<decltype(out)>>, out, t.at(0).shape(0), total.size(),
                 consumers, Reduction{reduction}, scale);
    };
    if (total.itemsize() == sizeof(double))
        run(s.inout<double>("total", total));
    else
        run(s.inout<float>("total", total));
    return s.report();
}

// The cut of a C-contiguous tensor. index: kept indices by dimension, null where all is kept.
std::vector<Level> levels(const std::vector<int64_t>& sizes, int64_t item,
                          const std::vector<py::object>& keep, const std::vector<const int64_t*>& index) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * sizes[d];
    std::vector<Level> given(sizes.size());
    std::vector<const Level*> cut(sizes.size(), nullptr);
    for (size_t d = 0; d < sizes.size(); ++d) {
        if (!index[d]) continue;
        given[d] = {sizes[d], 0, index[d], int64_t(py::len(keep[d]))};
        cut[d] = &given[d];
    }
    return levels_of(sizes, strides, item, cut);
}

// x: arrays of one shape. keep: by dimension, or None where all is kept.
py::dict compact_arrays(const py::dict& options, std::vector<py::array> x,
                        const std::vector<py::object>& keep) {
    Session s(options);
    std::vector<const int64_t*> index;
    for (const py::object& one : keep)
        index.push_back(optional_input<int64_t>(s, ("keep" + std::to_string(index.size())).c_str(), one));
    const auto cuts = levels({x.at(0).shape(), x[0].shape() + x[0].ndim()}, x[0].itemsize(), keep, index);

    CompactTensors tensors{};
    uint64_t addresses = 0;
    with_word(x[0].itemsize(), [&](auto item) {
        for (size_t i = 0; i < x.size(); ++i) {
            tensors.data[i] = s.inout<decltype(item)>("x" + std::to_string(i), x[i]);
            addresses |= reinterpret_cast<uint64_t>(tensors.data[i]);
        }
    });
    with_word(word_bytes(cuts, addresses), [&](auto word) {
        using Word = decltype(word);
        const Compaction cut = compaction(cuts, sizeof(Word), kTileWords<Word>);
        const int64_t blocks = cut.tiles * x.size();
        auto* control = s.scratch<unsigned>("control", blocks + 1, true);
        s.launch("compact", blocks, kCompactThreads, 0, compact<Word>, cut, tensors, control);
    });
    return s.report();
}

// (source, before) of element j of the result, for a tensor of any size: no memory of its own.
std::pair<int64_t, int64_t> compact_offsets(const std::vector<int64_t>& sizes,
                                            const std::vector<py::object>& keep, int64_t j) {
    std::vector<const int64_t*> index;
    for (const py::object& one : keep)
        index.push_back(one.is_none() ? nullptr : one.cast<py::array_t<int64_t>>().data());
    const Compaction cut = compaction(levels(sizes, 1, keep, index), 1, kTileWords<uint8_t>);
    return {cut.source(j), cut.before(cut.source(j))};
}

PYBIND11_MODULE(kernels, m) {
    simt::bind(m);
    m.def("contribution", reduce<Contribution>);
    m.def("relu_backward", reduce<ReluBackward>);
    m.def("channel_statistics", reduce<Statistics>);
    m.def("accumulate_", accumulate_into);
    m.def("compact_", compact_arrays);
    m.def("compact_offsets", compact_offsets);
}
