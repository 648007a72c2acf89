// What the kernels of Nyström attention are made of: sequences and their parts, tiles of tokens and of landmarks,
// products of these, a softmax over them, and their way to memory.
#pragma once

#include <cmath>

#include "../cuda/rows.cuh"
#include "problem.h"

namespace kx::nystrom_attention {

constexpr int kTile = kCudaTile;
constexpr int kThreads = 128;
constexpr int kN = kTile / 8;       // tiles of mma.sync that a warp has beside each other
constexpr int kStages = 4;          // places for tiles of tokens
constexpr int kKept = kStages - 2;  // of which so many stay when the next is taken

// Rows that are cut into parts: of queries, or of keys.
struct Cut {
  int64_t length;
  int span;   // rows of a part, whole tiles
  int parts;  // of a head: for packed sequences, at most
};

struct Plan {
  Problem p;
  Cut of_q, of_k;
  int groups;                    // of kTile landmarks
  int key_chunks, value_chunks;  // of kTile columns
  int slices;                    // the larger of these
  float* sums;                   // [places, …]: what parts sum up
  float *columns, *norms;        // of A [units, m]: the sums of columns; [units]: what a unit adds to ∂c·c
  float* of_landmarks;           // [units, m·(D_v + D)]: ∂W, then ∂K̃ / a
  float* grad_summary;           // [units, m, D_v]: ∂Y
  float *grad_landmarks_q, *grad_landmarks_k;  // [units, m, D]
  double* conv_sums;                           // [places, κ]
  float* scratch;                              // [units, …]: matrices that have no room on chip
  int side;                                    // of a matrix: m, whole tiles of 16
  int on_chip, off_chip;                       // matrices
  int blocks;                                  // that a head's matrix has
  bool pooled;                                 // landmarks of keys are there before keys are met
};

__host__ __device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Numbers of a landmark that a part of keys sums up: of keys, of values, the largest score, the sum of weights.
__host__ __device__ __forceinline__ int64_t numbers_of_keys(const Problem& p) { return p.key_dim + p.value_dim + 2; }

// ---- Sequences and their parts.

struct Sequence {
  int begin, tokens;
};

__device__ __forceinline__ Sequence sequence_of(const Problem& p, int n, int64_t length) {
  const int most = static_cast<int>(length);
  if (p.cu_seqlens == nullptr) {
    return {0, most};
  }
  const auto inside = [&](int row) { return row < 0 ? 0 : row < most ? row : most; };
  const int begin = inside(p.cu_seqlens[n]), end = inside(p.cu_seqlens[n + 1]);
  return {begin, end > begin ? end - begin : 0};
}

// The place of a sequence's first part among those of a head: a packed sequence has places enough up to the next one's.
__device__ __forceinline__ int first_part(const Problem& p, int n, const Cut& cut) {
  return p.cu_seqlens == nullptr ? 0 : sequence_of(p, n, cut.length).begin / cut.span + n;
}

struct Part {
  int n, batch, head;
  int begin, tokens;  // of the sequence
  int first, last;    // its rows that are the part's
  int64_t place, unit;
};

__device__ __forceinline__ Part part_at(const Problem& p, const Cut& cut, int place) {
  const int heads = static_cast<int>(p.heads), sequences = static_cast<int>(p.num_sequences);
  Part s{};
  s.place = place;
  s.head = place / cut.parts % heads;
  s.batch = place / cut.parts / heads;
  s.n = s.batch;
  int part = place % cut.parts;
  if (p.cu_seqlens != nullptr) {
    int low = 0, high = sequences - 1;  // the last sequence whose first part is no later
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      first_part(p, middle, cut) <= part ? low = middle : high = middle - 1;
    }
    s.n = low;
    part -= first_part(p, low, cut);
  }
  const Sequence of = sequence_of(p, s.n, cut.length);
  s.begin = of.begin;
  s.tokens = of.tokens;
  s.first = part * cut.span;
  s.last = part < 0 ? s.first : s.first + cut.span < s.tokens ? s.first + cut.span : s.tokens;
  s.unit = static_cast<int64_t>(s.n) * heads + s.head;
  return s;
}

// What parts of a unit have summed up: from where on, and how many.
struct Places {
  int64_t first;
  int count, tokens;
};
__device__ __forceinline__ Places places_of(const Problem& p, const Cut& cut, int64_t unit) {
  const int n = static_cast<int>(unit / p.heads), head = static_cast<int>(unit % p.heads);
  const int tokens = sequence_of(p, n, cut.length).tokens;
  const int64_t of_head = p.cu_seqlens == nullptr ? unit : head;
  return {of_head * cut.parts + first_part(p, n, cut), ceil_div(tokens, cut.span), tokens};
}

