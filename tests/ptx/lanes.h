// The registers of a warp, and the instructions that compute: each lane by itself, rounded as PTX says.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "program.h"

namespace ptx {

constexpr int kLanes = 32;

struct Grid {
  uint32_t blocks[3], threads[3];
};

class Lanes {
 protected:
  explicit Lanes(const Grid& grid) : grid_(grid) {}

  struct Warp {
    std::vector<uint64_t> registers;  // [register, lane]
    uint32_t live = 0, waiting = 0;   // lanes; waiting for the block's barrier
    int pc[kLanes] = {};
    int64_t first_thread = 0;
    int shuffles = 0;
  };

  template <class F>
  static void for_each(uint32_t lanes, F f) {
    for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
  }

  // ---- registers ----
  uint64_t& word(uint64_t number, int lane) { return w_->registers[number * kLanes + size_t(lane)]; }

  uint64_t special(uint64_t which, int lane) const {
    const int64_t thread = w_->first_thread + lane;
    const auto position = [](int64_t linear, const uint32_t* extent, uint64_t axis) {
      const int64_t x = linear % extent[0], rest = linear / extent[0];
      return uint64_t(axis == 0 ? x : axis == 1 ? rest % extent[1] : rest / extent[1]);
    };
    switch (Special(which / 4)) {
      case Special::kTid:
        return position(thread, grid_.threads, which % 4);
      case Special::kNtid:
        return grid_.threads[which % 4];
      case Special::kCtaid:
        return position(block_, grid_.blocks, which % 4);
      case Special::kNctaid:
        return grid_.blocks[which % 4];
      default:
        return uint64_t(lane);
    }
  }

  template <class T>
  T get(const Operand& o, int lane) {
    const uint64_t bits = o.kind == Operand::kRegister    ? word(o.value, lane)
                          : o.kind == Operand::kImmediate ? o.value
                                                          : special(o.value, lane);
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
  }
  template <class T>
  void set(const Operand& o, int lane, T value) {
    if (o.kind == Operand::kNone) return;
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    word(o.value, lane) = bits;
  }

  // f(a value of the type)
  template <class F>
  static void with_type(Type t, F f) {
    if (t.kind == 'f' && t.bits == 32) return f(float());
    if (t.kind == 'f' && t.bits == 64) return f(double());
    if (t.kind == 's' && t.bits == 16) return f(int16_t());
    if (t.kind == 's' && t.bits == 32) return f(int32_t());
    if (t.kind == 's' && t.bits == 64) return f(int64_t());
    if (t.kind == 'f' || t.kind == 'h') fail("no arithmetic in 16 bits");
    if (t.bits == 16) return f(uint16_t());
    if (t.bits == 32) return f(uint32_t());
    f(uint64_t());
  }
  template <class F>
  static void with_integer(Type t, F f) {
    with_type(t, [&](auto zero) {
      if constexpr (std::is_integral_v<decltype(zero)>)
        f(zero);
      else
        fail("an integer was expected");
    });
  }
  template <class F>
  static void with_float(Type t, F f) {
    with_type(t, [&](auto zero) {
      if constexpr (std::is_floating_point_v<decltype(zero)>)
        f(zero);
      else
        fail("a floating-point number was expected");
    });
  }

  template <class T>
  static T flushed(const Instruction& i, T value) {
    if constexpr (std::is_same_v<T, float>)
      if (i.has("ftz") && std::fpclassify(value) == FP_SUBNORMAL) return std::copysign(0.0f, value);
    return value;
  }
  // out = f(in...), each lane by itself
  template <class T, class F>
  void map(const Instruction& i, uint32_t mask, F f) {
    for_each(mask, [&](int lane) {
      const auto in = [&](int k) { return flushed(i, get<T>(i.in[size_t(k)], lane)); };
      T value;
      if constexpr (std::is_invocable_v<F, T, T, T>)
        value = f(in(0), in(1), in(2));
      else if constexpr (std::is_invocable_v<F, T, T>)
        value = f(in(0), in(1));
      else
        value = f(in(0));
      set<T>(i.out[0], lane, flushed(i, value));
    });
  }

