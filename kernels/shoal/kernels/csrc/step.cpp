// A step program: the operations of one model step, recorded once and replayed by one call.
//
// Members of the team run the operations together, with a barrier after each. See
// shoal.kernels.native for the layout of the structures and for the oracles.
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention.h"
#include "linear8.h"
#include "team.h"

namespace shoal {

enum class Code : int { kEmbed = 0, kNorm = 1, kLinear = 2, kRopeStore = 3, kAttend = 4, kTake = 5 };

// Buffers of a program; all hold rows.
enum Buffer : int { kResidual = 0, kNormed = 1, kHeads = 2, kAttended = 3, kInner = 4, kLogits = 5, kBuffers = 6 };

struct Op {
  std::int32_t code, source, target, into;
  std::int32_t n, k;       // of a linear
  const void* weight;      // packed, the embedding's rows, or a norm's weights
  const float* scales;     // of an int8 weight, else null
  const std::int32_t* sums;
  const float* bias;
  void* cache;             // of a layer
  float eps;
};

struct Shape {
  std::int32_t hidden, heads, kv_heads, head_dim, rotary, block_size, window;  // window 0: none
  float scale;
};

struct Batch {
  std::int64_t tokens, sequences, rows, table_stride;
  const std::int64_t* ids;        // [tokens]
  const std::int64_t* positions;  // [tokens]
  const std::int64_t* owner;      // [tokens] sequence
  const std::int64_t* first;      // [sequences] flat row of its first token
  const std::int64_t* count;      // [sequences]
  const std::int64_t* start;      // [sequences] tokens before
  const std::int64_t* tables;     // [sequences, table_stride]
  const std::int64_t* wanted;     // [rows] flat rows that kTake keeps
  const float* turns;             // [positions, rotary] cosine and sine by turns
  double* seconds;                // [operations] time spent is added to, or null
};

namespace {

using Clock = std::chrono::steady_clock;

struct Tile {
  std::int64_t sequence, query;  // first query within the sequence's tokens
  int queries, head, first_head, heads;
};

// Sequences cut into tiles of rows that attend together, the longest contexts first.
std::vector<Tile> tiles(const Shape& shape, const Batch& batch) {
  const int group = shape.heads / shape.kv_heads;
  std::vector<Tile> all;
  for (std::int64_t s = 0; s < batch.sequences; ++s) {
    const int wide = std::max(1, kHeadRows / group);
    for (std::int64_t query = (batch.count[s] - 1) / wide * wide; query >= 0; query -= wide) {
      const int queries = static_cast<int>(std::min<std::int64_t>(wide, batch.count[s] - query));
      for (int head = 0; head < shape.kv_heads; ++head)
        for (int part = 0; part < group; part += kHeadRows)
          all.push_back({s, query, queries, head, head * group + part, std::min(group - part, kHeadRows)});
    }
  }
  std::stable_sort(all.begin(), all.end(), [&](const Tile& a, const Tile& b) {
    return batch.start[a.sequence] + a.query > batch.start[b.sequence] + b.query;
  });
  return all;
}

struct Run {
  const Shape& shape;
  const Batch& batch;
  void** buffers;
  std::int64_t rows;  // of the operation at hand
  std::vector<Tile> tiles;
  std::atomic<std::int64_t> next{0};

  template <typename T>
  T* buffer(int index) const { return static_cast<T*>(buffers[index]); }
  int width() const { return (shape.heads + 2 * shape.kv_heads) * shape.head_dim; }
  CacheView cache(const Op& op) const {
    return {static_cast<bf16*>(op.cache), shape.kv_heads, shape.block_size, shape.head_dim};
  }
};

struct Share {
  std::int64_t begin, end;
  Share(std::int64_t total, int member, int members)
      : begin(total * member / members), end(total * (member + 1) / members) {}
};

void embed(const Run& run, const Op& op, Share share) {
  const int hidden = run.shape.hidden;
  for (std::int64_t row = share.begin; row < share.end; ++row) {
    const bf16* from = static_cast<const bf16*>(op.weight) + run.batch.ids[row] * hidden;
    float* to = run.buffer<float>(kResidual) + row * hidden;
    for (int i = 0; i < hidden; i += 16) _mm512_storeu_ps(to + i, widen(from + i));
  }
}

void norm(const Run& run, const Op& op, Share share) {
  const int hidden = run.shape.hidden;
  const float* weight = static_cast<const float*>(op.weight);
  for (std::int64_t row = share.begin; row < share.end; ++row) {
    const float* x = run.buffer<float>(kResidual) + row * hidden;
    bf16* y = run.buffer<bf16>(op.target) + row * hidden;
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < hidden; i += 16) {
      const __m512 v = _mm512_loadu_ps(x + i);
      squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float inverse = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(hidden) + op.eps);
    for (int i = 0; i < hidden; i += 16) {
      const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse));
      narrow(y + i, _mm512_mul_ps(v, _mm512_loadu_ps(weight + i)));
    }
  }
}

