// What this machine is to the CPU kernels: its instruction sets, its cache and its pages.
#pragma once

#include <stdio.h>

#include <stdexcept>
#include <string>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu.h"

namespace snnfast {
namespace {

// ---- the instruction set, chosen once, best first ----
const CpuKernels* const kAllKernels[] = {
#define SNNFAST_ENTRY(set) &cpu_kernels_##set,
    SNNFAST_CPU_SETS(SNNFAST_ENTRY)
#undef SNNFAST_ENTRY
};

bool processor_has(const std::string& set) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (set == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (set == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return set == "baseline";
}

const CpuKernels* best_kernels() {
  for (const CpuKernels* kernels : kAllKernels)
    if (processor_has(kernels->name)) return kernels;
  return nullptr;  // cannot happen: the baseline is always built and always runs
}

const CpuKernels* kernels = best_kernels();

std::vector<std::string> cpu_sets() {
  std::vector<std::string> names;
  for (const CpuKernels* k : kAllKernels)
    if (processor_has(k->name)) names.push_back(k->name);
  return names;
}

void set_cpu_set(const std::string& name) {
  for (const CpuKernels* k : kAllKernels)
    if (name == k->name && processor_has(name)) {
      kernels = k;
      return;
    }
  throw std::invalid_argument("instruction set '" + name + "' is not built or this processor lacks it");
}

// ---- memory of large outputs ----
int64_t last_level_cache() {
  constexpr int64_t usual = int64_t(32) << 20;
#ifdef __linux__
  // Not sysconf: on AMD processors glibc reports the sum over the socket, of which a core uses one part.
  if (FILE* file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    long kibibytes = 0;
    const int found = fscanf(file, "%ldK", &kibibytes);
    fclose(file);
    if (found == 1 && kibibytes > 0) return int64_t(kibibytes) << 10;
  }
#endif
  return usual;
}

// Whoever reads the spikes next finds them in the cache unless they would not fit beside their input anyway.
int64_t stream_stores_from = last_level_cache() / 2;

// Fresh memory costs a page fault per 4 KiB, more than the kernel itself; 2 MiB pages cost few.
void advise_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  const uintptr_t first = (uintptr_t(begin) + huge - 1) / huge * huge;
  const uintptr_t last = (uintptr_t(begin) + bytes) / huge * huge;
  if (last >= first + huge) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace snnfast
