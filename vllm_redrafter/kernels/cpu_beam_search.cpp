// The drafter's beam search, all depths of all requests in one call; its twin is `core.beam_search`.
//
// Weights have 16 bits, all else has 32: every depth reads all weights, and half of them fit where all would not. A
// matrix lies in panels of kWidth outputs, [outputs / kWidth, inputs, kWidth]; the last is padded, as biases and rows
// are. Threads share the panels of a product, and wait for each other between products.

#include <algorithm>
#include <cmath>
#include <vector>

struct Matrix {
  const uint16_t* panels;  // bf16; none where the drafter has no such matrix
  const float* bias;       // padded, or none
  int64_t inputs, outputs;
};

struct Call {
  const Matrix *opening, *embedding, *recurrence, *projection, *blocks, *head;
  const float* table;          // [tokens, hidden]: embeddings, or what `embedding` would make of them
  const uint16_t* half_table;  // the same in bf16
  const int64_t* target_ids;   // [head]
  const float* hidden;         // [requests, hidden]: the target's
  const int64_t* init_ids;     // [requests]
  const int64_t* seeds;        // [requests, length], or none where all are greedy
  const float *temperatures, *top_p, *min_p;  // [requests]; temperature 0 for the greedy ones
  const int64_t* top_k;                       // [requests], 0 for all
  int64_t *token_ids, *parents;               // [requests, length * kept]
  float* log_probs;                           // likewise
  int64_t num_requests, num_blocks, hidden_size, width, num_kept, length;
  float sharpness, floor;
};

constexpr float kLowest = -1e30f;  // below every logit
constexpr int64_t kMostRanked = 256;

static int64_t padded(int64_t size) { return (size + kWidth - 1) / kWidth * kWidth; }

// Rows of floats with room behind each for a whole panel.
struct Buffer {
  float* data;
  int64_t stride;
  float* row(int64_t index) const { return data + index * stride; }
};

// x * sigmoid(x)
static inline Vector silu(Vector x) {
  const Vector small = exp_of(x > 0.0f ? -x : x);
  return x * (x > 0.0f ? 1.0f + Vector{} : small) / (1.0f + small);
}

// ln(x) for normal x > 0, within a few units in the last place.
static inline Vector log_of(Vector x) {
  const Integers bits = (Integers)x - 0x3f3504f3;  // sqrt(1/2)
  const Vector exponent = __builtin_convertvector(bits >> 23, Vector);
  const Vector rest = (Vector)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  Vector sum = Vector{} + 7.0376836292e-2f;
  sum = sum * rest - 1.1514610310e-1f;
  sum = sum * rest + 1.1676998740e-1f;
  sum = sum * rest - 1.2420140846e-1f;
  sum = sum * rest + 1.4249322787e-1f;
  sum = sum * rest - 1.6668057665e-1f;
  sum = sum * rest + 2.0000714765e-1f;
  sum = sum * rest - 2.4999993993e-1f;
  sum = sum * rest + 3.3333331174e-1f;
  const Vector square = rest * rest;
  return exponent * 0.693359375f + (rest + (square * rest * sum - 0.5f * square + exponent * -2.12194440e-4f));
}

// Hands `store` the products of all rows with a matrix, biases added, vector by vector; all threads call it.
template <class Store>
static void multiply(const Matrix& matrix, Buffer x, int64_t rows, Store store) {
#pragma omp for schedule(static)
  for (int64_t first = 0; first < matrix.outputs; first += kWidth)
    for (int64_t row = 0; row < rows; row += kGroup) {
      const int64_t group = std::min<int64_t>(kGroup, rows - row);
      float sums[kGroup * kWidth] = {};
      add_group(group, {x.row(row), x.stride}, HalfRows{matrix.panels + first * matrix.inputs, kWidth}, sums, kWidth,
                matrix.inputs, [](int64_t) {});
      for (int64_t index = 0; index < group; ++index)
        for (int64_t lane = 0; lane < kWidth; lane += kLanes) {
          Vector sum = *(const Vector*)(sums + index * kWidth + lane);
          if (matrix.bias) sum += *(const Vector*)(matrix.bias + first + lane);
          store(row + index, first + lane, sum);
        }
    }
}

