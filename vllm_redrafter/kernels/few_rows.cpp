// Products of a few rows with a matrix that no cache holds, at the speed of memory: weights are read once for all rows.
//
// Layout: panels of kWidth outputs, [outputs / kWidth, inputs, kWidth], the last one padded. Rows are multiplied in
// groups whose sums fit the registers, group after group with one block of a panel, which the first level of cache
// holds; meanwhile the next block is on its way. A row's sums run over the inputs in order, whatever the other rows.

#include <cstdint>

// torch.compile's flags keep products and sums apart
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16, kGroup = 12;  // rows whose sums take 24 of 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8, kGroup = 6;  // 12 of 16
#elif defined(__aarch64__)
constexpr int kLanes = 4, kGroup = 12;
#else
constexpr int kLanes = 4, kGroup = 6;
#endif

constexpr int kWidth = 2 * kLanes;
constexpr int kCacheLine = 16;              // floats
constexpr int64_t kBlock = 1024 / kWidth;   // inputs: 4 KiB of weights
constexpr int64_t kMostRows = 8 * kGroup;   // whose sums are kept beside them

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Adds the products of kRows rows with a block to their sums, and fetches this group's share of what lies kBlock behind.
template <int kRows>
static void add_products(const float* x, const float* block, float* sums, int64_t inputs, int64_t length,
                         int64_t group, int64_t groups) {
  Vector left[kRows], right[kRows];
  for (int row = 0; row < kRows; ++row) {
    left[row] = *(const Vector*)(sums + row * kWidth);
    right[row] = *(const Vector*)(sums + row * kWidth + kLanes);
  }
  const int64_t share = length / groups;
  const float* ahead = block + (kBlock + group * share) * kWidth;
  for (int64_t input = 0; input < length; ++input) {
    if (input < share)
      for (int line = 0; line < kWidth; line += kCacheLine) __builtin_prefetch(ahead + input * kWidth + line);
    const Vector first = *(const Vector*)(block + input * kWidth);
    const Vector second = *(const Vector*)(block + input * kWidth + kLanes);
    for (int row = 0; row < kRows; ++row) {
      left[row] += x[row * inputs + input] * first;
      right[row] += x[row * inputs + input] * second;
    }
  }
  for (int row = 0; row < kRows; ++row) {
    *(Vector*)(sums + row * kWidth) = left[row];
    *(Vector*)(sums + row * kWidth + kLanes) = right[row];
  }
}

typedef void (*AddProducts)(const float*, const float*, float*, int64_t, int64_t, int64_t, int64_t);

template <int kRows>
struct Table : Table<kRows - 1> {
  Table() { this->with_rows[kRows] = add_products<kRows>; }
};

template <>
struct Table<0> {
  AddProducts with_rows[kGroup + 1] = {};
};

// Writes the products of at most kMostRows rows with a panel, of which `width` outputs are no padding.
static void multiply(const float* x, const float* panel, const float* bias, float* out,
                     int64_t rows, int64_t inputs, int64_t outputs, int64_t width) {
  static const Table<kGroup> table;
  const int64_t groups = (rows + kGroup - 1) / kGroup;
  const int64_t step = groups == 1 ? inputs : kBlock;  // nobody else waits for the block
  float sums[kMostRows * kWidth] = {};
  for (int64_t input = 0; input < inputs; input += step) {
    const int64_t length = inputs - input < step ? inputs - input : step;
    for (int64_t group = 0, row = 0; group < groups; ++group) {
      const int64_t end = rows * (group + 1) / groups;
      table.with_rows[end - row](x + row * inputs + input, panel + input * kWidth, sums + row * kWidth, inputs, length,
                                 group, groups);
      row = end;
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t output = 0; output < width; ++output)
      out[row * outputs + output] = sums[row * kWidth + output] + (bias ? bias[output] : 0.0f);
}

extern "C" int64_t panel_width() { return kWidth; }

extern "C" void linear(const float* x, const float* panels, const float* bias, float* out,
                       int64_t rows, int64_t inputs, int64_t outputs) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < outputs; first += kWidth) {
    const int64_t width = outputs - first < kWidth ? outputs - first : kWidth;
    for (int64_t row = 0; row < rows; row += kMostRows)
      multiply(x + row * inputs, panels + first * inputs, bias ? bias + first : nullptr, out + row * outputs + first,
               rows - row < kMostRows ? rows - row : kMostRows, inputs, outputs, width);
  }
}
