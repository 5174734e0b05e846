// What a warp asks of memory: the k-th execution of an instruction by each of its lanes is one request.
#pragma once

#include <deque>
#include <unordered_map>
#include <utility>

#include "simt.h"

namespace simt {

enum Class { LOAD, STORE, ATOMICS, SHARED };

struct Request {
    unsigned lanes = 0;
    std::uint64_t address[32];
    std::uint32_t bytes[32] = {};  // by lane; 0: it took no part

    // Passes beyond the first. A pass serves as many lanes as fill 32 banks of 4 bytes; a word is read once
    // for all.
    unsigned bank_conflicts() const {
        unsigned per_pass = 128 / std::max(4u, *std::max_element(bytes, bytes + 32)), conflicts = 0;
        for (unsigned first = 0; first < 32; first += per_pass) {
            std::vector<std::uint64_t> words;
            for (unsigned i = first; i < first + per_pass; ++i)
                for (std::uint64_t w = address[i] / 4; bytes[i] && w <= (address[i] + bytes[i] - 1) / 4; ++w)
                    words.push_back(w);
            std::sort(words.begin(), words.end());
            words.erase(std::unique(words.begin(), words.end()), words.end());
            unsigned in_bank[32] = {};
            for (std::uint64_t w : words) ++in_bank[w % 32];
            conflicts += std::max(1u, *std::max_element(in_bank, in_bank + 32)) - 1;
        }
        return conflicts;
    }

    // A byte or a sector that several lanes ask for moves once.
    void add_to(Traffic& t) const {
        std::vector<std::pair<std::uint64_t, std::uint64_t>> spans;
        for (unsigned i = 0; i < 32; ++i)
            if (bytes[i]) spans.push_back({address[i], address[i] + bytes[i]});
        std::sort(spans.begin(), spans.end());
        std::uint64_t byte = 0, sector = 0;  // the first that is not counted yet
        for (auto [begin, end] : spans) {
            if (end > byte) t.bytes += end - std::max(begin, byte), byte = end;
            std::uint64_t past = (end + 31) / 32;
            if (past > sector) t.sectors += past - std::max(begin / 32, sector), sector = past;
        }
        ++t.requests;
    }
};

class WarpTraffic {
  public:
    void record(unsigned lane, unsigned lanes, std::uintptr_t instruction, Class c, const char* p,
                std::size_t bytes, Counts& counts) {
        Site& s = sites_[instruction * 4 + c];
        std::size_t k = s.executed[lane]++ - s.closed;
        if (k >= s.open.size()) s.open.resize(k + 1);
        Request& r = s.open[k];
        r.address[lane] = reinterpret_cast<std::uint64_t>(p);
        r.bytes[lane] = bytes;
        ++r.lanes;
        for (; !s.open.empty() && s.open.front().lanes == lanes; ++s.closed) {
            count(s.open.front(), c, counts);
            s.open.pop_front();
        }
    }

    // The lanes are in step again: what is still open was executed by some of them only.
    void converge(Counts& counts) {
        for (auto& [key, s] : sites_) {
            for (Request& r : s.open) count(r, Class(key & 3), counts);
            s = Site();
        }
    }

  private:
    struct Site {
        std::uint32_t executed[32] = {}, closed = 0;  // by each lane; requests that are counted
        std::deque<Request> open;
    };
    static void count(const Request& r, Class c, Counts& counts) {
        if (c == SHARED) {
            ++counts.shared_requests;
            counts.bank_conflicts += r.bank_conflicts();
        } else {
            r.add_to(c == LOAD ? counts.loads : c == STORE ? counts.stores : counts.atomics);
        }
    }
    std::unordered_map<std::uint64_t, Site> sites_;  // by instruction * 4 + class
};

}  // namespace simt