static uint64_t mixed(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return bits ^ (bits >> 31);
}

// Writes the Gumbel noise of a seed times the temperature, as `core.noise.gumbel` has it.
static void write_noise(uint64_t seed, float temperature, const int64_t* token_ids, int64_t size, float* noise) {
  const uint64_t key = mixed(seed);
  float below[kLanes] = {}, above[kLanes] = {};  // u and 1 - u: near 1, u alone would be coarse
  for (int64_t first = 0; first < size; first += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, size - first);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t bits = mixed(key + (token_ids[first + lane] + 1) * 0x9E3779B97F4A7C15u) >> 11;
      below[lane] = ((double)bits + 0.5) * 0x1p-53;
      above[lane] = ((double)((int64_t{1} << 53) - bits) - 0.5) * 0x1p-53;
    }
    for (int64_t lane = lanes; lane < kLanes; ++lane) below[lane] = above[lane] = 0.5f;
    const Vector small = *(const Vector*)above;
    const Vector series = small * (1.0f + small * (0.5f + small * (1.0f / 3 + small * 0.25f)));
    const Vector exponential = small < 0x1p-6f ? series : -log_of(*(const Vector*)below);
    *(Vector*)(noise + first) = -temperature * log_of(exponential);
  }
}

// Adds noise to what a request would keep of a row of logits, and moves it until its best stands where the best logit
// stood: `core.noise.Truncation.lift`.
static void lift(const Call& call, int64_t request, const float* noise, int64_t size, float* logits) {
  thread_local std::vector<float> heap;
  heap.assign(logits, logits + size);
  std::make_heap(heap.begin(), heap.end());
  const float highest = heap.front(), inverse = 1.0f / call.temperatures[request];
  float total = 0.0f;
  for (int64_t index = 0; index < size; ++index) total += std::exp((logits[index] - highest) * inverse);
  const int64_t ranked = std::min(size, kMostRanked), top_k = call.top_k[request];
  float last = highest, before = 0.0f;
  int64_t rank = 0;
  for (; rank < ranked; ++rank) {
    const float logit = heap.front(), probability = std::exp((logit - highest) * inverse) / total;
    const bool is_kept = before < call.top_p[request] && probability >= call.min_p[request] / total &&
                         (!top_k || rank < top_k);
    if (rank && !is_kept) break;
    last = logit;
    before += probability;
    std::pop_heap(heap.begin(), heap.end() - rank);
  }
  if (rank == ranked) last = kLowest;  // those behind them may be kept
  float best = kLowest;
  for (int64_t index = 0; index < size; ++index)
    if (logits[index] >= last) best = std::max(best, logits[index] + noise[index]);
  for (int64_t index = 0; index < size; ++index)
    if (logits[index] >= last) logits[index] += noise[index] - best + highest;
}

// The best continuations of a request, best first; of equal ones those of earlier beams and ids come first.
struct Ranking {
  struct Entry {
    float total;
    int64_t beam, draft_id;
  };
  std::vector<Entry> entries;
  size_t most;

  // Takes one beam's logits, times the sharpness, whose padding is kLowest.
  void add(int64_t beam, float score, const float* logits, int64_t size) {
    Vector highest = Vector{} + kLowest, sum = {};
    for (int64_t index = 0; index < size; index += kLanes) {
      const Vector values = *(const Vector*)(logits + index);
      highest = values > highest ? values : highest;
    }
    float most_likely = kLowest, total = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) most_likely = std::max(most_likely, highest[lane]);
    for (int64_t index = 0; index < size; index += kLanes)
      sum += exp_of(*(const Vector*)(logits + index) - most_likely);
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
    const float offset = score - most_likely - std::log(total);
    for (int64_t index = 0; index < size; ++index) {
      if (entries.size() == most && logits[index] + offset <= entries.back().total) continue;
      const Entry entry = {logits[index] + offset, beam, index};
      if (entries.size() == most) entries.pop_back();
      const auto is_better = [](const Entry& left, const Entry& right) { return left.total > right.total; };
      entries.insert(std::upper_bound(entries.begin(), entries.end(), entry, is_better), entry);
    }
  }
};

