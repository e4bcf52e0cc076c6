// What the kernels for CPUs share: the processor's vectors, and products of a few rows whose sums fit the registers.

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

constexpr int kWidth = 2 * kLanes;  // columns of a panel

extern "C" int64_t panel_width() { return kWidth; }

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Rows of floats, one `stride` behind the other.
struct Rows {
  const float* data;
  int64_t stride;
};

// Adds x[kRows, length] @ panel[length, kWidth] to sums[kRows, kWidth]; calls `before` with every index of `length`.
template <int kRows, class Before>
static inline __attribute__((always_inline)) void add_products(Rows x, Rows panel, float* sums, int64_t sums_stride, int64_t length, Before before) {
  Vector left[kRows], right[kRows];
  for (int row = 0; row < kRows; ++row) {
    left[row] = *(const Vector*)(sums + row * sums_stride);
    right[row] = *(const Vector*)(sums + row * sums_stride + kLanes);
  }
  for (int64_t index = 0; index < length; ++index) {
    before(index);
    const Vector first = *(const Vector*)(panel.data + index * panel.stride);
    const Vector second = *(const Vector*)(panel.data + index * panel.stride + kLanes);
    for (int row = 0; row < kRows; ++row) {
      left[row] += x.data[row * x.stride + index] * first;
      right[row] += x.data[row * x.stride + index] * second;
    }
  }
  for (int row = 0; row < kRows; ++row) {
    *(Vector*)(sums + row * sums_stride) = left[row];
    *(Vector*)(sums + row * sums_stride + kLanes) = right[row];
  }
}

// The same for a number of rows, 1 to kGroup, that is known when it runs.
template <class Before, int kRows = kGroup>
static inline __attribute__((always_inline)) void add_group(int64_t rows, Rows x, Rows panel, float* sums, int64_t sums_stride, int64_t length,
                      Before before) {
  if constexpr (kRows > 1)
    if (rows < kRows) return add_group<Before, kRows - 1>(rows, x, panel, sums, sums_stride, length, before);
  add_products<kRows>(x, panel, sums, sums_stride, length, before);
}
