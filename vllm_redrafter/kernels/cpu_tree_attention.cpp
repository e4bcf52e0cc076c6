// Attention of token trees over vLLM's paged cache on CPUs, one pass with online softmax.
//
// Layout: a block holds, for every head, keys as [head_size, block_size] and values as [block_size, head_size]: what
// vLLM's kernels for vectors read. Queries of all rows and of all heads that share a KV head are multiplied together;
// scores and outputs both are products of rows with panels of kWidth columns. A task is a request, a KV head and a
// share of the request's blocks; where the blocks are shared, what the tasks have seen is joined at the end.

#include <algorithm>
#include <cmath>
#include <vector>

struct Call {
  const float *query, *keys, *values;
  float* out;  // [rows, heads, head_size]
  const int32_t *block_table, *query_start_loc, *seq_lens;
  const uint64_t* ancestors;
  int64_t num_requests, max_blocks, max_rows;
  int64_t num_heads, num_kv_heads, head_size, block_size;
  int64_t query_row_stride, query_head_stride, block_stride, kv_head_stride;
  int64_t sliding_window;  // 0 for none
  int64_t num_splits;
  float scale, soft_cap;  // 0 for none
};

constexpr float kLowest = -1e30f;  // below every score, above that of what is masked

// One task's queries: what they have seen so far.
struct Seen {
  float* outputs;  // [queries, head_size], weighted sums of values
  float* best;     // [queries], highest score
  float* weights;  // [queries], sum of exp(score - best)
};

// Turns a row's scores of a block into weights, and brings what was seen before in line with a higher score.
static void weigh(float* scores, int64_t padded, int64_t head_size, float* outputs, float& best, float& weights) {
  Vector highest = Vector{} + kLowest;
  for (int64_t token = 0; token < padded; token += kLanes) {
    const Vector score = *(const Vector*)(scores + token);
    highest = score > highest ? score : highest;
  }
  float now = best;
  for (int lane = 0; lane < kLanes; ++lane) now = std::max(now, highest[lane]);
  if (now > best) {
    const float kept = std::exp(best - now);
    weights *= kept;
    for (int64_t column = 0; column < head_size; ++column) outputs[column] *= kept;
    best = now;
  }
  Vector sum = {};
  for (int64_t token = 0; token < padded; token += kLanes) {
    const Vector score = *(const Vector*)(scores + token);
    const Vector weight = score > kLowest ? exp_of(score - now) : Vector{};
    *(Vector*)(scores + token) = weight;
    sum += weight;
  }
  for (int lane = 0; lane < kLanes; ++lane) weights += sum[lane];
}

struct Request {
  int64_t first_row, rows, context, seq_len;
  const uint64_t* ancestors;
  const int32_t* blocks;

  Request(const Call& call, int64_t index)
      : first_row(call.query_start_loc[index]), rows(call.query_start_loc[index + 1] - first_row),
        context(call.seq_lens[index] - rows), seq_len(call.seq_lens[index]),
        ancestors(call.ancestors + index * call.max_rows), blocks(call.block_table + index * call.max_blocks) {}

  // The first position that the row sees of the context; behind the last one for padding, which sees nothing.
  int64_t first_seen(int64_t row, int64_t sliding_window) const {
    if (!ancestors[row]) return context;
    const int64_t position = context + __builtin_popcountll(ancestors[row]) - 1;
    return sliding_window ? std::max<int64_t>(0, position + 1 - sliding_window) : 0;
  }

  // A node's place is its row, its position its depth.
  bool sees(int64_t row, int64_t place, int64_t first_seen) const {
    if (place < context) return place >= first_seen;
    const int64_t node = place - context;
    return ancestors[row] >> node & 1 && context + __builtin_popcountll(ancestors[node]) - 1 >= first_seen;
  }
};

