// The machine behind simt.h: fibers, scheduler, happens-before checker and traffic counters. This file is compiled
// without instrumentation; the kernels' side is compiled with -fsanitize=thread but linked without its run-time
// library, and so calls the __tsan_ functions at the end of this file before every access to memory.
#include "simt.h"

#include <sys/mman.h>
#include <sys/time.h>

#include <csignal>
#include <cstdlib>
#include <deque>
#include <functional>
#include <random>
#include <set>
#include <stdexcept>
#include <unordered_map>
#include <utility>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], _end[];  // from the linker: this module's image
extern "C" void simt_switch(void** save, void* to);

// Saves the callee's registers on the stack that is left, restores them from the one that is entered.
asm(R"(
.text
.type simt_switch,@function
.hidden simt_switch
.globl simt_switch
simt_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");

namespace simt {

thread_local char shared_anchor;

namespace {

constexpr std::size_t stack_bytes = 64 << 10, guard_bytes = 64 << 20;
constexpr unsigned idle_rounds = 100;   // how often all who wait may look again at what nobody changed
constexpr unsigned quantum = 100'000;   // accesses after which a thread that never waits lets others run
constexpr unsigned rarity = 8;          // a hostile schedule preempts at one access in so many
constexpr unsigned char rubbish = 0xff;  // what memory holds before it is written: a NaN, an index of -1
constexpr std::size_t max_faults = 64;

void* reserve(std::size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return p;
}

// ---- Happens-before. Every access carries its thread's clock. A Clock is what a thread has heard of others: all
// ---- accesses, up to some clock, of one thread, of a whole warp or of a whole block.
enum : std::uint32_t { WARP = 1u << 30, BLOCK = 1u << 31 };
struct Heard {
    std::uint64_t who;  // block << 32 | thread, WARP + warp or BLOCK
    std::uint32_t clock;
};
using Clock = std::shared_ptr<const std::vector<Heard>>;  // sorted; null: nothing

std::uint64_t name_of(std::uint32_t block, std::uint32_t who) { return std::uint64_t(block) << 32 | who; }

Clock join(const Clock& a, const Clock& b) {
    if (a == b || !b) return a;
    if (!a) return b;
    auto both = std::make_shared<std::vector<Heard>>();
    for (auto i = a->begin(), j = b->begin(); i != a->end() || j != b->end();) {
        if (j == b->end() || (i != a->end() && i->who < j->who)) {
            both->push_back(*i++);
        } else if (i == a->end() || j->who < i->who) {
            both->push_back(*j++);
        } else {
            both->push_back({i->who, std::max(i->clock, j->clock)});
            ++i, ++j;
        }
    }
    return both;
}

struct Epoch {
    std::uint32_t thread = 0;  // counted over all launches; 0: nobody
    std::uint32_t clock : 31 = 0, atomic : 1 = 0;
};
// What is remembered of a piece of memory: its last write, and two reads since.
struct Cell {
    Epoch write, reads[2];
};

struct Region {
    std::string name;
    char* base;
    std::size_t bytes, grain;  // grain: bytes per cell, as coarse as the accesses allow
    bool shared, filled;       // filled: by the host
    Cell* cells = static_cast<Cell*>(reserve(count() * sizeof(Cell)));
    bool touched = false;

    Region(std::string name, char* base, std::size_t bytes, std::size_t grain, bool shared, bool filled)
        : name(std::move(name)), base(base), bytes(bytes), grain(grain), shared(shared), filled(filled) {}
    Region(const Region&) = delete;
    ~Region() { munmap(cells, count() * sizeof(Cell)); }
    std::size_t count() const { return bytes / grain + 1; }
    bool holds(const char* p, std::size_t n) const { return p >= base && p + n <= base + bytes; }

    void refine(std::size_t finer) {
        Region fine(name, base, bytes, finer, shared, filled);
        for (std::size_t i = 0; touched && i < fine.count(); ++i) fine.cells[i] = cells[i * finer / grain];
        std::swap(cells, fine.cells);
        std::swap(grain, fine.grain);
    }
};

// ---- Threads, warps, blocks.
enum State { READY, WAITING, AT_BARRIER, IN_WARP, DONE };  // WAITING: for a change of memory

struct Block;
struct Warp;
struct Fiber {
    Block* block;
    Warp* warp;
    std::uint32_t id, thread;  // id: as in Epoch; thread: linear index in the block
    unsigned lane;
    uint3 index;
    char* stack;
    void* sp;
    State state = READY;
    unsigned accesses = 0;                        // since it last gave way
    std::vector<std::uintptr_t> calls;            // hashes of the call stack: an instruction is named with its callers
    std::uint32_t clock = 1;                      // of its next access
    Clock now, released[2], read[2];              // heard; published by a fence; read but not yet fenced. [1]: by the device
    const void* polled = nullptr;                 // the atomic it looked at last
    std::uint64_t polled_at = 0;                  // ... and the state of memory then
    int barrier_line = 0;
    Collective meeting = SYNC;
    unsigned mask = 0, met = 0;
    std::uint64_t word = 0, words[32];
};

struct Request {
    unsigned lanes = 0;
    std::uint64_t address[32];
    std::uint32_t bytes[32];
};
enum Class { LOAD, STORE, ATOMICS, SHARED };
struct Site {
    std::uint32_t executed[32] = {}, closed = 0;  // by each lane; requests that are counted already
    std::deque<Request> open;
};
struct Warp {
    std::vector<Fiber*> lanes;
    std::unordered_map<std::uint64_t, Site> sites;  // by instruction * 4 + class
};

struct StaticShared {
    std::unique_ptr<Region> region;
    std::vector<char> saved;  // its content while another block runs
};
struct Block {
    std::uint32_t linear;
    uint3 index;
    std::deque<Fiber> threads;
    std::deque<Warp> warps;
    unsigned arrived = 0, exited = 0;
    std::map<const SharedVariable*, StaticShared> statics;
    std::unique_ptr<Region> dynamic;
    ~Block() {
        if (dynamic) munmap(dynamic->base - guard_bytes, dynamic->bytes + 2 * guard_bytes);
    }
};

// What an atomic variable hands to those who read it: in its writer's block, and elsewhere.
struct Published {
    Clock block, device;
    std::uint32_t owner = 0;
};

std::vector<SharedVariable> shared_variables;  // sorted
char* shared_begin = nullptr;

}  // namespace

struct Memory {
    std::map<const char*, std::unique_ptr<Region>> regions;  // by base
    std::uint32_t next_id = 1;
};

namespace {

struct Launch {
    Device& device;
    Memory& memory;
    std::string name;
    std::function<void()> kernel;
    const char* call;
    std::size_t call_bytes, dynamic_bytes;
    std::uint32_t threads, first_id;  // per block; of thread 0 of block 0
    Counts& counts;
    std::mt19937_64 random;
    enum { ASCENDING, REVERSE, RANDOM, AHEAD, BEHIND } schedule;

    std::deque<std::uint32_t> coming;  // blocks that have not started
    std::vector<std::unique_ptr<Block>> resident;
    std::vector<char*> stacks;
    std::set<std::tuple<std::uint64_t, std::uint32_t, Fiber*>> ready;  // by priority, id
    std::vector<Fiber*> waiting;
    std::uint64_t progress = 1, woken_at = 1;  // progress: changes of memory so far
    unsigned idle = 0;
    std::unordered_map<const void*, Published> published;
    std::set<std::pair<std::string, std::uintptr_t>> reported;
    Block* loaded = nullptr;  // whose static shared memory is in place
    void* scheduler = nullptr;
    bool aborted = false;

    std::uint64_t priority(const Fiber& f) {
        // A preempted thread draws anew.
        bool favourite = f.thread / 32 == device.options.seed % ((threads + 31) / 32);
        if (schedule == ASCENDING) return f.id;
        if (schedule == REVERSE) return ~std::uint64_t(f.id);
        if (schedule == RANDOM || !favourite) return random() >> 1 | 1;
        return schedule == AHEAD ? 0 : ~std::uint64_t(0);
    }
    void make_ready(Fiber* f) {
        f->state = READY;
        ready.insert({priority(*f), f->id, f});
    }
    void wake() {
        for (Fiber* f : std::exchange(waiting, {})) make_ready(f);
        woken_at = progress;
    }
    void admit(std::uint32_t linear);
    void put_in_place(Block* b);
    void step();
    void retire(Fiber* f);
    void stuck();
};

Launch* running = nullptr;
Fiber* current = nullptr;  // null: the host's own code
// The timer must not interrupt the machine itself; then it only leaves a note.
volatile std::sig_atomic_t busy = 1, expired = 0;

std::string text(uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}
std::string text(const Region& r, const char* p) { return r.name + (p < r.base ? "" : "+") + std::to_string(p - r.base); }
uint3 unravel(std::uint32_t i, dim3 d) { return {i % d.x, i / d.x % d.y, i / d.x / d.y}; }

void report(const std::string& kind, const Fiber& f, std::uintptr_t pc, const std::string& address, const std::string& message) {
    auto& faults = running->device.faults;
    if (!running->reported.insert({kind, pc}).second) {
        for (auto& old : faults) old.count += old.kind == kind && old.pc == pc && old.kernel == running->name;
    } else if (faults.size() < max_faults) {
        faults.push_back({kind, running->name, address, message, f.block->index, f.index, pc, 1});
    }
}

void pause(State state) {
    Fiber* f = current;
    f->state = state;
    f->accesses = 0;
    if (state == WAITING) running->waiting.push_back(f);
    if (state == READY) running->make_ready(f);
    simt_switch(&f->sp, running->scheduler);
}

// After a fault that leaves nothing sensible to go on with. A kernel's fibers own nothing: they are just dropped.
void abort_launch() {
    running->aborted = true;
    if (current) simt_switch(&current->sp, running->scheduler);
}

struct Busy {  // the machine works on behalf of the current fiber
    Busy() { busy = 1; }
    ~Busy() {
        if (expired) time_out();
        busy = 0;
    }
    static void time_out() {
        report("time-out", *current, 0, "", "the launch ran longer than its limit");
        abort_launch();
    }
};

void on_timer(int) {
    if (!busy) Busy::time_out();
    expired = 1;
}

void fiber_main() {
    busy = 0;
    running->kernel();
    busy = 1;
    pause(DONE);
}

// ---- Order between threads.
Clock told(const Fiber& f) {
    Heard self{name_of(f.block->linear, f.thread), f.clock};
    return join(f.now, std::make_shared<const std::vector<Heard>>(1, self));
}

bool knows(const Fiber& f, Epoch e) {
    if (e.thread < running->first_id || e.thread == f.id) return true;
    if (!f.now) return false;
    std::uint32_t i = e.thread - running->first_id, block = i / running->threads, thread = i % running->threads;
    auto who = [](const Heard& h, std::uint64_t name) { return h.who < name; };
    auto at = std::lower_bound(f.now->begin(), f.now->end(), name_of(block, 0), who);
    for (; at != f.now->end() && at->who >> 32 == block; ++at) {
        auto part = std::uint32_t(at->who);
        if ((part == thread || part == WARP + thread / 32 || part == BLOCK) && at->clock >= e.clock) return true;
    }
    return false;
}

// All of `group` have heard of each other. `whole`: it is all of a block (BLOCK) or of a warp (WARP + w); else 0.
void order(const std::vector<Fiber*>& group, std::uint32_t whole) {
    std::uint32_t block = group[0]->block->linear, last = 0;
    Clock heard;
    for (Fiber* f : group) heard = join(heard, f->now), last = std::max(last, f->clock);
    auto all = std::make_shared<std::vector<Heard>>(), news = std::make_shared<std::vector<Heard>>();
    auto superseded = [&](const Heard& h) {
        auto part = std::uint32_t(h.who);
        return h.who >> 32 == block && (whole == BLOCK || (part < WARP && WARP + part / 32 == whole));
    };
    if (heard) std::remove_copy_if(heard->begin(), heard->end(), std::back_inserter(*all), superseded);
    if (whole) news->push_back({name_of(block, whole), last});
    for (Fiber* f : group) {
        if (!whole) news->push_back({name_of(block, f->thread), f->clock});
        f->clock = whole ? last + 1 : f->clock + 1;
    }
    Clock joined = join(all, news);
    for (Fiber* f : group) f->now = joined;
}

void synchronise(Fiber& f, const void* p, int how) {
    Published& slot = running->published[p];
    Clock before_block = slot.owner == f.block->linear ? slot.block : slot.device, before_device = slot.device;
    if (how & READ) {
        Clock& into = how & ACQUIRE ? f.now : f.read[slot.owner != f.block->linear];
        into = join(into, before_block);
    }
    if (!(how & WRITE)) return;
    Clock mine[2] = {f.released[0], f.released[1]};
    if (how & RELEASE) mine[0] = mine[1] = told(f), ++f.clock;
    bool chain = how & READ;  // a read-modify-write passes on what was published before it
    slot = {chain ? join(before_block, mine[0]) : mine[0], chain ? join(before_device, mine[1]) : mine[1], f.block->linear};
}

// ---- Traffic.
void count(const Request& r, Class c) {
    Counts& counts = running->counts;
    if (c == SHARED) {  // in passes of as many lanes as fill 32 banks of 4 bytes
        ++counts.shared_requests;
        unsigned widest = std::max(4u, *std::max_element(r.bytes, r.bytes + r.lanes)), per_pass = 128 / widest;
        for (unsigned first = 0; first < r.lanes; first += per_pass) {
            std::set<std::uint64_t> words;
            unsigned in_bank[32] = {};
            for (unsigned i = first; i < std::min(first + per_pass, r.lanes); ++i)
                for (std::uint64_t w = r.address[i] / 4; w <= (r.address[i] + r.bytes[i] - 1) / 4; ++w)
                    if (words.insert(w).second) ++in_bank[w % 32];
            counts.bank_conflicts += *std::max_element(in_bank, in_bank + 32) - 1;
        }
        return;
    }
    Traffic& t = c == LOAD ? counts.loads : c == STORE ? counts.stores : counts.atomics;
    ++t.requests;
    std::pair<std::uint64_t, std::uint64_t> spans[32];
    for (unsigned i = 0; i < r.lanes; ++i) spans[i] = {r.address[i], r.address[i] + r.bytes[i]};
    std::sort(spans, spans + r.lanes);
    std::uint64_t byte = 0, sector = 0;  // the first that is not counted yet
    for (unsigned i = 0; i < r.lanes; ++i) {
        auto [begin, end] = spans[i];
        if (end > byte) t.bytes += end - std::max(begin, byte), byte = end;
        std::uint64_t past = (end + 31) / 32;
        if (past > sector) t.sectors += past - std::max(begin / 32, sector), sector = past;
    }
}

void record(Fiber& f, std::uintptr_t site, Class c, const char* p, std::size_t bytes) {
    Site& s = f.warp->sites[site * 4 + c];
    std::size_t k = s.executed[f.lane]++ - s.closed;
    if (k >= s.open.size()) s.open.resize(k + 1);
    Request& r = s.open[k];
    r.address[r.lanes] = reinterpret_cast<std::uint64_t>(p);
    r.bytes[r.lanes++] = bytes;
    if (r.lanes == f.warp->lanes.size()) count(r, c);
    for (; !s.open.empty() && s.open.front().lanes == f.warp->lanes.size(); ++s.closed) s.open.pop_front();
}

// The lanes are in step again: what is still open was executed by some of them only.
void converge(Warp& w) {
    for (auto& [key, s] : w.sites) {
        for (Request& r : s.open)
            if (r.lanes && r.lanes < w.lanes.size()) count(r, Class(key & 3));
        s = Site();
    }
}

// ---- Memory.
Region& static_shared(Block& b, const char* p) {  // the variable that holds p, or the nearest
    auto offset = std::size_t(p - shared_begin);
    auto past = [](std::size_t o, const SharedVariable& v) { return o < v.offset; };
    auto v = std::upper_bound(shared_variables.begin(), shared_variables.end(), offset, past);
    if (v == shared_variables.end() || (v != shared_variables.begin() && offset < (v[-1].offset + v[-1].bytes + v->offset) / 2)) --v;
    auto& s = b.statics[&*v];
    if (!s.region) {
        s.region = std::make_unique<Region>(v->name, shared_begin + v->offset, v->bytes, 4, true, false);
        s.saved.resize(v->bytes);
        std::memset(s.region->base, rubbish, v->bytes);
    }
    return *s.region;
}

bool in_static_shared(const char* p) {
    auto& last = shared_variables.back();
    return p >= shared_begin && p < shared_begin + last.offset + last.bytes + 256;
}

Region* find(const Fiber& f, const char* p) {
    if (in_static_shared(p)) return &static_shared(*f.block, p);
    Region* d = f.block->dynamic.get();
    if (d && p >= d->base - guard_bytes && p < d->base + d->bytes + guard_bytes) return d;
    auto& regions = running->memory.regions;
    auto at = regions.upper_bound(p + guard_bytes);
    if (at == regions.begin()) return nullptr;
    Region* r = std::prev(at)->second.get();
    return p < r->base + r->bytes + guard_bytes ? r : nullptr;
}

void race(const Fiber& f, Epoch other, bool other_writes, int how, const Region& r, const char* p, std::uintptr_t pc) {
    std::uint32_t i = other.thread - running->first_id;
    report("data race", f, pc, text(r, p),
           std::string(how & WRITE ? "writes " : "reads ") + text(r, p) + ", not ordered after the " +
               (other_writes ? "write" : "read") + " by block " + text(unravel(i / running->threads, gridDim)) + " thread " +
               text(unravel(i % running->threads, blockDim)));
}

void check(Fiber& f, Region& r, const char* p, std::size_t bytes, int how, std::uintptr_t pc) {
    std::size_t offset = p - r.base;
    if ((offset | bytes) % r.grain) r.refine(std::size_t(1) << std::countr_zero(offset | bytes));
    r.touched = true;
    Epoch self{f.id, f.clock, (how & ATOMIC) != 0};
    auto clash = [&](Epoch e) { return e.thread && !(e.atomic && self.atomic) && !knows(f, e); };
    auto same = [&](Epoch e) { return e.thread == self.thread && e.clock == self.clock && e.atomic == self.atomic; };
    for (Cell* c = r.cells + offset / r.grain; c < r.cells + (offset + bytes) / r.grain; ++c) {
        const char* at = r.base + (c - r.cells) * r.grain;
        if (!same(c->write) && clash(c->write)) race(f, c->write, true, how, r, at, pc);
        if (how & WRITE)
            for (Epoch e : c->reads)
                if (clash(e)) race(f, e, false, how, r, at, pc);
        if ((how & READ) && !c->write.thread && !r.filled)
            report("uninitialised read", f, pc, text(r, at), "reads " + text(r, at) + ", which nobody wrote");
        if (how & WRITE) {
            *c = {self, {}};
        } else if (!same(c->reads[0])) {
            bool second = !knows(f, c->reads[0]) && (knows(f, c->reads[1]) || running->random() % 2);
            c->reads[second] = self;
        }
    }
}

}  // namespace

void access(const void* address, std::size_t bytes, int how, void* from) {
    Fiber* f = current;
    auto p = static_cast<const char*>(address);
    if (busy || (p >= f->stack && p < f->stack + stack_bytes)) return;
    Launch& l = *running;
    bool constant = (p >= __ehdr_start && p < _end) || (p >= l.call && p < l.call + l.call_bytes);
    if (constant && !(how & WRITE)) return;
    Busy guard;
    if (l.schedule >= Launch::RANDOM && l.random() % rarity == 0) pause(READY);
    if (++f->accesses > quantum) pause(WAITING);
    if ((how & ATOMIC) && (how & READ)) {  // one that looks again at what has not changed spins: let others run
        if (f->polled == p && f->polled_at == l.progress) pause(WAITING);
        f->polled = p;
        f->polled_at = l.progress;
    }
    std::uintptr_t call = f->calls.empty() ? 0 : f->calls.back();
    std::uintptr_t pc = static_cast<char*>(from) - __ehdr_start - 1, site = call * 31 + pc;
    Region* r = find(*f, p);
    if (!r || !r->holds(p, bytes)) {
        char hex[32];
        std::snprintf(hex, sizeof hex, "%p", address);
        std::string where = r ? text(*r, p) : hex;
        report("out of bounds", *f, pc, where,
               std::string(how & WRITE ? "writes " : "reads ") + std::to_string(bytes) + " bytes at " + where +
                   (r ? ", outside its " + std::to_string(r->bytes) + " bytes" : ", far from any buffer"));
        return abort_launch();
    }
    if (reinterpret_cast<std::uintptr_t>(p) % bytes) {
        report("misaligned", *f, pc, text(*r, p), "accesses " + std::to_string(bytes) + " bytes at " + text(*r, p));
        return abort_launch();
    }
    check(*f, *r, p, bytes, how, pc);
    if (how & ATOMIC) synchronise(*f, p, how);
    Class c = r->shared ? SHARED : (how & ATOMIC) && (how & WRITE) ? ATOMICS : how & WRITE ? STORE : LOAD;
    record(*f, site, c, p, bytes);
    if ((how & WRITE) && !(how & READ)) ++l.progress;
}

void changed() {
    if (running) ++running->progress;
}

void fence(bool device) {
    Busy guard;
    Fiber& f = *current;
    if (running->schedule >= Launch::RANDOM) pause(READY);
    for (int scope = 0; scope <= device; ++scope) f.now = join(f.now, f.read[scope]);
    for (int scope = 0; scope <= device; ++scope) f.released[scope] = told(f);
    ++f.clock;
}

void relax() {
    Busy guard;
    pause(WAITING);
}

unsigned lane() { return current->lane; }

unsigned active_lanes() {
    unsigned mask = 0;
    for (Fiber* f : current->warp->lanes) mask |= unsigned(f->state != DONE) << f->lane;
    return mask;
}

void* dynamic_shared() { return current->block->dynamic ? current->block->dynamic->base : nullptr; }

// ---- Barriers and warp-wide meetings: the last to come wakes the others.
namespace {

void complete_barrier(Block& b, Fiber& last) {
    std::vector<Fiber*> all;
    for (Fiber& f : b.threads) all.push_back(&f);
    for (Fiber* f : all) {
        if (f->state == AT_BARRIER && f->barrier_line == last.barrier_line && !b.exited) continue;
        std::string where = "__syncthreads in line ";
        report("divergent barrier", *f, 0, "",
               f->state == DONE ? "has exited while others of its block wait at " + where + std::to_string(last.barrier_line)
                                : "waits at " + where + std::to_string(f->barrier_line) + ", others of its block do not");
        return abort_launch();
    }
    order(all, BLOCK);
    for (Warp& w : b.warps) converge(w);
    b.arrived = 0;
    for (Fiber* f : all) running->make_ready(f);
}

void complete_meeting(Fiber& last) {
    std::vector<Fiber*> group;
    unsigned met = 0;
    for (Fiber* f : last.warp->lanes) {
        if (!(last.mask >> f->lane & 1) || f->state == DONE) continue;
        if (f->state != IN_WARP || f->mask != last.mask || f->meeting != last.meeting) return;
        group.push_back(f);
        met |= 1u << f->lane;
    }
    if (last.meeting == SYNC) order(group, group.size() == last.warp->lanes.size() ? WARP + last.thread / 32 : 0);
    if (group.size() == last.warp->lanes.size()) converge(*last.warp);
    for (Fiber* f : group) {
        for (Fiber* other : group) f->words[other->lane] = other->word;
        f->met = met;
        running->make_ready(f);
    }
}

}  // namespace

void barrier(int line) {
    Busy guard;
    Fiber* f = current;
    f->barrier_line = line;
    f->state = AT_BARRIER;
    Block& b = *f->block;
    if (++b.arrived + b.exited == b.threads.size()) complete_barrier(b, *f);
    simt_switch(&f->sp, running->scheduler);
}

unsigned meet(Collective what, unsigned mask, std::uint64_t word, std::uint64_t (&words)[32]) {
    Busy guard;
    Fiber* f = current;
    f->meeting = what, f->mask = mask, f->word = word;
    if (!(mask >> f->lane & 1)) {
        report("divergent warp", *f, 0, "", "is not in the mask of the warp-wide operation that it executes");
        abort_launch();
    }
    f->state = IN_WARP;
    complete_meeting(*f);
    simt_switch(&f->sp, running->scheduler);
    std::copy(f->words, f->words + 32, words);
    return f->met;
}

void undefined_lane(unsigned source) {
    Busy guard;
    report("undefined shuffle", *current, 0, "", "reads lane " + std::to_string(source) + ", which takes no part");
}

// ---- The scheduler.
namespace {

void Launch::admit(std::uint32_t linear) {
    auto b = std::make_unique<Block>();
    b->linear = linear;
    b->index = unravel(linear, gridDim);
    if (dynamic_bytes) {
        char* base = static_cast<char*>(reserve(dynamic_bytes + 2 * guard_bytes)) + guard_bytes;
        b->dynamic = std::make_unique<Region>("dynamic shared memory", base, dynamic_bytes, 4, true, false);
        std::memset(base, rubbish, dynamic_bytes);
    }
    b->warps.resize((threads + 31) / 32);
    for (std::uint32_t t = 0; t < threads; ++t) {
        Warp& warp = b->warps[t / 32];
        Fiber& f = b->threads.emplace_back();
        f.block = b.get(), f.warp = &warp, f.thread = t, f.lane = t % 32;
        f.id = first_id + linear * threads + t;
        f.index = unravel(t, blockDim);
        if (stacks.empty()) stacks.push_back(static_cast<char*>(reserve(stack_bytes)));
        f.stack = stacks.back();
        stacks.pop_back();
        auto top = reinterpret_cast<void**>(f.stack + stack_bytes - 16);
        *top = reinterpret_cast<void*>(fiber_main);  // simt_switch pops six registers, then returns here
        f.sp = top - 6;
        warp.lanes.push_back(&f);
        make_ready(&f);
    }
    resident.push_back(std::move(b));
}

void Launch::put_in_place(Block* b) {
    if (b == loaded) return;
    if (loaded)
        for (auto& [v, s] : loaded->statics) std::memcpy(s.saved.data(), s.region->base, v->bytes);
    if (b)
        for (auto& [v, s] : b->statics) std::memcpy(s.region->base, s.saved.data(), v->bytes);
    loaded = b;
}

void Launch::retire(Fiber* f) {
    Block& b = *f->block;
    stacks.push_back(f->stack);
    ++progress;
    ++b.exited;
    for (Fiber* other : f->warp->lanes)
        if (other->state == IN_WARP && (other->mask >> f->lane & 1)) {
            complete_meeting(*other);
            break;
        }
    if (b.arrived && b.arrived + b.exited == b.threads.size())
        for (Fiber& other : b.threads)
            if (other.state == AT_BARRIER) return complete_barrier(b, other);
    if (b.exited < b.threads.size()) return;
    for (Warp& w : b.warps) converge(w);
    if (loaded == &b) loaded = nullptr;
    std::erase_if(resident, [&](auto& r) { return r.get() == &b; });
}

void Launch::stuck() {
    unsigned in_state[5] = {};
    Fiber* one = nullptr;
    for (auto& b : resident)
        for (Fiber& f : b->threads) {
            ++in_state[f.state];
            if (f.state != DONE && (!one || (f.state == WAITING && one->state != WAITING))) one = &f;
        }
    const char* p = one->state == WAITING ? static_cast<const char*>(one->polled) : nullptr;
    Region* r = p ? find(*one, p) : nullptr;
    std::string address = r ? text(*r, p) : "";
    report("deadlock", *one, 0, address,
           std::to_string(in_state[WAITING]) + " threads wait for memory to change" + (r ? " (this one " + address + ")" : "") +
               ", " + std::to_string(in_state[AT_BARRIER]) + " at __syncthreads, " + std::to_string(in_state[IN_WARP]) +
               " in a warp-wide operation; " + std::to_string(coming.size()) + " blocks have not started");
    aborted = true;
}

void Launch::step() {
    while (resident.size() < device.options.resident_blocks && !coming.empty()) {
        admit(coming.front());
        coming.pop_front();
    }
    if (progress != woken_at) {
        idle = 0;
        wake();
    } else if (ready.empty()) {
        if (waiting.empty() || ++idle > idle_rounds) return stuck();
        wake();
    }
    if (ready.empty()) return;
    Fiber* f = std::get<Fiber*>(*ready.begin());
    ready.erase(ready.begin());
    device.trace = (device.trace ^ f->id) * 0x100000001b3;
    put_in_place(f->block);
    threadIdx = f->index;
    blockIdx = f->block->index;
    current = f;
    simt_switch(&scheduler, f->sp);
    current = nullptr;
    busy = 1;
    if (f->state == DONE && !aborted) retire(f);
}

}  // namespace

void set_shared_variables(std::vector<SharedVariable> variables) {
    std::sort(variables.begin(), variables.end(), [](auto& a, auto& b) { return a.offset < b.offset; });
    shared_variables = std::move(variables);
}

Device::Device(Options options) : options(std::move(options)), memory_(std::make_unique<Memory>()) {}

Device::~Device() {
    for (auto& [base, r] : memory_->regions) {
        auto page = reinterpret_cast<std::uintptr_t>(base) & ~std::uintptr_t(4095);
        munmap(reinterpret_cast<char*>(page) - guard_bytes, r->bytes + 4096 + 2 * guard_bytes);
    }
}

void* Device::allocate(const std::string& name, std::size_t bytes, std::size_t element, bool filled, std::size_t misalign) {
    char* base = static_cast<char*>(reserve(bytes + 4096 + 2 * guard_bytes)) + guard_bytes + misalign;
    memory_->regions[base] = std::make_unique<Region>(name, base, bytes, element, false, filled);
    if (!filled) std::memset(base, rubbish, std::min<std::size_t>(bytes, 1 << 28));
    return base;
}

void Device::host_reads(const void* buffer) {
    Region& r = *memory_->regions.at(static_cast<const char*>(buffer));
    for (std::size_t i = 0; i < r.bytes / r.grain; ++i)
        if (!r.cells[i].write.thread) {
            std::string address = text(r, r.base + i * r.grain);
            faults.push_back({"uninitialised read", "", address, "the host reads " + address + ", which nobody wrote", {}, {}, 0, 1});
            return;
        }
}

void Device::run(const std::string& name, dim3 grid, dim3 block, std::size_t dynamic_bytes, void (*invoke)(void*), void* call,
                 std::size_t call_bytes) {
    static const char* const schedules[] = {"ascending", "reverse", "random", "ahead", "behind"};
    auto at = std::find(std::begin(schedules), std::end(schedules), options.schedule);
    if (at == std::end(schedules)) throw std::invalid_argument("simt: no schedule '" + options.schedule + "'");
    if (shared_variables.empty()) throw std::logic_error("simt: call set_shared_variables when the module is loaded");
    for (auto& v : shared_variables)
        if (v.name == "shared_anchor") shared_begin = &shared_anchor - v.offset;
    std::uint32_t blocks = grid.x * grid.y * grid.z, threads = block.x * block.y * block.z;
    if (!blocks || !threads || threads > 1024) throw std::invalid_argument("simt: a launch that CUDA would refuse");

    Launch l{*this, *memory_, name, [=] { invoke(call); }, static_cast<const char*>(call), call_bytes, dynamic_bytes,
             threads, memory_->next_id, counts[name], std::mt19937_64(options.seed), {}};
    l.schedule = static_cast<decltype(l.schedule)>(at - schedules);
    memory_->next_id += blocks * threads;
    for (std::uint32_t i = 0; i < blocks; ++i) l.coming.push_back(l.schedule == Launch::REVERSE ? blocks - 1 - i : i);
    if (l.schedule >= Launch::RANDOM) std::shuffle(l.coming.begin(), l.coming.end(), l.random);
    gridDim = grid;
    blockDim = block;
    running = &l;
    expired = 0;

    struct sigaction action = {}, old_action;
    action.sa_handler = on_timer;
    action.sa_flags = SA_NODEFER;  // it may leave by a switch of stacks
    sigaction(SIGVTALRM, &action, &old_action);
    auto seconds = static_cast<time_t>(options.timeout);
    itimerval timer = {{}, {seconds, static_cast<suseconds_t>((options.timeout - double(seconds)) * 1e6)}}, off = {};
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
    while (!l.aborted && !(l.resident.empty() && l.coming.empty())) l.step();
    setitimer(ITIMER_VIRTUAL, &off, nullptr);
    sigaction(SIGVTALRM, &old_action, nullptr);

    for (auto& b : l.resident)
        for (Fiber& f : b->threads)
            if (f.state != DONE) l.stacks.push_back(f.stack);
    for (char* stack : l.stacks) munmap(stack, stack_bytes);
    running = nullptr;
}

}  // namespace simt

// ---- Wide accesses.
uint4 load16(const void* p) {
    simt::access(p, 16, simt::READ, __builtin_return_address(0));
    uint4 value;
    std::memcpy(&value, p, 16);
    return value;
}

void store16(void* p, uint4 value) {
    simt::access(p, 16, simt::WRITE, __builtin_return_address(0));
    std::memcpy(p, &value, 16);
}

// ---- What the compiler's instrumentation calls. CUDA's volatile is a relaxed atomic.
#define HOOK(name, bytes, how) \
    void __tsan_##name(void* p) { simt::access(p, bytes, how, __builtin_return_address(0)); }
#define HOOKS(n)                                            \
    HOOK(read##n, n, simt::READ)                            \
    HOOK(write##n, n, simt::WRITE)                          \
    HOOK(volatile_read##n, n, simt::READ | simt::ATOMIC)    \
    HOOK(volatile_write##n, n, simt::WRITE | simt::ATOMIC)

#define ATOMIC_HOOKS(bits)                                                                                        \
    using U##bits = std::uint##bits##_t;                                                                          \
    U##bits __tsan_atomic##bits##_load(const U##bits* p, int order) {                                             \
        simt::access(p, bits / 8, simt::READ | how(order), __builtin_return_address(0));                          \
        return *p;                                                                                                \
    }                                                                                                             \
    void __tsan_atomic##bits##_store(U##bits* p, U##bits v, int order) {                                          \
        simt::access(p, bits / 8, simt::WRITE | how(order), __builtin_return_address(0));                         \
        *p = v;                                                                                                   \
    }                                                                                                             \
    U##bits __tsan_atomic##bits##_exchange(U##bits* p, U##bits v, int order) {                                    \
        simt::access(p, bits / 8, simt::READ | simt::WRITE | how(order), __builtin_return_address(0));            \
        simt::changed();                                                                                          \
        return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                       \
    }                                                                                                             \
    U##bits __tsan_atomic##bits##_fetch_add(U##bits* p, U##bits v, int order) {                                   \
        simt::access(p, bits / 8, simt::READ | simt::WRITE | how(order), __builtin_return_address(0));            \
        simt::changed();                                                                                          \
        return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                        \
    }                                                                                                             \
    U##bits __tsan_atomic##bits##_fetch_sub(U##bits* p, U##bits v, int order) {                                   \
        simt::access(p, bits / 8, simt::READ | simt::WRITE | how(order), __builtin_return_address(0));            \
        simt::changed();                                                                                          \
        return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                        \
    }                                                                                                             \
    bool __tsan_atomic##bits##_compare_exchange_strong(U##bits* p, U##bits* e, U##bits v, int order, int) {       \
        simt::access(p, bits / 8, simt::READ | simt::WRITE | how(order), __builtin_return_address(0));            \
        bool done = __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);              \
        if (done) simt::changed();                                                                                \
        return done;                                                                                              \
    }                                                                                                             \
    bool __tsan_atomic##bits##_compare_exchange_weak(U##bits* p, U##bits* e, U##bits v, int order, int failure) { \
        return __tsan_atomic##bits##_compare_exchange_strong(p, e, v, order, failure);                            \
    }