__device__ __forceinline__ Road road_of(const Problem& p, int n) { return static_cast<Road>(p.road[n]); }

__device__ __forceinline__ float divisor(const Problem& p, const Segments& segments, int n, int i) {
  return static_cast<const float*>(segments.divisors)[n * p.num_landmarks + i];
}

// The rows of a segment, counted from a sequence's first; none past the last segment.
struct Bounds {
  int lower, upper;
  __device__ __forceinline__ bool has(int t) const { return t >= lower && t < upper; }
};
__device__ __forceinline__ Bounds bounds_of(const Problem& p, const Segments& segments, const Part& s, int i) {
  Bounds out{0, 0};
  if (i < p.num_landmarks) {
    const int64_t* const at = segments.bounds + s.n * (p.num_landmarks + 1) + i;
    out = {static_cast<int>(at[0] - s.begin), static_cast<int>(at[1] - s.begin)};
  }
  return out;
}

// The landmark whose segment row t is in.
__device__ __forceinline__ int owner_of(const Problem& p, const Segments& segments, const Part& s, int t) {
  const int64_t* const bounds = segments.bounds + s.n * (p.num_landmarks + 1);
  int low = 0, high = static_cast<int>(p.num_landmarks) - 1;  // the first segment that ends past t
  while (low < high) {
    const int middle = (low + high) / 2;
    bounds[middle + 1] - s.begin > t ? high = middle : low = middle + 1;
  }
  return low;
}

__device__ __forceinline__ bool keeps(const uint8_t* mask, const int64_t* stride, const Part& s, int t) {
  return t < s.tokens && (mask == nullptr || mask[s.batch * stride[0] + (int64_t{s.begin} + t) * stride[1]] != 0);
}

template <class T>
__device__ __forceinline__ T* element(const View& x, const Part& s, int t) {
  return static_cast<T*>(x.data) + s.batch * x.stride[0] + (int64_t{s.begin} + t) * x.stride[1] + s.head * x.stride[2];
}

// kTile rows from row t on and columns from a chunk's first on, of q or what has its rows, or of k or such. (What Rows
// holds is found anew for each tile: it would not fit into registers beside products.)
template <class T, class P>
__device__ __forceinline__ void load_rows(Tile<P, kTile, kTile>& to, const Problem& p, const View& x, bool of_queries,
                                          const Part& s, int64_t columns, int t, int chunk) {
  Rows<T> from{element<const T>(x, s, 0), x.stride[1], x.stride[3], x.wide, s.tokens, static_cast<int>(columns)};
  const uint8_t* const mask = of_queries ? p.query_mask : p.key_mask;
  if (mask != nullptr) {
    const int64_t* const stride = of_queries ? p.query_mask_stride : p.key_mask_stride;
    from.mask = mask + s.batch * stride[0] + s.begin * stride[1];
    from.mask_stride = stride[1];
  }
  load_tile<T, kThreads>(to, from, t, chunk * kTile, static_cast<int>(threadIdx.x));
}

// ---- Products.

// What products take of tensors of type T: float16 as float32.
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float>;

// Rows as they are.
template <class P>
using Exact = Tile<P, kTile, kTile>;

// Numbers of float32, for products of bfloat16 as two of them.
struct Halves {
  Exact<bfloat16> high, low;
};
template <class P>
using Wide = std::conditional_t<std::is_same_v<P, bfloat16>, Halves, Exact<float>>;

__device__ __forceinline__ void put(Exact<float>& to, int row, int column, float x) { *to.at(row, column) = x; }
__device__ __forceinline__ void put(Halves& to, int row, int column, float x) {
  const bfloat16 high = narrow<bfloat16>(x);
  *to.high.at(row, column) = high;
  *to.low.at(row, column) = narrow<bfloat16>(x - widen(high));
}

// A tile whose addresses are found where they are used, and not once, to be kept in registers.
template <class X>
__device__ __forceinline__ X& here(X& tile) {
  return (&tile)[unknown(0)];
}
template <class X>
__device__ __forceinline__ auto& high_of(X& x) {
  if constexpr (std::is_same_v<X, Halves>) {
    return here(x.high);
  } else {
    return here(x);
  }
}

// Where the i-th number of a product's n-th tile is that a thread has. (Found anew for each use: kept for all of them
// it would take registers.)
struct Place {
  const int thread = unknown(static_cast<int>(threadIdx.x));
  __device__ __forceinline__ int row(int i) const { return thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8; }
  __device__ __forceinline__ int column(int n, int i) const { return 8 * n + thread % 4 * 2 + i % 2; }
};

// visit(n, i), or visit(n, i, row, column), for every number that a thread has of a product.
template <class Visit>
__device__ __forceinline__ void for_each(Visit&& visit) {
  const Place at;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_invocable_v<Visit, int, int>) {
        visit(n, i);
      } else {
        visit(n, i, at.row(i), at.column(n, i));
      }
    }
  }
}

