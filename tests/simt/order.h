// Which accesses are ordered: vector clocks, folded so that a whole block is one entry. A thread's accesses
// carry its clock; what it has heard of others are entries "all accesses, up to this clock, of that thread,
// warp or block".
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <vector>

#include "simt.h"

namespace simt {

enum : std::uint32_t { WARP = 1u << 30, BLOCK = 1u << 31 };
struct Heard {
    std::uint64_t who;  // block << 32 | thread, WARP + warp, or BLOCK
    std::uint32_t clock;
};
using Clock = std::shared_ptr<const std::vector<Heard>>;  // sorted; null: nothing

inline Clock join(const Clock& a, const Clock& b) {
    if (a == b || !b) return a;
    if (!a) return b;
    auto both = std::make_shared<std::vector<Heard>>();
    for (auto i = a->begin(), j = b->begin(); i != a->end() || j != b->end();) {
        bool take_i = j == b->end() || (i != a->end() && i->who <= j->who);
        bool take_j = i == a->end() || (j != b->end() && j->who <= i->who);
        both->push_back({take_i ? i->who : j->who, std::max(take_i ? i->clock : 0, take_j ? j->clock : 0)});
        i += take_i, j += take_j;
    }
    return both;
}

// An access, as memory remembers it.
struct Epoch {
    std::uint32_t thread = 0;  // counted over all launches; 0: nobody
    std::uint32_t clock : 31 = 0, atomic : 1 = 0;
    bool operator==(const Epoch&) const = default;
};

// Of one launch: launches are ordered.
struct Shape {
    std::uint32_t first_id, threads;  // the first thread's Epoch::thread; threads per block
};

// What an atomic variable hands to those who read it: in its last writer's block, and elsewhere.
struct Published {
    Clock block, device;
    std::uint32_t owner = 0;
};

struct Ordering {
    std::uint32_t block, thread;  // linear indices
    std::uint32_t clock = 1;      // of the next access
    Clock now;                    // heard
    Clock released[2] = {},
          read[2] = {};  // published by the last fence; read but not yet fenced. [1]: by the device

    std::uint64_t name(std::uint32_t who) const { return std::uint64_t(block) << 32 | who; }
    Clock told() const {
        return join(now, std::make_shared<const std::vector<Heard>>(1, Heard{name(thread), clock}));
    }

    bool knows(Epoch e, Shape shape) const {
        if (e.thread < shape.first_id) return true;
        std::uint32_t i = e.thread - shape.first_id, b = i / shape.threads, t = i % shape.threads;
        if (b == block && t == thread) return true;
        if (!now) return false;
        auto before = [](const Heard& h, std::uint64_t name) { return h.who < name; };
        auto at = std::lower_bound(now->begin(), now->end(), std::uint64_t(b) << 32, before);
        for (; at != now->end() && at->who >> 32 == b; ++at) {
            auto part = std::uint32_t(at->who);
            if ((part == t || part == WARP + t / 32 || part == BLOCK) && at->clock >= e.clock) return true;
        }
        return false;
    }

    void fence(bool device) {
        for (int scope = 0; scope <= device; ++scope) now = join(now, read[scope]);
        for (int scope = 0; scope <= device; ++scope) released[scope] = told();
        ++clock;
    }

    // An atomic access to the variable that holds `slot`.
    void synchronise(Published& slot, int how) {
        bool foreign = slot.owner != block;
        Clock seen = foreign ? slot.device : slot.block, seen_by_others = slot.device;
        if (how & READ) {
            Clock& into = how & ACQUIRE ? now : read[foreign];
            into = join(into, seen);
        } else {
            seen = seen_by_others =
                nullptr;  // only a read-modify-write passes on what was published before it
        }
        if (!(how & WRITE)) return;
        if (how & RELEASE) {
            slot = {join(seen, told()), join(seen_by_others, told()), block};
            ++clock;
        } else {
            slot = {join(seen, released[0]), join(seen_by_others, released[1]), block};
        }
    }
};

// A barrier: all of `group` hear of each other. `whole`: it is all of a block (BLOCK) or of a warp (WARP +
// w); else 0.
inline void meet_all(const std::vector<Ordering*>& group, std::uint32_t whole) {
    std::uint32_t last = 0;
    Clock heard;
    for (Ordering* o : group) heard = join(heard, o->now), last = std::max(last, o->clock);
    auto kept = std::make_shared<std::vector<Heard>>(), news = std::make_shared<std::vector<Heard>>();
    auto superseded = [&](const Heard& h) {
        auto part = std::uint32_t(h.who);
        return h.who >> 32 == group[0]->block &&
               (whole == BLOCK || (part < WARP && WARP + part / 32 == whole));
    };
    if (heard) std::remove_copy_if(heard->begin(), heard->end(), std::back_inserter(*kept), superseded);
    if (whole) news->push_back({group[0]->name(whole), last});
    for (Ordering* o : group) {
        if (!whole) news->push_back({o->name(o->thread), o->clock});
        o->clock = whole ? last + 1 : o->clock + 1;
    }
    Clock joined = join(kept, news);
    for (Ordering* o : group) o->now = joined;
}

}  // namespace simt
