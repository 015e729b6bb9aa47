// Runs a kernel's PTX on the CPU, instruction by instruction: 32 lanes a warp, those that diverge taking turns,
// barriers and shuffles as on a GPU. It watches what a GPU would not: accesses off their boundary, threads that write
// what others read or write with nothing that orders them, shuffles with lanes that are not there.
#pragma once

#include <memory>

#include "lanes.h"

namespace ptx {

// What a launch did, for all threads together. Sectors are pieces of 32 bytes, the unit of a GPU's memory accesses.
struct Counts {
  int64_t instructions = 0, slots = 0;  // by thread, and by warp
  int64_t loads = 0, stores = 0, load_sectors = 0, store_sectors = 0, bytes_loaded = 0, bytes_stored = 0;
  int64_t distinct_loaded = 0, distinct_stored = 0;  // bytes, each counted once
  int64_t launches = 0;
};

// A thread, or several (-2) of those below; at what time by the barriers of its block and the shuffles of its warp.
struct Who {
  int64_t thread = -1, warp = -1, block = -1;
  int barriers = 0, shuffles = 0;
};
// Who touched a byte last. Two threads may do so where a barrier of their block or a shuffle of their warp lies
// between.
struct Touch {
  Who writer, reader;
};

class Machine : Lanes {
 public:
  Machine(const Kernel& kernel, const Grid& grid, const std::vector<uint8_t>& parameters, int dynamic_shared)
      : Lanes(grid), kernel_(kernel), parameters_(parameters), shared_bytes_(kernel.shared_bytes + dynamic_shared) {
    executed.assign(kernel.code.size(), 0);
  }

  void run(int64_t first_block = 0) {
    const int64_t blocks = int64_t(grid_.blocks[0]) * grid_.blocks[1] * grid_.blocks[2];
    for (int64_t block = first_block; block < blocks; ++block) run_block(block);
    for (const auto& [_, line] : touched_)
      for (const Touch& t : line->bytes) {
        counts.distinct_loaded += t.reader.thread != -1;
        counts.distinct_stored += t.writer.thread != -1;
      }
  }

  Counts counts;
  std::vector<int64_t> executed;  // by warp, of each instruction of the kernel

 private:
  struct Line {
    Touch bytes[32];
  };

  void run_block(int64_t block) {
    block_ = block;
    threads_ = int(grid_.threads[0] * grid_.threads[1] * grid_.threads[2]);
    barriers_ = 0;
    shared_.assign(size_t(shared_bytes_), 0xff);  // NaN
    shared_touched_.assign(size_t(shared_bytes_), Touch{});
    std::vector<Warp> warps(size_t(threads_ + kLanes - 1) / kLanes);
    for (size_t w = 0; w < warps.size(); ++w) {
      warps[w].registers.assign(size_t(kernel_.registers) * kLanes, 0xaaaaaaaaaaaaaaaa);
      warps[w].first_thread = int64_t(w) * kLanes;
      const int lanes = std::min(kLanes, threads_ - int(w) * kLanes);
      warps[w].live = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    }
    for (;;) {
      bool waiting = false;
      for (Warp& w : warps) {
        run_warp(w);
        waiting = waiting || w.live;
      }
      if (!waiting) return;
      ++barriers_;  // every thread that is still there has reached the barrier
      for (Warp& w : warps) w.waiting = 0;
    }
  }