// The live beams of all requests, and what they are extended with.
class Search {
 public:
  explicit Search(const Call& call)
      : call_(call), size_(call.head->outputs), capacity_(call.length * call.num_kept),
        exit_(call.projection->panels ? call.projection->outputs : 2 * call.hidden_size) {
    thread_local std::vector<float> memory;
    const int64_t rows = call.num_requests * std::max<int64_t>(1, call.width), hidden = call.hidden_size;
    const int64_t noisy = call.seeds ? call.num_requests * call.length : 0;
    int64_t used = 0;
    for (int pass = 0; pass < 2; ++pass, memory.resize(std::max<size_t>(memory.size(), used))) {
      used = 0;
      const auto reserve = [&](Buffer& buffer, int64_t count, int64_t size) {
        buffer = {memory.data() + used, padded(size)};
        used += count * buffer.stride;
      };
      for (Buffer* buffer : {&embeddings_, &embedded_, &states_, &next_states_}) reserve(*buffer, rows, hidden);
      for (Buffer* buffer : {&x_, &y_, &contexts_}) reserve(*buffer, rows, exit_);
      reserve(logits_, rows, size_);
      reserve(noise_, noisy, size_);
    }
    scores_.assign(rows, 0.0f);
    for (int64_t request = 0; request < call.num_requests; ++request) {
      std::fill_n(states_.row(request), states_.stride, 0.0f);
      read(request, call.init_ids[request]);
    }
  }

  // Writes the candidates of all depths; all threads call it.
  void run() {
    if (call_.seeds) {
#pragma omp for schedule(static)
      for (int64_t index = 0; index < call_.num_requests * call_.length; ++index) {
        const float temperature = call_.temperatures[index / call_.length];
        if (temperature > 0)
          write_noise(call_.seeds[index], temperature, call_.target_ids, size_, noise_.row(index));
      }
    }
    // [h; s] W = h W_h + s W_s, and h is the same for all depths
    const Buffer hidden = {const_cast<float*>(call_.hidden), call_.hidden_size};
    if (call_.opening->panels)
      multiply(*call_.opening, hidden, call_.num_requests,
               [&](int64_t row, int64_t at, Vector sum) { store(contexts_, row, at, sum); });
    for (int64_t depth = 0; depth < call_.length && !is_over_; ++depth) {
      score();
      rank(depth);
    }
  }

  int64_t num_found() const { return num_found_; }

 private:
  // Puts a token's embedding in place.
  void read(int64_t row, int64_t token) {
    const int64_t hidden = call_.hidden_size;
    float* out = embeddings_.row(row);
    if (call_.table) {
      std::copy_n(call_.table + token * hidden, hidden, out);
      return;
    }
    for (int64_t index = 0; index < hidden; ++index) {
      const uint32_t bits = uint32_t{call_.half_table[token * hidden + index]} << 16;
      __builtin_memcpy(out + index, &bits, sizeof bits);
    }
  }