  // ---- 16 bits ----
  static float widened(Type t, uint16_t bits) {
    if (t.kind == 'h') {
      const uint32_t wide = uint32_t(bits) << 16;
      float value;
      memcpy(&value, &wide, 4);
      return value;
    }
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(float(fraction), -24)
                                       : std::ldexp(float(fraction | 1024), exponent - 25);
    return bits >> 15 ? -size : size;
  }
  static uint16_t narrowed(Type t, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (t.kind == 'h') {
      if (std::isnan(value)) return 0x7fff;
      return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (std::isnan(value)) return 0x7fff;
    const float size = std::fabs(value);
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    const float scaled = std::nearbyint(std::ldexp(size, 10 - exponent));  // to even
    const int whole = int(scaled);
    return uint16_t(sign | (size < 0x1p-14f ? whole : (exponent + 15) * 1024 + (whole - 1024)));
  }

  // ---- instructions ----
  void compute(const Instruction& i, uint32_t mask) {
    const Type type = i.types.empty() ? Type{} : i.types[0];
    if (type.bits == 16 && (type.kind == 'f' || type.kind == 'h') && i.code <= kMul && i.code != kMov) {
      return for_each(mask, [&](int lane) {
        const float a = widened(type, get<uint16_t>(i.in[0], lane)), b = widened(type, get<uint16_t>(i.in[1], lane));
        set<uint16_t>(i.out[0], lane, narrowed(type, i.code == kAdd ? a + b : i.code == kSub ? a - b : a * b));
      });
    }
    switch (i.code) {
      case kMov:
        return mov(i, mask, type);
      case kAdd:
        return with_type(type,
                         [&](auto z) { map<decltype(z)>(i, mask, [](auto a, auto b) { return decltype(z)(a + b); }); });
      case kSub:
        return with_type(type,
                         [&](auto z) { map<decltype(z)>(i, mask, [](auto a, auto b) { return decltype(z)(a - b); }); });
      case kMul:
        return mul(i, mask, type, false);
      case kMad:
        return mul(i, mask, type, true);
      case kFma:
        return with_float(
            type, [&](auto z) { map<decltype(z)>(i, mask, [](auto a, auto b, auto c) { return std::fma(a, b, c); }); });
      case kDiv:
        return div(i, mask, type);
      case kRem:
        return with_integer(type, [&](auto z) {
          map<decltype(z)>(i, mask, [](auto a, auto b) { return b ? decltype(z)(a % b) : a; });
        });
      case kNeg:
        return with_type(type, [&](auto z) { map<decltype(z)>(i, mask, [](auto a) { return decltype(z)(-a); }); });
      case kAbs:
        return with_type(type, [&](auto z) {
          map<decltype(z)>(i, mask, [](auto a) { return decltype(z)(std::signbit(double(a)) ? -a : a); });
        });
      case kMin:
        return extreme(i, mask, type, true);
      case kMax:
        return extreme(i, mask, type, false);
      case kAnd:
        return map<uint64_t>(i, mask, [](uint64_t a, uint64_t b) { return a & b; });
      case kOr:
        return map<uint64_t>(i, mask, [](uint64_t a, uint64_t b) { return a | b; });
      case kXor:
        return map<uint64_t>(i, mask, [](uint64_t a, uint64_t b) { return a ^ b; });
      case kNot:
        return map<uint64_t>(i, mask, [&](uint64_t a) { return type.kind == 'p' ? uint64_t(!a) : ~a; });
      case kShl:
        return shift(i, mask, type, true);
      case kShr:
        return shift(i, mask, type, false);
      case kSetp:
        return setp(i, mask, type);
      case kSelp:
        return for_each(mask, [&](int lane) {
          set<uint64_t>(i.out[0], lane, get<uint64_t>(i.in[get<uint64_t>(i.in[2], lane) ? 0 : 1], lane));
        });
      case kCvt:
        return cvt(i, mask);
      case kCvta:
        return map<uint64_t>(i, mask, [](uint64_t a) { return a; });
      case kEx2:
        return map<float>(i, mask, [](float a) { return std::exp2(a); });
      case kRcp:
        return with_float(type, [&](auto z) { map<decltype(z)>(i, mask, [](auto a) { return 1 / a; }); });
      case kSqrt:
        return with_float(type, [&](auto z) { map<decltype(z)>(i, mask, [](auto a) { return std::sqrt(a); }); });
      case kBfe:
        if (type.bits != 32) fail("bfe of 64 bits");
        return for_each(mask, [&](int lane) {
          const int from = int(get<uint32_t>(i.in[1], lane) & 255), length = int(get<uint32_t>(i.in[2], lane) & 255);
          if (length < 1 || from + length > 32) fail("bfe of bits that are not there");
          const uint32_t top = get<uint32_t>(i.in[0], lane) << (32 - from - length);
          set<uint32_t>(i.out[0], lane,
                        type.kind == 's' ? uint32_t(int32_t(top) >> (32 - length)) : top >> (32 - length));
        });
      case kBfi:
        return for_each(mask, [&](int lane) {
          const uint32_t from = get<uint32_t>(i.in[2], lane) & 255, length = get<uint32_t>(i.in[3], lane) & 255;
          const uint64_t bits = (length >= 64 ? ~0ull : (1ull << length) - 1) << from;
          const uint64_t value = (get<uint64_t>(i.in[0], lane) << from & bits) | (get<uint64_t>(i.in[1], lane) & ~bits);
          set<uint64_t>(i.out[0], lane, value & (type.bits == 32 ? 0xffffffffull : ~0ull));
        });
      case kPrmt:
        return for_each(mask, [&](int lane) {
          const uint64_t bytes = get<uint32_t>(i.in[0], lane) | uint64_t(get<uint32_t>(i.in[1], lane)) << 32;
          const uint32_t choice = get<uint32_t>(i.in[2], lane);
          uint32_t value = 0;
          for (int k = 0; k < 4; ++k) value |= uint32_t(bytes >> (choice >> 4 * k & 7) * 8 & 255) << 8 * k;
          if (choice & 0x8888) fail("prmt with signs");
          set<uint32_t>(i.out[0], lane, value);
        });
      default:
        fail("cannot run this");
    }
  }

  void mov(const Instruction& i, uint32_t mask, Type type) {
    const int parts = int(i.out.size() * i.in.size()), bits = type.bits / parts;
    for_each(mask, [&](int lane) {
      if (parts == 1) return set<uint64_t>(i.out[0], lane, get<uint64_t>(i.in[0], lane));
      const uint64_t low = bits == 64 ? ~0ull : (1ull << bits) - 1;
      if (i.in.size() == 1) {
        const uint64_t whole = get<uint64_t>(i.in[0], lane);
        for (size_t k = 0; k < i.out.size(); ++k) set<uint64_t>(i.out[k], lane, whole >> (bits * int(k)) & low);
        return;
      }
      uint64_t whole = 0;
      for (size_t k = 0; k < i.in.size(); ++k) whole |= (get<uint64_t>(i.in[k], lane) & low) << (bits * int(k));
      set<uint64_t>(i.out[0], lane, whole);
    });
  }

  // Products of integers are taken in 128 bits, so that nothing overflows here.
  void mul(const Instruction& i, uint32_t mask, Type type, bool add) {
    if (type.kind == 'f') {
      if (add) fail("mad of floating-point numbers");
      return with_float(type, [&](auto z) { map<decltype(z)>(i, mask, [](auto a, auto b) { return a * b; }); });
    }
    with_integer(type, [&](auto z) {
      using T = decltype(z);
      for_each(mask, [&](int lane) {
        const __int128 product = __int128(get<T>(i.in[0], lane)) * __int128(get<T>(i.in[1], lane));
        if (i.has("wide")) {
          const uint64_t sum = uint64_t(product) + (add ? get<uint64_t>(i.in[2], lane) : 0);
          return set<uint64_t>(i.out[0], lane, type.bits == 16 ? uint32_t(sum) : sum);
        }
        const __int128 part = i.has("hi") ? product >> type.bits : product;
        set<T>(i.out[0], lane, T(uint64_t(part) + (add ? uint64_t(get<T>(i.in[2], lane)) : 0)));
      });
    });
  }

  void div(const Instruction& i, uint32_t mask, Type type) {
    with_type(type, [&](auto z) {
      using T = decltype(z);
      map<T>(i, mask, [&](T a, T b) -> T {
        if constexpr (std::is_integral_v<T>) {
          if (b == 0) fail("division by 0");
          return T(a / b);
        } else {
          // The approximation goes by a reciprocal, which is too small beyond 2^126.
          if (i.has("approx") && std::fabs(b) > T(0x1p126f)) return std::isinf(a) ? T(NAN) : T(0);
          return a / b;
        }
      });
    });
  }

  void extreme(const Instruction& i, uint32_t mask, Type type, bool least) {
    with_type(type, [&](auto z) {
      using T = decltype(z);
      map<T>(i, mask, [&](T a, T b) {
        if (a != a) return b;
        if (b != b) return a;
        return (least ? b < a : a < b) ? b : a;
      });
    });
  }

  void shift(const Instruction& i, uint32_t mask, Type type, bool left) {
    with_integer(type, [&](auto z) {
      using T = decltype(z);
      for_each(mask, [&](int lane) {
        const T value = get<T>(i.in[0], lane);
        const uint32_t by = get<uint32_t>(i.in[1], lane);
        const bool all = by >= uint32_t(type.bits);
        if (left)
          set<T>(i.out[0], lane, all ? T(0) : T(uint64_t(value) << by));
        else
          set<T>(i.out[0], lane, T(value >> (all ? type.bits - 1 : int(by)) >> (all && value > 0 ? 1 : 0)));
      });
    });
  }

  void setp(const Instruction& i, uint32_t mask, Type type) {
    const std::string& how = i.modifiers.at(0);
    if (i.in.size() != 2 || i.out.size() != 1) fail("setp with more than two operands");
    with_type(type, [&](auto z) {
      using T = decltype(z);
      for_each(mask, [&](int lane) {
        const T a = flushed(i, get<T>(i.in[0], lane)), b = flushed(i, get<T>(i.in[1], lane));
        const bool unordered = a != a || b != b;
        bool yes;
        if (how == "eq" || how == "equ")
          yes = a == b;
        else if (how == "ne" || how == "neu")
          yes = !unordered && a != b;
        else if (how == "lt" || how == "ltu" || how == "lo")
          yes = a < b;
        else if (how == "le" || how == "leu" || how == "ls")
          yes = a <= b;
        else if (how == "gt" || how == "gtu" || how == "hi")
          yes = a > b;
        else if (how == "ge" || how == "geu" || how == "hs")
          yes = a >= b;
        else if (how == "nan")
          yes = unordered;
        else if (how == "num")
          yes = !unordered;
        else
          fail("which comparison?");
        if (unordered && how.size() == 3 && how[2] == 'u') yes = true;
        set<uint64_t>(i.out[0], lane, yes);
      });
    });
  }

  void cvt(const Instruction& i, uint32_t mask) {
    const Type to = i.types.at(0), from = i.types.at(1);
    for_each(mask, [&](int lane) {
      if (to.bits == -32 || (to.kind == 'h' && to.bits == 32)) {  // two at once, the first in the upper half
        const Type half{to.kind, 16};
        const uint32_t high = narrowed(half, get<float>(i.in[0], lane)),
                       low = narrowed(half, get<float>(i.in[1], lane));
        return set<uint32_t>(i.out[0], lane, high << 16 | low);
      }
      if (to.bits == 16 && (to.kind == 'f' || to.kind == 'h')) {
        if (from.kind != 'f' || from.bits != 32 || !i.has("rn")) fail("cannot convert this");
        return set<uint16_t>(i.out[0], lane, narrowed(to, get<float>(i.in[0], lane)));
      }
      if (from.bits == 16 && (from.kind == 'f' || from.kind == 'h')) {
        const float value = widened(from, get<uint16_t>(i.in[0], lane));
        if (to.kind != 'f') fail("cannot convert this");
        return to.bits == 64 ? set<double>(i.out[0], lane, value) : set<float>(i.out[0], lane, value);
      }
      if (to.bits == 8 || from.bits == 8) fail("cannot convert this");
      with_type(from, [&](auto a) {
        const auto value = flushed(i, get<decltype(a)>(i.in[0], lane));
        with_type(to, [&](auto b) { set(i.out[0], lane, flushed(i, converted<decltype(b)>(i, value))); });
      });
    });
  }
  template <class To, class From>
  static To converted(const Instruction& i, From value) {
    if constexpr (std::is_floating_point_v<From>) {
      const From whole = i.has("rzi")   ? std::trunc(value)
                         : i.has("rmi") ? std::floor(value)
                         : i.has("rpi") ? std::ceil(value)
                         : i.has("rni") ? std::nearbyint(value)
                                        : value;
      if constexpr (std::is_integral_v<To>) {
        if (value != value) return 0;
        const long double limit = whole;
        if (limit <= (long double)std::numeric_limits<To>::min()) return std::numeric_limits<To>::min();
        if (limit >= (long double)std::numeric_limits<To>::max()) return std::numeric_limits<To>::max();
      }
      return To(whole);
    } else {
      return To(value);
    }
  }

  const Grid grid_;
  int64_t block_ = 0;
  Warp* w_ = nullptr;
};

}  // namespace ptx