// d += a·b of a warp's rows, k in [0, depth); a and b as in tile.cuh. Of halves all products but that of both low ones.
template <class P, bool kTurnedA, bool kTurnedB, class A, class B>
__device__ __forceinline__ void add_product(float (&d)[kN][4], A& a, B& b, int depth) {
  const int row = static_cast<int>(threadIdx.x) / 32 * 16;
  if constexpr (std::is_same_v<A, Halves>) {
    multiply<P, kTurnedA, kTurnedB>(d, here(a.low), row, high_of(b), 0, depth);
  }
  if constexpr (std::is_same_v<B, Halves>) {
    multiply<P, kTurnedA, kTurnedB>(d, high_of(a), row, here(b.low), 0, depth);
  }
  multiply<P, kTurnedA, kTurnedB>(d, high_of(a), row, high_of(b), 0, depth);
}

// d += x·b, x as a warp has it of a product, or kExact: of numbers that products take as they are.
template <class P, bool kExact = false, class B>
__device__ __forceinline__ void add_product(float (&d)[kN][4], const float (&x)[kN][4], B& b) {
  Fragments<P, kN> a;
  if constexpr (std::is_same_v<P, bfloat16> && !kExact) {
    float low[kN][4];
    for_each([&](int n, int i) { low[n][i] = x[n][i] - widen(narrow<bfloat16>(x[n][i])); });
    a.take(low);
    begin_product(d, a, 0, high_of(b), kTile);
  }
  a.take(x);
  if constexpr (std::is_same_v<B, Halves>) {
    begin_product(d, a, 0, here(b.low), kTile);
  }
  begin_product(d, a, 0, high_of(b), kTile);
}

// How deep a product over a chunk of `columns` columns is.
__device__ __forceinline__ int depth_of(int64_t columns, int chunk) {
  const int64_t left = columns - int64_t{chunk} * kTile;
  return left < kTile ? static_cast<int>(left + 15) / 16 * 16 : kTile;
}

// Tiles of tokens, which a block takes one after the other: fetch(tile, step) begins what brings one. The last kKept
// that were taken stay.
template <class P, class Fetch>
class TileStream {
 public:
  __device__ __forceinline__ TileStream(Exact<P> (&tiles)[kStages], int steps, Fetch fetch)
      : tiles_(tiles), steps_(steps), fetch_(fetch) {
    for (int step = 0; step < kStages - kKept; ++step) {
      begin(step);
    }
  }
  __device__ __forceinline__ Exact<P>& take() {
    wait_copies<kStages - kKept - 1>();
    __syncthreads();
    begin(step_ + kStages - kKept);
    return tiles_[step_++ % kStages];
  }
  // The one taken last, and that before it.
  __device__ __forceinline__ Exact<P>& last() { return tiles_[(step_ - 1) % kStages]; }
  __device__ __forceinline__ Exact<P>& before_last() { return tiles_[(step_ + kStages - 2) % kStages]; }

 private:
  __device__ __forceinline__ void begin(int step) {
    if (step < steps_) {
      fetch_(tiles_[step % kStages], step);
    }
    commit_copies();
  }

  Exact<P> (&tiles_)[kStages];
  const int steps_;
  int step_ = 0;
  Fetch fetch_;
};

// kTile landmarks and kTile columns of a tensor [units, m, width], times a factor.
template <class P>
class Landmarks {
 public:
  __device__ __forceinline__ Landmarks(Wide<P>& tile, const Problem& p, const void* data, int64_t unit, int64_t width,
                                       float factor)
      : tile(tile),
        data_(static_cast<const float*>(data) + unit * p.num_landmarks * width),
        m_(static_cast<int>(p.num_landmarks)),
        width_(static_cast<int>(width)),
        factor_(factor) {}

  // Makes `tile` those from (group, chunk) on, if it is not yet. All threads together.
  __device__ __forceinline__ void hold(int group, int chunk) {
    if (group == group_ && chunk == chunk_) {
      return;
    }
    group_ = group;
    chunk_ = chunk;
    __syncthreads();
    for (int at = threadIdx.x; at < kTile * kTile; at += kThreads) {
      const int i = at / kTile, c = at % kTile, row = group * kTile + i, column = chunk * kTile + c;
      put(tile, i, c, row < m_ && column < width_ ? factor_ * data_[int64_t{row} * width_ + column] : 0);
    }
    __syncthreads();
  }

  Wide<P>& tile;

 private:
  const float* const data_;
  const int m_, width_;
  const float factor_;
  int group_ = -1, chunk_ = -1;
};

// ---- Softmax.