// Turns queries in place, and keys on their way into the cache.
void rope_store(const Run& run, const Op& op, Share share) {
  const Shape& shape = run.shape;
  const int dim = shape.head_dim, size = shape.block_size;
  const CacheView cache = run.cache(op);
  for (std::int64_t row = share.begin; row < share.end; ++row) {
    const std::int64_t position = run.batch.positions[row];
    const float* turns = run.batch.turns + position * shape.rotary;
    bf16* heads = run.buffer<bf16>(kHeads) + row * run.width();
    for (int head = 0; head < shape.heads + shape.kv_heads; ++head) {
      bf16* x = heads + head * dim;
      for (int i = 0; i < shape.rotary; i += 16) {
        const __m512 v = widen(x + i), turn = _mm512_loadu_ps(turns + i);
        const __m512 crossed = _mm512_mul_ps(_mm512_permute_ps(v, 0xb1), _mm512_movehdup_ps(turn));
        narrow(x + i, _mm512_fmaddsub_ps(v, _mm512_moveldup_ps(turn), crossed));
      }
    }
    const std::int64_t block = run.batch.tables[run.batch.owner[row] * run.batch.table_stride + position / size];
    const int inside = static_cast<int>(position % size);
    for (int head = 0; head < shape.kv_heads; ++head) {
      const bf16* key = heads + (shape.heads + head) * dim;
      const bf16* value = key + shape.kv_heads * dim;
      bf16* keys = cache.keys(block, head) + inside / 16 * 16 * dim + inside % 16 * 2;
      bf16* values = cache.values(block, head) + inside / 2 * 2 * dim + inside % 2;
      for (int i = 0; i < dim; i += 2) std::memcpy(keys + 16 * i, key + i, 4);
      for (int i = 0; i < dim; ++i) values[2 * i] = value[i];
    }
  }
}

void attend(Run& run, const Op& op) {
  const Shape& shape = run.shape;
  const Batch& batch = run.batch;
  const CacheView cache = run.cache(op);
  const auto total = static_cast<std::int64_t>(run.tiles.size());
  for (std::int64_t at; (at = run.next.fetch_add(1, std::memory_order_relaxed)) < total;) {
    const Tile& tile = run.tiles[at];
    const bf16* queries[kHeadRows];
    bf16* out[kHeadRows];
    Sight sight;
    int rows = 0;
    for (int query = 0; query < tile.queries; ++query) {
      const std::int64_t row = batch.first[tile.sequence] + tile.query + query;
      const std::int64_t seen = batch.start[tile.sequence] + tile.query + query + 1;
      for (int head = tile.first_head; head < tile.first_head + tile.heads; ++head, ++rows) {
        queries[rows] = run.buffer<bf16>(kHeads) + row * run.width() + head * shape.head_dim;
        out[rows] = run.buffer<bf16>(kAttended) + row * shape.heads * shape.head_dim + head * shape.head_dim;
        sight.to[rows] = seen;
        sight.from[rows] = shape.window && seen > shape.window ? seen - shape.window : 0;
      }
    }
    shoal::attend(rows, queries, out, sight, cache, batch.tables + tile.sequence * batch.table_stride, tile.head, shape.scale);
  }
}

