// Products of a few rows with a matrix that no cache holds: every weight is read once, in order, for all rows.
//
// Layout: panels of kWidth outputs, [outputs / kWidth, inputs, kWidth], the last one padded. A row's sums run over the
// inputs in order and do not depend on how many rows there are.

#include <cstdint>

// torch.compile's flags keep products and sums apart
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16, kMostRows = 12;  // 24 of 32 registers hold sums
#elif defined(__AVX__)
constexpr int kLanes = 8, kMostRows = 6;  // 12 of 16
#elif defined(__aarch64__)
constexpr int kLanes = 4, kMostRows = 12;
#else
constexpr int kLanes = 4, kMostRows = 6;
#endif

constexpr int kWidth = 2 * kLanes;
constexpr int kCacheLine = 16;  // floats
constexpr int kAhead = 1024;    // floats read ahead: processors stop doing so at the end of a page

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

template <int kRows>
static void multiply(const float* x, const float* panel, const float* bias, float* out,
                     int64_t inputs, int64_t outputs, int64_t width) {
  Vector sums[kRows][2] = {};
  for (int64_t input = 0; input < inputs; ++input, panel += kWidth) {
    for (int line = 0; line < kWidth; line += kCacheLine) __builtin_prefetch(panel + kAhead + line);
    const Vector left = *(const Vector*)panel, right = *(const Vector*)(panel + kLanes);
    for (int row = 0; row < kRows; ++row) {
      sums[row][0] += x[row * inputs + input] * left;
      sums[row][1] += x[row * inputs + input] * right;
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int64_t output = 0; output < width; ++output)
      out[row * outputs + output] = sums[row][output / kLanes][output % kLanes] + (bias ? bias[output] : 0.0f);
}

typedef void (*Multiply)(const float*, const float*, const float*, float*, int64_t, int64_t, int64_t);

template <int kRows>
struct Table : Table<kRows - 1> {
  Table() { this->with_rows[kRows] = multiply<kRows>; }
};

template <>
struct Table<0> {
  Multiply with_rows[kMostRows + 1] = {};
};

extern "C" int64_t panel_width() { return kWidth; }

extern "C" void linear(const float* x, const float* panels, const float* bias, float* out,
                       int64_t rows, int64_t inputs, int64_t outputs) {
  static const Table<kMostRows> table;
  const int64_t groups = (rows + kMostRows - 1) / kMostRows;
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < outputs; first += kWidth) {
    const int64_t width = outputs - first < kWidth ? outputs - first : kWidth;
    for (int64_t group = 0, row = 0; group < groups; ++group) {
      const int64_t end = rows * (group + 1) / groups;
      table.with_rows[end - row](x + row * inputs, panels + first * inputs, bias ? bias + first : nullptr,
                                 out + row * outputs + first, inputs, outputs, width);
      row = end;
    }
  }
}