  // Advances the states by the tokens read, and finds the logits of the next ones.
  void score() {
    const int64_t rows = call_.num_requests * live_, hidden = call_.hidden_size;
    Buffer embedded = embeddings_;
    if (call_.embedding->panels) {
      embedded = embedded_;
      multiply(*call_.embedding, embeddings_, rows,
               [&](int64_t row, int64_t at, Vector sum) { store(embedded, row, at, sum); });
    }
    if (call_.recurrence->panels) {
      multiply(*call_.recurrence, states_, rows, [&](int64_t row, int64_t at, Vector sum) {
        store(next_states_, row, at, silu(sum + load(embedded, row, at)));
      });
    } else {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t at = 0; at < hidden; ++at)
          next_states_.row(row)[at] = states_.row(row)[at] + embedded.row(row)[at];
    }
    const bool is_projected = call_.projection->panels;
    if (is_projected)
      multiply(*call_.projection, next_states_, rows,
               [&](int64_t row, int64_t at, Vector sum) { store(x_, row, at, sum); });
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      float* x = x_.row(row);
      if (is_projected)
        for (int64_t at = 0; at < exit_; ++at) x[at] += contexts_.row(row / live_)[at];
      else
        std::copy_n(next_states_.row(row), hidden, std::copy_n(call_.hidden + row / live_ * hidden, hidden, x));
    }
    Buffer x = x_, y = y_;
    for (int64_t block = 0; block < call_.num_blocks; ++block, std::swap(x, y))
      multiply(call_.blocks[block], x, rows, [&](int64_t row, int64_t at, Vector sum) {
        store(y, row, at, load(x, row, at) + silu(sum));
      });
    multiply(*call_.head, x, rows, [&](int64_t row, int64_t at, Vector sum) { store(logits_, row, at, sum); });
  }

  // Writes the best continuations, and makes beams of the best of them.
  void rank(int64_t depth) {
    const int64_t kept = std::min(call_.num_kept, live_ * size_), next_live = std::min(call_.width, kept);
#pragma omp for schedule(static)
    for (int64_t request = 0; request < call_.num_requests; ++request) {
      Ranking ranking{{}, (size_t)kept};
      ranking.entries.reserve(kept + 1);
      const bool is_drawn = call_.seeds && call_.temperatures[request] > 0;
      const float* noise = is_drawn ? noise_.row(request * call_.length + depth) : nullptr;
      const bool truncates = is_drawn && (call_.top_k[request] || call_.top_p[request] < 1 || call_.min_p[request] > 0);
      for (int64_t beam = 0; beam < live_; ++beam) {
        float* logits = logits_.row(request * live_ + beam);
        if (truncates)
          lift(call_, request, noise, size_, logits);
        else if (is_drawn)
          for (int64_t index = 0; index < size_; ++index) logits[index] += noise[index];
        for (int64_t index = 0; index < size_; ++index) logits[index] *= call_.sharpness;
        std::fill(logits + size_, logits + logits_.stride, kLowest);
        ranking.add(beam, scores_[request * live_ + beam], logits, size_);
      }
      const int64_t first = request * capacity_ + num_found_;
      for (int64_t index = 0; index < kept; ++index) {
        const Ranking::Entry& entry = ranking.entries[index];
        call_.token_ids[first + index] = call_.target_ids[entry.draft_id];
        call_.parents[first + index] = entry.beam + first_beam_;
        call_.log_probs[first + index] = entry.total;
      }
      for (int64_t beam = 0; beam < next_live; ++beam) {
        const float* state = next_states_.row(request * live_ + ranking.entries[beam].beam);
        std::copy_n(state, states_.stride, states_.row(request * next_live + beam));
      }
    }
#pragma omp for schedule(static)
    for (int64_t request = 0; request < call_.num_requests; ++request)
      for (int64_t beam = 0; beam < next_live; ++beam)
        read(request * next_live + beam, call_.token_ids[request * capacity_ + num_found_ + beam]);
#pragma omp single
    {
      float best = -INFINITY;
      for (int64_t request = 0; request < call_.num_requests; ++request) {
        const float* log_probs = call_.log_probs + request * capacity_ + num_found_;
        std::copy_n(log_probs, next_live, scores_.data() + request * next_live);
        best = std::max(best, log_probs[0]);
      }
      first_beam_ = num_found_;
      num_found_ += kept;
      live_ = next_live;
      is_over_ = best <= call_.floor;
    }
  }

  static Vector load(Buffer buffer, int64_t row, int64_t at) { return *(const Vector*)(buffer.row(row) + at); }
  static void store(Buffer buffer, int64_t row, int64_t at, Vector value) { *(Vector*)(buffer.row(row) + at) = value; }

  const Call& call_;
  const int64_t size_, capacity_, exit_;
  int64_t live_ = 1, first_beam_ = -1, num_found_ = 0;
  bool is_over_ = false;
  std::vector<float> scores_;  // of the live beams
  Buffer embeddings_, embedded_, states_, next_states_, x_, y_, contexts_, logits_, noise_;
};

// Returns how many candidates every request has.
extern "C" int64_t beam_search(const Call* call) {
  Search search(*call);
#pragma omp parallel
  search.run();
  return search.num_found();
}
