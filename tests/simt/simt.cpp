// The machine behind simt.h: fibers, the scheduler, what a thread's accesses and barriers do, and the
// reports. This file is compiled without instrumentation; the kernels' side is compiled with
// -fsanitize=thread but linked without its run-time library, and so calls the __tsan_ functions at the end of
// this file before every access to memory.
#include "simt.h"

#include <sys/time.h>

#include <csignal>
#include <cstdio>
#include <queue>
#include <random>
#include <set>
#include <stdexcept>

#include "memory.h"
#include "traffic.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[],
    _end[];  // this module's image: the linker's
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

constexpr std::size_t stack_bytes = 64 << 10;
constexpr unsigned idle_rounds = 100;  // how often all who wait may look again at what nobody changed
constexpr unsigned quantum = 100'000;  // accesses after which a thread that never waits lets others run
constexpr unsigned rarity = 8;         // a hostile schedule preempts at one access in so many
constexpr std::size_t max_faults = 64;

enum State { READY, WAITING, AT_BARRIER, IN_WARP, DONE };  // WAITING: for a change of memory

struct Block;
struct Warp;
struct Fiber {
    Block* block;
    Warp* warp;
    uint3 index;
    Ordering order;
    std::uint32_t id;  // as in Epoch
    char* stack;
    void* sp;
    State state = READY;
    unsigned accesses = 0;           // since it last gave way
    std::uintptr_t calls[64] = {0};  // hashes of the call stack: an instruction is named with its callers
    unsigned depth = 0;
    const void* polled = nullptr;  // the atomic it looked at last,
    std::uint64_t polled_at = 0;   // and Launch::progress then
    int barrier_line = 0;
    Collective meeting = SYNC;
    unsigned mask = 0, met = 0;
    std::uint64_t word = 0, words[32];

    unsigned lane() const { return order.thread % 32; }
};
struct Warp {
    std::vector<Fiber*> lanes;
    WarpTraffic traffic;
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

std::vector<SharedVariable> shared_variables;  // sorted
char* shared_begin = nullptr;
std::vector<char*> stacks;  // not in use

}  // namespace

struct Memory {
    std::map<const char*, std::unique_ptr<Region>> regions;  // by base
    std::uint32_t next_id = 1;
    bool broken = false;  // a launch was aborted
};

namespace {

struct Launch {
    Device& device;
    Memory& memory;
    std::string name;
    const char* call;  // the kernel's arguments
    std::size_t call_bytes, dynamic_bytes;
    void (*invoke)(void*);
    Shape shape;
    Counts& counts;
    enum { ASCENDING, REVERSE, RANDOM, AHEAD, BEHIND } schedule;
    std::mt19937_64 random;

    std::deque<std::uint32_t> coming = {};  // blocks that have not started
    std::vector<std::unique_ptr<Block>> resident = {};
    using Turn = std::tuple<std::uint64_t, std::uint32_t, Fiber*>;  // priority, id
    std::priority_queue<Turn, std::vector<Turn>, std::greater<>> ready = {};
    std::vector<Fiber*> waiting = {};
    std::uint64_t progress = 1, woken_at = 1;  // progress: changes of memory so far
    unsigned idle = 0;
    std::set<std::pair<std::string, std::uintptr_t>> reported = {};
    Block* loaded = nullptr;  // whose static shared memory is in place
    void* scheduler = nullptr;