  void run_warp(Warp& w) {
    w_ = &w;
    uint32_t held = 0;  // by a shuffle whose other lanes are still to come
    for (;;) {
      const uint32_t able = w.live & ~w.waiting & ~held;
      if (!able) {
        if (held) fail("a shuffle waits for lanes that do not come");
        return;
      }
      // The lanes that are furthest behind go first, so that paths meet again.
      int pc = std::numeric_limits<int>::max();
      for_each(able, [&](int lane) { pc = std::min(pc, w.pc[lane]); });
      uint32_t together = 0;
      for_each(able, [&](int lane) { together |= uint32_t(w.pc[lane] == pc) << lane; });
      do {
        if (size_t(pc) >= kernel_.code.size()) {
          w.live &= ~together;
          break;
        }
        const Instruction& i = kernel_.code[size_t(pc)];
        uint32_t mask = together;
        if (i.predicate >= 0)
          for_each(together, [&](int lane) {
            if (bool(word(i.predicate, lane)) == i.negated) mask &= ~(1u << lane);
          });
        counts.instructions += __builtin_popcount(mask);
        ++counts.slots;
        ++executed[size_t(pc)];
        if (i.code == kShfl) {
          const uint32_t members = uint32_t(get<uint32_t>(i.in[3], __builtin_ctz(mask | 1u << 31)));
          if (members & ~w.live) fail("a shuffle names lanes that have ended: " + i.text);
          if (members & ~mask) {
            held |= mask;
            uint32_t arrived = 0;
            for_each(w.live & ~w.waiting, [&](int lane) { arrived |= uint32_t(w.pc[lane] == pc) << lane; });
            if ((arrived & members) != members || (held & members) != members) break;
            mask = together = members;
            held &= ~members;
          }
        }
        if (i.code == kBra) {
          for_each(together, [&](int lane) { w.pc[lane] = mask >> lane & 1 ? i.target : pc + 1; });
          break;
        }
        if (i.code == kRet) {
          w.live &= ~mask;
          together &= ~mask;
        } else if (i.code == kBar) {
          w.waiting |= mask;
        } else if (mask) {
          try {
            step(i, mask);
          } catch (const std::runtime_error& error) {
            throw std::runtime_error(error.what() + (": " + i.text));
          }
        }
        ++pc;
        for_each(together, [&](int lane) { w.pc[lane] = pc; });
        if (i.code == kBar || i.code == kRet) break;
      } while (together == able);  // else others may wait at the next
    }
  }

  // ---- memory ----
  Who who(int lane) const {
    const int64_t thread = block_ * threads_ + w_->first_thread + lane;
    return Who{thread, (block_ * threads_ + w_->first_thread) / kLanes, block_, barriers_, w_->shuffles};
  }
  static bool ordered(const Who& before, const Who& now) {
    return before.thread == -1 || before.thread == now.thread ||
           (before.block == now.block && before.barriers < now.barriers) ||
           (before.warp == now.warp && before.shuffles < now.shuffles);
  }
  // Several threads may write one and the same value.
  void touch(Touch* first, int bytes, bool write, bool same, const Who& now) const {
    for (Touch* t = first; t < first + bytes; ++t) {
      if (same && t->writer.thread >= 0) continue;
      if (!ordered(t->writer, now)) fail("two threads race, one of them writing");
      if (write && !ordered(t->reader, now)) fail("a thread writes what another reads");
      if (write) {
        t->writer = now;
        continue;
      }
      const Who before = t->reader;
      t->reader = now;
      if (ordered(before, now)) continue;
      t->reader.thread = -2;
      if (before.warp != now.warp) t->reader.warp = -2;
      if (before.block != now.block) t->reader.block = -2;
    }
  }

  void access(const Instruction& i, uint32_t mask, bool write) {
    const std::vector<Operand>& values = write ? value_operands(i) : i.out;
    const Type type = i.types[0];
    const int each = type.bits / 8, bytes = each * int(values.size());
    const bool parameter = i.has("param"), shared = i.has("shared");
    if (!parameter && !shared && !i.has("global")) fail("which memory?");
    std::set<uint64_t> sectors;
    for_each(mask, [&](int lane) {
      uint64_t address = get<uint64_t>(i.in[0], lane) + uint64_t(i.offset);
      if (shared) address &= 0xffffffff;  // they have 32 bits
      if (address % uint64_t(bytes)) fail("an access off its boundary");
      uint8_t* memory = reinterpret_cast<uint8_t*>(address);
      const auto same = [&](const uint8_t* there) { return write && stores_same(values, lane, each, there); };
      if (parameter || shared) {
        std::vector<uint8_t>& space = parameter ? parameters_ : shared_;
        if (address + uint64_t(bytes) > space.size()) fail("an access out of bounds");
        memory = space.data() + address;
        if (shared) touch(&shared_touched_[size_t(address)], bytes, write, same(memory), who(lane));
      } else {
        if (address < 4096) fail("an access to a null pointer");
        sectors.insert(address / 32);
        std::unique_ptr<Line>& line = touched_[address / 32];
        if (!line) line = std::make_unique<Line>();
        touch(&line->bytes[address % 32], bytes, write, same(memory), who(lane));
      }
      for (size_t k = 0; k < values.size(); ++k) {
        uint8_t* at = memory + k * size_t(each);
        if (write) {
          const uint64_t bits = get<uint64_t>(values[k], lane);
          memcpy(at, &bits, size_t(each));
        } else {
          uint64_t bits = 0;
          memcpy(&bits, at, size_t(each));
          if (type.kind == 's' && each < 8) bits = uint64_t(int64_t(bits << (64 - type.bits)) >> (64 - type.bits));
          set<uint64_t>(values[k], lane, bits);
        }
      }
    });
    if (parameter || shared) return;
    (write ? counts.stores : counts.loads) += 1;
    (write ? counts.store_sectors : counts.load_sectors) += int64_t(sectors.size());
    (write ? counts.bytes_stored : counts.bytes_loaded) += int64_t(bytes) * __builtin_popcount(mask);
  }
  std::vector<Operand> value_operands(const Instruction& i) const { return {i.in.begin() + 1, i.in.end()}; }
  bool stores_same(const std::vector<Operand>& values, int lane, int each, const uint8_t* memory) {
    for (size_t k = 0; k < values.size(); ++k) {
      const uint64_t bits = get<uint64_t>(values[k], lane);
      if (memcmp(&bits, memory + k * size_t(each), size_t(each)) != 0) return false;
    }
    return true;
  }

