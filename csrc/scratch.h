// Memory that a kernel works in, handed out piece by piece.
#pragma once

#include "scalar.h"

namespace cogsym {
namespace COGSYM_ISA {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out the scratch; without memory it only counts.
class Arena {
  public:
    explicit Arena(Scratch scratch) : memory_(static_cast<char*>(scratch.memory)) {}
    template <class E>
    E* take(int64_t count) {
        char* place = memory_ ? memory_ + used_ : nullptr;
        used_ += (count * int64_t(sizeof(E)) + 63) / 64 * 64;
        return reinterpret_cast<E*>(place);
    }
    int64_t used() const { return used_; }

  private:
    char* memory_;
    int64_t used_ = 0;
};

// f(row, column, n, offset) for runs of n elements that lie in one row, offset being their place in a contiguous
// [rows, columns]. Cut by elements, not by rows: decoding has one row.
constexpr int64_t run_piece = 4096;
template <class F>
inline void for_runs(int64_t rows, int64_t columns, int num_threads, F f) {
    const int64_t total = rows * columns;
    parallel_for((total + run_piece - 1) / run_piece, total, num_threads, [&](int64_t piece) {
        const int64_t end = smaller((piece + 1) * run_piece, total);
        for (int64_t i = piece * run_piece; i < end;) {
            const int64_t row = i / columns, column = i % columns, n = smaller(columns - column, end - i);
            f(row, column, n, i);
            i += n;
        }
    });
}

}  // namespace COGSYM_ISA
}  // namespace cogsym