    bool hostile() const { return schedule >= RANDOM; }
    std::uint64_t priority(const Fiber& f) {  // the lowest runs; a preempted thread draws anew
        bool favourite = f.order.thread / 32 == device.options.seed % ((shape.threads + 31) / 32);
        if (schedule == ASCENDING) return f.id;
        if (schedule == REVERSE) return ~std::uint64_t(f.id);
        if (schedule == RANDOM || !favourite) return random() >> 1 | 1;
        return schedule == AHEAD ? 0 : ~std::uint64_t(0);
    }
    void make_ready(Fiber* f) {
        f->state = READY;
        ready.push({priority(*f), f->id, f});
    }
    void admit(std::uint32_t linear);
    void load_shared(Block* b);
    void step();
    void retire(Fiber& f);
    void stuck();
};

Launch* running = nullptr;
Fiber* current = nullptr;
volatile std::sig_atomic_t busy = 1;  // the host or the machine runs, not a kernel: its accesses mean nothing
volatile std::sig_atomic_t expired = 0;

void leave() { simt_switch(&current->sp, running->scheduler); }

void pause(State state) {
    current->state = state;
    current->accesses = 0;
    if (state == WAITING) running->waiting.push_back(current);
    if (state == READY) running->make_ready(current);
    leave();
}

// After a fault that leaves nothing sensible to go on with. A kernel's fibers own nothing: they are just
// dropped.
void abort_launch() {
    running->memory.broken = true;
    if (current) leave();
}

std::string text(uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}
uint3 unravel(std::uint32_t i, dim3 d) { return {i % d.x, i / d.x % d.y, i / d.x / d.y}; }

// `pc` tells faults of one kind apart; a repeated one is only counted.
void report(const std::string& kind, const Fiber& f, std::uintptr_t pc, const std::string& address,
            const std::string& message) {
    auto& faults = running->device.faults;
    if (!running->reported.insert({kind, pc}).second) {
        for (auto& old : faults) old.count += old.kind == kind && old.pc == pc && old.kernel == running->name;
    } else if (faults.size() < max_faults) {
        faults.push_back({kind, running->name, address, message, f.block->index, f.index, pc});
    }
}

void time_out() {
    busy = 1;
    report("time-out", *current, 0, "", "the launch ran longer than its limit");
    abort_launch();
}

void on_timer(int) {
    expired = 1;
    if (!busy) time_out();
}

struct Busy {  // the machine works on behalf of the current fiber
    Busy() { busy = 1; }
    ~Busy() {
        if (expired) time_out();
        busy = 0;
    }
};

void fiber_main() {
    busy = 0;
    running->invoke(const_cast<char*>(running->call));
    busy = 1;
    pause(DONE);
}

// ---- Memory.

// The `__shared__` variable that holds p, or the nearest. A block's variables exist from its first access on.
Region& static_shared(Block& b, const char* p) {
    auto offset = std::size_t(p - shared_begin);
    auto above = [](std::size_t o, const SharedVariable& v) { return o < v.offset; };
    auto v = std::upper_bound(shared_variables.begin() + 1, shared_variables.end(), offset, above);
    if (v == shared_variables.end() || offset < (v[-1].offset + v[-1].bytes + v->offset) / 2) --v;
    StaticShared& s = b.statics[&*v];
    if (!s.region) {
        s.region = std::make_unique<Region>(v->name, shared_begin + v->offset, v->bytes, 4, true, false);
        s.saved.resize(v->bytes);
        std::memset(s.region->base, rubbish, v->bytes);
    }
    return *s.region;
}

Region* find(const Fiber& f, const char* p) {
    auto& last = shared_variables.back();
    if (p >= shared_begin && p < shared_begin + last.offset + last.bytes) return &static_shared(*f.block, p);
    if (f.block->dynamic && f.block->dynamic->is_near(p)) return f.block->dynamic.get();
    auto above = running->memory.regions.upper_bound(p + guard_bytes);
    if (above == running->memory.regions.begin()) return nullptr;
    Region* r = std::prev(above)->second.get();
    return r->is_near(p) ? r : nullptr;
}

}  // namespace

void access(const void* address, std::size_t bytes, int how, void* from) {
    auto p = static_cast<const char*>(address);
    if (busy || (p >= current->stack && p < current->stack + stack_bytes)) return;
    Fiber& f = *current;
    Launch& l = *running;
    bool constant = (p >= __ehdr_start && p < _end) || (p >= l.call && p < l.call + l.call_bytes);
    if (constant && !(how & WRITE)) return;
    Busy guard;
    if (l.hostile() && l.random() % rarity == 0) pause(READY);
    if (++f.accesses > quantum) pause(WAITING);
    if ((how & ATOMIC) && (how & READ)) {  // who looks again at what nobody changed spins: let others run
        if (f.polled == p && f.polled_at == l.progress) pause(WAITING);
        f.polled = p;
        f.polled_at = l.progress;
    }

    std::uintptr_t pc = static_cast<char*>(from) - __ehdr_start - 1;
    std::string verb = how & WRITE ? "writes " : "reads ", size = std::to_string(bytes);
    Region* r = find(f, p);
    if (!r || !r->holds(p, bytes)) {
        char hex[32];
        std::snprintf(hex, sizeof hex, "%p", address);
        std::string where = r ? r->at(p) : hex;
        std::string of = r ? ", outside its " + std::to_string(r->bytes) + " bytes" : ", far from any buffer";
        report("out of bounds", f, pc, where, verb + size + " bytes at " + where + of);
        return abort_launch();
    }
    if (reinterpret_cast<std::uintptr_t>(p) % bytes) {
        report("misaligned", f, pc, r->at(p), verb + size + " bytes at " + r->at(p));
        return abort_launch();
    }

    Epoch self{f.id, f.order.clock, (how & ATOMIC) != 0};
    r->enter(f.order, self, l.shape, p, bytes, how,
             [&](const char* kind, const char* at, const Epoch* other, bool wrote) {
                 std::uint32_t i = other ? other->thread - l.shape.first_id : 0;
                 std::string rest = ", which nobody wrote";
                 if (other)
                     rest = std::string(", not ordered after the ") + (wrote ? "write" : "read") +
                            " by block " + text(unravel(i / l.shape.threads, gridDim)) + " thread " +
                            text(unravel(i % l.shape.threads, blockDim));
                 report(kind, f, pc, r->at(at), verb + r->at(at) + rest);
             });
    if (how & ATOMIC) f.order.synchronise(r->published[p], how);
    Class c = r->shared ? SHARED : !(how & WRITE) ? LOAD : how & ATOMIC ? ATOMICS : STORE;
    std::uintptr_t instruction = f.calls[f.depth % 64] * 31 + pc;
    f.warp->traffic.record(f.lane(), f.warp->lanes.size(), instruction, c, p, bytes, l.counts);
    if (!(how & READ)) ++l.progress;
}