// Of the four lanes that have a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Over the columns that a thread's two rows have met so far.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  __device__ __forceinline__ float shift(int r) const { return top[r] == -INFINITY ? 0 : top[r]; }
  __device__ __forceinline__ float share(int r) const { return sum[r] == 0 ? 1 : 1 / sum[r]; }

  // Scores of more columns, -∞ where there is none, become their weights by the largest so far; what was summed up by
  // earlier ones is to be multiplied with factor.
  __device__ __forceinline__ void add(float (&x)[kN][4], float (&factor)[2]) {
    float higher[2] = {top[0], top[1]}, added[2] = {};
    for_each([&](int n, int i) { higher[i / 2] = fmaxf(higher[i / 2], x[n][i]); });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float before = top[r];
      top[r] = row_max(higher[r]);
      factor[r] = expf(before - shift(r));
    }
    for_each([&](int n, int i) {
      x[n][i] = expf(x[n][i] - shift(i / 2));
      added[i / 2] += x[n][i];
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = sum[r] * factor[r] + row_sum(added[r]);
    }
  }
};

// ---- What tiles of tokens become.

// d += the rows of x around a tile's rows, by a head's weights: a product with a matrix whose rows are the weights,
// each a column further right. Backward they are in reverse. take() gives the rows, from before_weights() earlier on.
__host__ __device__ __forceinline__ int conv_tiles(const Problem& p) {
  return p.taps == 0 ? 0 : static_cast<int>((kTile + p.taps - 2) / kTile + 1);
}
template <bool kReverse>
__device__ __forceinline__ int before_weights(const Problem& p) {
  return static_cast<int>(kReverse ? p.taps - 1 - p.taps / 2 : p.taps / 2);
}
template <class P, bool kReverse, class Take>
__device__ __forceinline__ void convolve(float (&d)[kN][4], const Problem& p, int head, Take&& take) {
  const int taps = static_cast<int>(p.taps);
  const float* const weights = static_cast<const float*>(p.conv_weight) + int64_t{head} * taps;
  for (int tile = 0; tile < conv_tiles(p); ++tile) {
    float band[kN][4];
    for_each([&](int n, int i, int row, int column) {
      const int tap = tile * kTile + column - row;
      band[n][i] = tap >= 0 && tap < taps ? weights[kReverse ? taps - 1 - tap : tap] : 0;
    });
    add_product<P>(d, band, take());
  }
}

// d to rows of a tensor, kTile columns of `columns` from a slice's first on, by way of a warp's own rows of a tile that
// no warp needs any more.
template <class T, class P>
__device__ __forceinline__ void write_rows(const View& x, const Part& s, int t, int64_t columns, int slice,
                                           const float (&d)[kN][4], Exact<P>& scratch) {
  constexpr int kVector = 16 / sizeof(T), kPitch = kTile + kVector;
  static_assert(sizeof(scratch.data) >= kTile * kPitch * sizeof(T), "a tile has room");
  T* const staged = reinterpret_cast<T*>(scratch.data);

  const Place place;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      store(staged + place.row(i) * kPitch + place.column(n, i),
            Vector<T, 2>{narrow<T>(d[n][i]), narrow<T>(d[n][i + 1])});
    }
  }
  __syncwarp();
  const int left = static_cast<int>(columns) - slice * kTile;
  for (int at = place.thread % 32; at < 16 * (kTile / kVector); at += 32) {
    const int row = place.thread / 32 * 16 + at / (kTile / kVector), column = at % (kTile / kVector) * kVector;
    if (t + row >= s.tokens || column >= left) {
      continue;
    }
    T* const to = element<T>(x, s, t + row) + (int64_t{slice} * kTile + column) * x.stride[3];
    const T* const from = staged + row * kPitch + column;
    if (x.wide && column + kVector <= left) {
      store(to, *reinterpret_cast<const Vector<T, kVector>*>(from));
    } else {
      for (int e = 0; e < kVector && column + e < left; ++e) {
        to[e * x.stride[3]] = from[e];
      }
    }
  }
}

// A part's sums of kTile landmarks, to rows of `pitch` numbers: columns of `columns` from a slice's first on.
__device__ __forceinline__ void write_sums(float* to, const Problem& p, int group, int64_t pitch, int64_t columns,
                                           int slice, const float (&d)[kN][4]) {
  for_each([&](int n, int i, int row, int column) {
    row += group * kTile;
    column += slice * kTile;
    if (row < p.num_landmarks && column < columns) {
      to[row * pitch + column] = d[n][i];
    }
  });
}

// What a tile's tokens are, for two tiles in turn.
struct Tokens {
  bool keep[2][kTile];
  int owner[2][kTile];  // the landmark of each
};

}  // namespace kx::nystrom_attention