  // Matrices of 8 rows of 8 times 2 bytes in shared memory, a row's address from each of 8 lanes. Every lane has two
  // neighbours of each matrix, or of its transpose.
  void matrix(const Instruction& i, uint32_t mask, bool write) {
    if (mask != ~0u || !i.has("m8n8")) fail("cannot move these matrices");
    const std::vector<Operand> values = write ? value_operands(i) : i.out;
    std::vector<uint32_t> loaded;
    for (int lane = 0; lane < kLanes; ++lane)
      for (int k = 0; k < int(values.size()); ++k) {
        uint16_t halves[2] = {};
        const uint32_t value = write ? get<uint32_t>(values[size_t(k)], lane) : 0;
        memcpy(halves, &value, 4);
        for (int half = 0; half < 2; ++half) {
          int row = lane / 4, column = lane % 4 * 2 + half;
          if (i.has("trans")) std::swap(row, column);
          const uint64_t start = (get<uint64_t>(i.in[0], 8 * k + row) + uint64_t(i.offset)) & 0xffffffff;
          if (start % 16) fail("an access off its boundary");
          if (start + 16 > shared_.size()) fail("an access out of bounds");
          const size_t at = size_t(start) + size_t(column) * 2;
          touch(&shared_touched_[at], 2, write, false, who(lane));
          if (write)
            memcpy(&shared_[at], &halves[half], 2);
          else
            memcpy(&halves[half], &shared_[at], 2);
        }
        loaded.push_back(uint32_t(halves[1]) << 16 | halves[0]);
      }
    if (write) return;
    for (size_t lane = 0, n = 0; lane < kLanes; ++lane)  // only now: an address may be among them
      for (const Operand& o : values) set<uint32_t>(o, int(lane), loaded[n++]);
  }

  void step(const Instruction& i, uint32_t mask) {
    switch (i.code) {
      case kLd:
        return access(i, mask, false);
      case kSt:
        return access(i, mask, true);
      case kLdmatrix:
        return matrix(i, mask, false);
      case kStmatrix:
        return matrix(i, mask, true);
      case kShfl:
        return shfl(i, mask);
      default:
        return compute(i, mask);
    }
  }

  void shfl(const Instruction& i, uint32_t mask) {
    ++w_->shuffles;
    uint32_t values[kLanes] = {};
    for_each(mask, [&](int lane) { values[lane] = get<uint32_t>(i.in[0], lane); });
    for_each(mask, [&](int lane) {
      const int b = int(get<uint32_t>(i.in[1], lane) & 31), clamp = int(get<uint32_t>(i.in[2], lane));
      const int segment = clamp >> 8 & 31, least = lane & segment, most = least | (clamp & 31 & ~segment);
      int from;
      bool inside;
      if (i.has("down"))
        from = lane + b, inside = from <= most;
      else if (i.has("bfly"))
        from = lane ^ b, inside = from <= most;
      else if (i.has("up"))
        from = lane - b, inside = from >= most;
      else
        from = least | (b & ~segment), inside = from <= most;
      if (!inside) from = lane;
      if (!(mask >> from & 1)) fail("a shuffle reads a lane that takes no part");
      set<uint32_t>(i.out[0], lane, values[from]);
      if (i.out.size() > 1) set<uint64_t>(i.out[1], lane, inside);
    });
  }

  const Kernel& kernel_;
  std::vector<uint8_t> parameters_, shared_;
  const int shared_bytes_;
  std::vector<Touch> shared_touched_;
  std::unordered_map<uint64_t, std::unique_ptr<Line>> touched_;
  int threads_ = 0, barriers_ = 0;
};

}  // namespace ptx