void changed() { ++running->progress; }

void fence(bool device) {
    Busy guard;
    if (running->hostile()) pause(READY);
    current->order.fence(device);
}

void relax() {
    Busy guard;
    pause(WAITING);
}

unsigned lane() { return current->lane(); }

unsigned active_lanes() {
    Busy guard;
    unsigned mask = 0;
    for (Fiber* f : current->warp->lanes) mask |= unsigned(f->state != DONE) << f->lane();
    return mask;
}

void* dynamic_shared() {
    Busy guard;
    return current->block->dynamic ? current->block->dynamic->base : nullptr;
}

// ---- Barriers and warp-wide meetings: the last to come wakes the others.
namespace {

void complete_barrier(Block& b, int line) {
    std::vector<Ordering*> all;
    for (Fiber& f : b.threads) {
        all.push_back(&f.order);
        if (f.state == AT_BARRIER && f.barrier_line == line) continue;
        std::string does = f.state == DONE ? "has exited" : "waits in line " + std::to_string(f.barrier_line);
        std::string others = ", others of its block wait at __syncthreads in line " + std::to_string(line);
        report("divergent barrier", f, 0, "", does + others);
        return abort_launch();
    }
    meet_all(all, BLOCK);
    for (Warp& w : b.warps) w.traffic.converge(running->counts);
    b.arrived = 0;
    for (Fiber& f : b.threads) running->make_ready(&f);
}

void complete_meeting(const Fiber& last) {
    unsigned met = 0;
    for (Fiber* f : last.warp->lanes) {
        if (!(last.mask >> f->lane() & 1) || f->state == DONE) continue;
        if (f->state != IN_WARP || f->mask != last.mask || f->meeting != last.meeting) return;
        met |= 1u << f->lane();
    }
    std::vector<Fiber*> group;
    std::vector<Ordering*> orders;
    for (Fiber* f : last.warp->lanes)
        if (met >> f->lane() & 1) group.push_back(f), orders.push_back(&f->order);
    bool whole = group.size() == last.warp->lanes.size();
    if (last.meeting == SYNC) meet_all(orders, whole ? WARP + last.order.thread / 32 : 0);
    if (whole) last.warp->traffic.converge(running->counts);
    for (Fiber* f : group) {
        for (Fiber* other : group) f->words[other->lane()] = other->word;
        f->met = met;
        running->make_ready(f);
    }
}

}  // namespace

void barrier(int line) {
    Busy guard;
    Block& b = *current->block;
    current->barrier_line = line;
    current->state = AT_BARRIER;
    if (++b.arrived + b.exited == b.threads.size()) complete_barrier(b, line);
    leave();
}

unsigned meet(Collective what, unsigned mask, std::uint64_t word, std::uint64_t (&words)[32]) {
    Busy guard;
    Fiber& f = *current;
    f.meeting = what, f.mask = mask, f.word = word;
    if (!(mask >> f.lane() & 1)) {
        report("divergent warp", f, 0, "", "is not in the mask of the warp-wide operation that it executes");
        abort_launch();
    }
    f.state = IN_WARP;
    complete_meeting(f);
    leave();
    std::copy(f.words, f.words + 32, words);
    return f.met;
}

void undefined_lane(int source) {
    Busy guard;
    report("undefined shuffle", *current, 0, "",
           "reads lane " + std::to_string(source) + ", which takes no part");
}

