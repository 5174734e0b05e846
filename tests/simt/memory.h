// A buffer and what is remembered of its use: who wrote and who read each piece of it last.
#pragma once

#include <sys/mman.h>

#include <new>
#include <unordered_map>
#include <utility>

#include "order.h"

namespace simt {

constexpr std::size_t guard_bytes = 64 << 20;  // unused addresses on both sides of a buffer
constexpr unsigned char rubbish = 0xff;  // what memory holds before it is written: a NaN, an index of -1

inline char* reserve(std::size_t bytes) {
    void* p =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(p);
}

// Two reads: a third one replaces one that it is ordered after, or else either.
struct Cell {
    Epoch write, reads[2];
};

struct Region {
    std::string name;
    char* base;
    std::size_t bytes, grain;  // grain: bytes per cell, as coarse as the accesses allow
    bool shared, filled;       // filled: by the host
    Cell* cells;
    bool touched = false;
    std::unordered_map<const void*, Published> published = {};  // by this launch's atomics

    Region(std::string name, char* base, std::size_t bytes, std::size_t grain, bool shared, bool filled)
        : name(std::move(name)), base(base), bytes(bytes), grain(grain), shared(shared), filled(filled) {
        cells = reinterpret_cast<Cell*>(reserve(count() * sizeof(Cell)));
    }
    Region(const Region&) = delete;
    ~Region() { munmap(cells, count() * sizeof(Cell)); }

    std::size_t count() const { return bytes / grain + 1; }
    bool holds(const char* p, std::size_t n) const { return p >= base && p + n <= base + bytes; }
    bool is_near(const char* p) const { return p >= base - guard_bytes && p < base + bytes + guard_bytes; }
    std::string at(const char* p) const { return name + (p < base ? "" : "+") + std::to_string(p - base); }

    // Enters an access; calls `fault(kind, address, the other access or null, whether that one wrote)`.
    template <class F>
    void enter(const Ordering& by, Epoch self, Shape shape, const char* p, std::size_t n, int how, F fault) {
        std::size_t offset = p - base;
        if ((offset | n) % grain) refine(std::size_t(1) << std::countr_zero(offset | n));
        touched = true;
        auto clashes = [&](Epoch e) {
            return e != self && !(e.atomic && self.atomic) && !by.knows(e, shape);
        };
        for (Cell* c = cells + offset / grain; c < cells + (offset + n) / grain; ++c, p += grain) {
            if (clashes(c->write)) fault("data race", p, &c->write, true);
            if (how & WRITE)
                for (Epoch& e : c->reads)
                    if (clashes(e)) fault("data race", p, &e, false);
            if ((how & READ) && !c->write.thread && !filled) fault("uninitialised read", p, nullptr, false);
            if (how & WRITE) {
                *c = {self, {}};
            } else if (c->reads[0] != self) {
                c->reads[!by.knows(c->reads[0], shape) && (by.knows(c->reads[1], shape) || self.thread % 2)] =
                    self;
            }
        }
    }

  private:
    void refine(std::size_t finer) {
        Region fine(name, base, bytes, finer, shared, filled);
        for (std::size_t i = 0; touched && i < fine.count(); ++i) fine.cells[i] = cells[i * finer / grain];
        std::swap(cells, fine.cells);
        std::swap(grain, fine.grain);
    }
};

}  // namespace simt