namespace {
int how(int order) {
    bool acquire = order != __ATOMIC_RELAXED && order != __ATOMIC_RELEASE, release = order >= __ATOMIC_RELEASE;
    return simt::ATOMIC | (acquire ? simt::ACQUIRE : 0) | (release ? simt::RELEASE : 0);
}
}  // namespace

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
ATOMIC_HOOKS(8)
ATOMIC_HOOKS(32)
ATOMIC_HOOKS(64)
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_atomic_signal_fence(int) {}
void __tsan_atomic_thread_fence(int) { simt::fence(true); }
void __tsan_func_entry(void* from) {
    if (auto* f = simt::current; !simt::busy) f->calls.push_back((f->calls.empty() ? 0 : f->calls.back() * 31) + reinterpret_cast<std::uintptr_t>(from));
}
void __tsan_func_exit() {
    if (auto* f = simt::current; !simt::busy) f->calls.pop_back();
}
// Sizes that are no access of a GPU: copies of structs, piece by piece.
void __tsan_read_range(void* p, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) simt::access(static_cast<char*>(p) + i, 1, simt::READ, __builtin_return_address(0));
}
void __tsan_write_range(void* p, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) simt::access(static_cast<char*>(p) + i, 1, simt::WRITE, __builtin_return_address(0));
}
#define UNALIGNED(n)                                                          \
    void __tsan_unaligned_read##n(void* p) { __tsan_read_range(p, n); }       \
    void __tsan_unaligned_write##n(void* p) { __tsan_write_range(p, n); }
UNALIGNED(2)
UNALIGNED(4)
UNALIGNED(8)
UNALIGNED(16)
}