// ---- The scheduler.
namespace {

void Launch::admit(std::uint32_t linear) {
    Block& b = *resident.emplace_back(std::make_unique<Block>());
    b.linear = linear;
    b.index = unravel(linear, gridDim);
    if (dynamic_bytes) {
        char* base = reserve(dynamic_bytes + 2 * guard_bytes) + guard_bytes;
        b.dynamic = std::make_unique<Region>("dynamic shared memory", base, dynamic_bytes, 4, true, false);
        std::memset(base, rubbish, dynamic_bytes);
    }
    b.warps.resize((shape.threads + 31) / 32);
    for (std::uint32_t t = 0; t < shape.threads; ++t) {
        std::uint32_t id = shape.first_id + linear * shape.threads + t;
        Fiber& f = b.threads.emplace_back(Fiber{&b, &b.warps[t / 32], unravel(t, blockDim), {linear, t}, id});
        if (stacks.empty()) stacks.push_back(reserve(stack_bytes));
        f.stack = stacks.back();
        stacks.pop_back();
        auto top = reinterpret_cast<void**>(f.stack + stack_bytes - 16);
        *top = reinterpret_cast<void*>(fiber_main);  // simt_switch pops six registers, then returns here
        f.sp = top - 6;
        f.warp->lanes.push_back(&f);
        make_ready(&f);
    }
}

void Launch::load_shared(Block* b) {
    if (b == loaded) return;
    if (loaded)
        for (auto& [v, s] : loaded->statics) std::memcpy(s.saved.data(), s.region->base, v->bytes);
    for (auto& [v, s] : b->statics) std::memcpy(s.region->base, s.saved.data(), v->bytes);
    loaded = b;
}

void Launch::retire(Fiber& f) {
    Block& b = *f.block;
    ++progress;
    ++b.exited;
    for (Fiber* other : f.warp->lanes)
        if (other->state == IN_WARP && (other->mask >> f.lane() & 1)) {
            complete_meeting(*other);
            break;
        }
    if (b.exited < b.threads.size()) {
        if (b.arrived + b.exited < b.threads.size()) return;
        for (Fiber& other : b.threads)
            if (other.state == AT_BARRIER) return complete_barrier(b, other.barrier_line);
    }
    for (Warp& w : b.warps) w.traffic.converge(counts);
    for (Fiber& other : b.threads) stacks.push_back(other.stack);
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
    auto p = static_cast<const char*>(one->state == WAITING ? one->polled : nullptr);
    Region* r = p ? find(*one, p) : nullptr;
    report("deadlock", *one, 0, r ? r->at(p) : "",
           std::to_string(in_state[WAITING]) + " threads wait for memory to change, " +
               std::to_string(in_state[AT_BARRIER]) + " at __syncthreads, " +
               std::to_string(in_state[IN_WARP]) + " in a warp-wide operation; " +
               std::to_string(coming.size()) + " blocks have not started");
    memory.broken = true;
}

void Launch::step() {
    while (resident.size() < device.options.resident_blocks && !coming.empty()) {
        admit(coming.front());
        coming.pop_front();
    }
    if (progress != woken_at || ready.empty()) {
        idle = progress != woken_at ? 0 : idle + 1;
        if (ready.empty() && (waiting.empty() || idle > idle_rounds)) return stuck();
        for (Fiber* f : std::exchange(waiting, {})) make_ready(f);
        woken_at = progress;
    }
    Fiber* f = std::get<Fiber*>(ready.top());
    ready.pop();
    device.trace = (device.trace ^ f->id) * 0x100000001b3;
    load_shared(f->block);
    threadIdx = f->index;
    blockIdx = f->block->index;
    current = f;
    simt_switch(&scheduler, f->sp);
    current = nullptr;
    busy = 1;
    if (f->state == DONE && !memory.broken) retire(*f);
}

}  // namespace

void set_shared_variables(std::vector<SharedVariable> variables) {
    std::sort(variables.begin(), variables.end(), [](auto& a, auto& b) { return a.offset < b.offset; });
    shared_variables = std::move(variables);
}

Device::Device(Options options) : options(std::move(options)), memory_(std::make_unique<Memory>()) {}

Device::~Device() {
    for (auto& [base, r] : memory_->regions) {
        char* page = r->base - reinterpret_cast<std::uintptr_t>(base) % 4096;
        munmap(page - guard_bytes, r->bytes + 4096 + 2 * guard_bytes);
    }
}

void* Device::allocate(const std::string& name, std::size_t bytes, std::size_t element, bool filled,
                       std::size_t misalign) {
    char* base = reserve(bytes + 4096 + 2 * guard_bytes) + guard_bytes + misalign;
    memory_->regions[base] = std::make_unique<Region>(name, base, bytes, element, false, filled);
    if (!filled) std::memset(base, rubbish, bytes);
    return base;
}