// Keeps the wanted rows of the residual and of the attended values, at the front. Rows only move
// forward where they are in rising order; others go through a copy.
void take(Run& run, int member) {
  if (member) return;
  const Batch& batch = run.batch;
  const auto pick = [&](void* data, std::size_t bytes) {
    std::vector<char> kept(batch.rows * bytes);
    for (std::int64_t row = 0; row < batch.rows; ++row)
      std::memcpy(kept.data() + row * bytes, static_cast<char*>(data) + batch.wanted[row] * bytes, bytes);
    std::memcpy(data, kept.data(), kept.size());
  };
  pick(run.buffers[kResidual], sizeof(float) * run.shape.hidden);
  pick(run.buffers[kAttended], sizeof(bf16) * run.shape.heads * run.shape.head_dim);
}

}  // namespace
}  // namespace shoal

extern "C" {

void* shoal_team_new(int size) { return new shoal::Team(size); }

void shoal_team_free(void* team) { delete static_cast<shoal::Team*>(team); }

// weight [n, k] bfloat16 -> [panels][k / 2][32][2]; rows beyond n are zero.
void shoal_pack(const shoal::bf16* weight, shoal::bf16* packed, std::int64_t n, std::int64_t k) {
  for (std::int64_t panel = 0; panel * shoal::kPanel < n; ++panel)
    for (std::int64_t i = 0; i < k; i += 2)
      for (std::int64_t j = 0; j < shoal::kPanel; ++j) {
        const std::int64_t row = panel * shoal::kPanel + j;
        shoal::bf16* to = packed + (panel * k + i) * shoal::kPanel + 2 * j;
        to[0] = row < n ? weight[row * k + i] : 0;
        to[1] = row < n ? weight[row * k + i + 1] : 0;
      }
}

// codes [n, k] -> [panels][k / 4][32][4]; sums [panels][k / 64][32]. Rows beyond n are zero.
void shoal_pack8(const std::int8_t* codes, std::int8_t* packed, std::int32_t* sums, std::int64_t n, std::int64_t k) {
  using namespace shoal;
  for (std::int64_t panel = 0; panel * kPanel < n; ++panel)
    for (std::int64_t j = 0; j < kPanel; ++j) {
      const std::int64_t row = panel * kPanel + j;
      for (std::int64_t i = 0; i < k; ++i) {
        const std::int8_t code = row < n ? codes[row * k + i] : 0;
        packed[(panel * k + i / 4 * 4) * kPanel + 4 * j + i % 4] = code;
        std::int32_t& sum = sums[(panel * (k / kGroup) + i / kGroup) * kPanel + j];
        sum = (i % kGroup ? sum : 0) + 32768 * code;
      }
    }
}

void shoal_run(void* team, const shoal::Op* ops, std::int64_t count, const shoal::Shape* shape,
               const shoal::Batch* batch, void** buffers) {
  using namespace shoal;
  Team& members = *static_cast<Team*>(team);
  Run run{*shape, *batch, buffers, batch->tokens, {}};
  for (std::int64_t at = 0; at < count; ++at)
    if (ops[at].code == static_cast<int>(Code::kAttend)) {
      run.tiles = tiles(*shape, *batch);
      break;
    }
  members.run([&](int member) {
    std::int64_t rows = batch->tokens;
    for (std::int64_t at = 0; at < count; ++at) {
      const Op& op = ops[at];
      const bool timed = batch->seconds && member == 0;
      const auto began = timed ? Clock::now() : Clock::time_point();
      const Share share(rows, member, members.size());
      switch (static_cast<Code>(op.code)) {
        case Code::kEmbed:
          embed(run, op, share);
          break;
        case Code::kNorm:
          norm(run, op, share);
          break;
        case Code::kLinear:
          if (op.scales)
            linear8({static_cast<const std::int8_t*>(op.weight), op.scales, op.sums, op.bias, op.n, op.k},
                    static_cast<Into>(op.into), run.buffer<bf16>(op.source), buffers[op.target], rows, member,
                    members.size());
          else
            linear({static_cast<const bf16*>(op.weight), op.bias, op.n, op.k}, static_cast<Into>(op.into),
                   run.buffer<bf16>(op.source), buffers[op.target], rows, member, members.size());
          break;
        case Code::kRopeStore:
          rope_store(run, op, share);
          if (member == 0) run.next.store(0, std::memory_order_relaxed);
          break;
        case Code::kAttend:
          attend(run, op);
          break;
        case Code::kTake:
          take(run, member);
          rows = batch->rows;
          break;
      }
      members.barrier();
      if (timed) batch->seconds[at] += std::chrono::duration<double>(Clock::now() - began).count();
    }
  });
}
}