static void attend(const Call& call, const Request& request, int64_t kv_head, int64_t split, Seen seen) {
  thread_local std::vector<float> scratch;
  const int64_t heads = call.num_heads / call.num_kv_heads, queries = request.rows * heads;
  const int64_t head_size = call.head_size, block_size = call.block_size;
  scratch.resize(std::max<size_t>(scratch.size(), queries * (head_size + block_size)));
  float *query = scratch.data(), *scores = query + queries * head_size;
  for (int64_t index = 0; index < queries; ++index) {
    const float* from = call.query + (request.first_row + index / heads) * call.query_row_stride +
                        (kv_head * heads + index % heads) * call.query_head_stride;
    for (int64_t column = 0; column < head_size; ++column) query[index * head_size + column] = call.scale * from[column];
  }
  std::fill_n(seen.outputs, queries * head_size, 0.0f);
  std::fill_n(seen.best, queries, kLowest);
  std::fill_n(seen.weights, queries, 0.0f);

  int64_t first_place = request.context, last_first = 0;
  for (int64_t row = 0; row < request.rows; ++row) {
    const int64_t first = request.first_seen(row, call.sliding_window);
    first_place = std::min(first_place, first);
    last_first = std::max(last_first, first);
  }
  const int64_t first_block = first_place / block_size;
  const int64_t num_blocks = (request.seq_len + block_size - 1) / block_size - first_block;
  const int64_t end = first_block + num_blocks * (split + 1) / call.num_splits;
  const auto nothing = [](int64_t) {};
  for (int64_t block = first_block + num_blocks * split / call.num_splits; block < end; ++block) {
    const int64_t place = block * block_size, length = std::min(block_size, request.seq_len - place);
    const int64_t padded = (length + kWidth - 1) / kWidth * kWidth;
    const int64_t offset = request.blocks[block] * call.block_stride + kv_head * call.kv_head_stride;
    const bool all_seen = place >= last_first && place + length <= request.context;
    for (int64_t index = 0; index < queries; ++index) std::fill_n(scores + index * block_size, padded, 0.0f);
    for (int64_t token = 0; token < length; token += kWidth)
      for (int64_t index = 0; index < queries; index += kGroup)
        add_group(std::min<int64_t>(kGroup, queries - index), {query + index * head_size, head_size},
                  Rows{call.keys + offset + token, block_size}, scores + index * block_size + token, block_size, head_size,
                  nothing);
    for (int64_t index = 0; index < queries; ++index) {
      float* row_scores = scores + index * block_size;
      const int64_t row = index / heads, first = all_seen ? 0 : request.first_seen(row, call.sliding_window);
      if (call.soft_cap > 0)
        for (int64_t token = 0; token < length; ++token)
          row_scores[token] = call.soft_cap * std::tanh(row_scores[token] / call.soft_cap);
      if (!all_seen)
        for (int64_t token = 0; token < length; ++token)
          if (!request.sees(row, place + token, first)) row_scores[token] = -INFINITY;
      std::fill(row_scores + length, row_scores + padded, -INFINITY);
      weigh(row_scores, padded, head_size, seen.outputs + index * head_size, seen.best[index], seen.weights[index]);
    }
    for (int64_t column = 0; column < head_size; column += kWidth)
      for (int64_t index = 0; index < queries; index += kGroup)
        add_group(std::min<int64_t>(kGroup, queries - index), {scores + index * block_size, block_size},
                  Rows{call.values + offset + column, head_size}, seen.outputs + index * head_size + column, head_size,
                  length, nothing);
  }
}

// Writes the outputs of one request and KV head from what its tasks have seen.
static void join(const Call& call, const Request& request, int64_t kv_head, const Seen* parts) {
  const int64_t heads = call.num_heads / call.num_kv_heads;
  for (int64_t index = 0; index < request.rows * heads; ++index) {
    float* out = call.out + ((request.first_row + index / heads) * call.num_heads + kv_head * heads + index % heads) *
                                call.head_size;
    std::fill_n(out, call.head_size, 0.0f);
    float best = kLowest, weights = 0.0f;
    for (int64_t split = 0; split < call.num_splits; ++split) best = std::max(best, parts[split].best[index]);
    for (int64_t split = 0; split < call.num_splits; ++split)
      weights += parts[split].weights[index] * std::exp(parts[split].best[index] - best);
    if (weights == 0) continue;  // padding
    for (int64_t split = 0; split < call.num_splits; ++split) {
      const float factor = std::exp(parts[split].best[index] - best) / weights;
      const float* outputs = parts[split].outputs + index * call.head_size;
      for (int64_t column = 0; column < call.head_size; ++column) out[column] += factor * outputs[column];
    }
  }
}

extern "C" void tree_attention(const Call* call) {
  const int64_t heads = call->num_heads / call->num_kv_heads, num_splits = call->num_splits;
  struct Pair {
    Request request;
    int64_t kv_head;
    int64_t part_size;  // of one task
  };
  std::vector<Pair> pairs;
  int64_t size = 0;
  for (int64_t index = 0; index < call->num_requests; ++index) {
    const Request request(*call, index);
    if (request.rows > call->max_rows) continue;
    for (int64_t kv_head = 0; kv_head < call->num_kv_heads; ++kv_head) {
      pairs.push_back({request, kv_head, request.rows * heads * (call->head_size + 2)});
      size += pairs.back().part_size * num_splits;
    }
  }
  thread_local std::vector<float> memory;  // of all parts
  memory.resize(std::max<size_t>(memory.size(), size));
  std::vector<Seen> parts;
  float* part = memory.data();
  for (const Pair& pair : pairs)
    for (int64_t split = 0; split < num_splits; ++split, part += pair.part_size) {
      const int64_t queries = pair.request.rows * heads;
      parts.push_back({part, part + queries * call->head_size, part + queries * (call->head_size + 1)});
    }
  const int64_t num_pairs = pairs.size();
#pragma omp parallel
  {
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_pairs * num_splits; ++task) {
      const Pair& pair = pairs[task / num_splits];
      attend(*call, pair.request, pair.kv_head, task % num_splits, parts[task]);
      if (num_splits == 1) join(*call, pair.request, pair.kv_head, &parts[task]);
    }
#pragma omp for schedule(static)
    for (int64_t index = 0; index < (num_splits > 1 ? num_pairs : 0); ++index)
      join(*call, pairs[index].request, pairs[index].kv_head, &parts[index * num_splits]);
  }
}
