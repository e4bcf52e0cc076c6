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

typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Rows of floats, one `stride` behind the other.
struct Rows {
  const float* data;
  int64_t stride;
};

// The same in bf16.
struct HalfRows {
  const uint16_t* data;
  int64_t stride;
};

static inline Vector load(const Rows& rows, int64_t place) { return *(const Vector*)(rows.data + place); }

static inline Vector load(const HalfRows& rows, int64_t place) {
  return (Vector)(__builtin_convertvector(*(const Shorts*)(rows.data + place), Integers) << 16);
}

// exp(x) for x <= 0, within 2 units in the last place: 2^n by the exponent's bits, the rest as a polynomial.
static inline Vector exp_of(Vector x) {
  const Vector least = Vector{} - 87.0f;
  x = x > least ? x : least;
  const Integers n = __builtin_convertvector(x * 1.44269504f - 0.5f, Integers);  // rounds towards zero
  const Vector whole = __builtin_convertvector(n, Vector);
  const Vector rest = x - whole * 0.693359375f - whole * -2.12194440e-4f;  // ln 2 in two parts
  Vector sum = Vector{} + 1.0f / 5040;
  sum = sum * rest + 1.0f / 720;
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  return sum * (Vector)((n + 127) << 23);
}

// Adds x[kRows, length] @ panel[length, kWidth] to sums[kRows, kWidth]; calls `before` with every index of `length`.
template <int kRows, class Panel, class Before>
static inline __attribute__((always_inline)) void add_products(Rows x, Panel panel, float* sums, int64_t sums_stride,
                                                               int64_t length, Before before) {
  Vector left[kRows], right[kRows];
  for (int row = 0; row < kRows; ++row) {
    left[row] = *(const Vector*)(sums + row * sums_stride);
    right[row] = *(const Vector*)(sums + row * sums_stride + kLanes);
  }
  for (int64_t index = 0; index < length; ++index) {
    before(index);
    const Vector first = load(panel, index * panel.stride);
    const Vector second = load(panel, index * panel.stride + kLanes);
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
template <class Panel, class Before, int kRows = kGroup>
static inline __attribute__((always_inline)) void add_group(int64_t rows, Rows x, Panel panel, float* sums,
                                                            int64_t sums_stride, int64_t length, Before before) {
  if constexpr (kRows > 1)
    if (rows < kRows) return add_group<Panel, Before, kRows - 1>(rows, x, panel, sums, sums_stride, length, before);
  add_products<kRows>(x, panel, sums, sums_stride, length, before);
}