void Device::host_reads(const void* buffer) {
    Region& r = *memory_->regions.at(static_cast<const char*>(buffer));
    for (std::size_t i = 0; i < r.bytes / r.grain; ++i)
        if (!r.cells[i].write.thread) {
            std::string at = r.at(r.base + i * r.grain),
                        message = "the host reads " + at + ", which nobody wrote";
            return faults.push_back({"uninitialised read", "", at, message, {}, {}, 0});
        }
}

void Device::run(const std::string& name, dim3 grid, dim3 block, std::size_t dynamic_bytes,
                 void (*invoke)(void*), const void* call, std::size_t call_bytes) {
    static const char* const schedules[] = {"ascending", "reverse", "random", "ahead", "behind"};
    auto at = std::find(std::begin(schedules), std::end(schedules), options.schedule);
    if (at == std::end(schedules))
        throw std::invalid_argument("simt: no schedule '" + options.schedule + "'");
    if (shared_variables.empty()) throw std::logic_error("simt: set_shared_variables was not called");
    for (auto& v : shared_variables)
        if (v.name == "shared_anchor") shared_begin = &shared_anchor - v.offset;
    std::uint32_t blocks = grid.x * grid.y * grid.z, threads = block.x * block.y * block.z;
    if (!blocks || !threads || threads > 1024 || !options.resident_blocks)
        throw std::invalid_argument("simt: no such launch");
    if (memory_->broken) return;

    auto schedule = static_cast<decltype(Launch::schedule)>(at - schedules);
    Launch l{*this,
             *memory_,
             name,
             static_cast<const char*>(call),
             call_bytes,
             dynamic_bytes,
             invoke,
             {memory_->next_id, threads},
             counts[name],
             schedule,
             std::mt19937_64(options.seed)};
    memory_->next_id += blocks * threads;
    for (std::uint32_t i = 0; i < blocks; ++i)
        l.coming.push_back(schedule == Launch::REVERSE ? blocks - 1 - i : i);
    if (l.hostile()) std::shuffle(l.coming.begin(), l.coming.end(), l.random);
    gridDim = grid;
    blockDim = block;
    for (auto& [base, r] : memory_->regions) r->published.clear();
    running = &l;
    expired = 0;

    struct sigaction action = {}, old_action;
    action.sa_handler = on_timer;
    action.sa_flags = SA_NODEFER;  // time_out leaves by a switch of stacks
    sigaction(SIGVTALRM, &action, &old_action);
    itimerval timer = {{0, 100'000},
                       {time_t(options.timeout), suseconds_t(std::fmod(options.timeout, 1) * 1e6)}};
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
    while (!memory_->broken && !(l.resident.empty() && l.coming.empty())) l.step();
    timer = {};
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
    sigaction(SIGVTALRM, &old_action, nullptr);

    for (auto& b : l.resident)
        for (Fiber& f : b->threads) stacks.push_back(f.stack);
    running = nullptr;
}

}  // namespace simt

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
#define SIMT_HOOK(name, bytes, how) \
    void __tsan_##name(void* p) { simt::access(p, bytes, how, __builtin_return_address(0)); }
#define SIMT_HOOKS(n)                                         \
    SIMT_HOOK(read##n, n, simt::READ)                         \
    SIMT_HOOK(write##n, n, simt::WRITE)                       \
    SIMT_HOOK(unaligned_read##n, n, simt::READ)               \
    SIMT_HOOK(unaligned_write##n, n, simt::WRITE)             \
    SIMT_HOOK(volatile_read##n, n, simt::READ | simt::ATOMIC) \
    SIMT_HOOK(volatile_write##n, n, simt::WRITE | simt::ATOMIC)

extern "C" {
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
// Copies of structs, of a size that is no access of a GPU.
void __tsan_read_range(char* p, std::size_t n) {
    for (; n--; ++p) simt::access(p, 1, simt::READ, __builtin_return_address(0));
}
void __tsan_write_range(char* p, std::size_t n) {
    for (; n--; ++p) simt::access(p, 1, simt::WRITE, __builtin_return_address(0));
}
void __tsan_func_entry(char* from) {
    if (simt::busy) return;
    simt::Fiber& f = *simt::current;
    std::uintptr_t caller = f.calls[f.depth % 64];
    f.calls[++f.depth % 64] = caller * 31 + (from - __ehdr_start);
}
void __tsan_func_exit() {
    if (!simt::busy) --simt::current->depth;
}
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
// The host's: pybind11's reference counts and locks. Kernels use CUDA's atomics.
char __tsan_atomic8_load(const char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_add(int* p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
}
