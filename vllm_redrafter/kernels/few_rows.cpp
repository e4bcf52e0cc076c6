// Products of a few rows with a matrix that no cache holds, at the speed of memory: weights are read once for all rows.
//
// Layout: panels of kWidth outputs, [outputs / kWidth, inputs, kWidth], the last one padded. Rows are multiplied in
// groups, group after group with one block of a panel, which the first level of cache holds; meanwhile the next block
// is on its way to the second one, where the processor finds it in time by itself. A row's sums run over the inputs in
// order, whatever the other rows.

constexpr int kCacheLine = 16;              // floats
constexpr int64_t kBlock = 2048 / kWidth;   // inputs: 8 KiB of weights
constexpr int64_t kMostRows = 8 * kGroup;   // whose sums are kept beside them
// Where registers hold the sums of twelve rows, one large group still takes longer than two whose block is near.
constexpr int64_t kMostAlone = kGroup == 12 ? 10 : kGroup;
constexpr int64_t kMostShared = kGroup == 12 ? 8 : kGroup;

// Writes the products of at most kMostRows rows with a panel, of which `width` outputs are no padding.
static void multiply(const float* x, const float* panel, const float* bias, float* out,
                     int64_t rows, int64_t inputs, int64_t outputs, int64_t width) {
  const int64_t groups = rows <= kMostAlone ? 1 : (rows + kMostShared - 1) / kMostShared;
  const int64_t step = groups == 1 ? inputs : kBlock;  // nobody else waits for the block
  float sums[kMostRows * kWidth] = {};
  for (int64_t input = 0; input < inputs; input += step) {
    const int64_t length = inputs - input < step ? inputs - input : step;
    const int64_t share = (length + groups - 1) / groups;  // of the next block, to be fetched by each group
    const float* block = panel + input * kWidth;
    for (int64_t group = 0, row = 0; group < groups; ++group) {
      const int64_t end = rows * (group + 1) / groups;
      const float* ahead = block + (kBlock + group * share) * kWidth;
      const auto fetch = [=](int64_t index) {
        if (index < share)
          for (int line = 0; line < kWidth; line += kCacheLine) __builtin_prefetch(ahead + index * kWidth + line, 0, 2);
      };
      add_group(end - row, {x + row * inputs + input, inputs}, Rows{block, kWidth}, sums + row * kWidth, kWidth, length,
                fetch);
      row = end;
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t output = 0; output < width; ++output)
      out[row * outputs + output] = sums[row * kWidth + output] + (bias ? bias[output] : 0.0f);
}

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
