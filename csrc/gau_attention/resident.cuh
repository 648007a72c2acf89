// Gated attention with scores that stay: a cluster of blocks has kTile queries, makes P once for all of its keys, tile
// by tile in turn, and every block keeps all of it for its own slices of the values, in the names of
// kx_kernels/ops/gau_attention/README.md. sm_90 and later.
//
//   kernel     product                to
//   resident   A = c f(q kᵀ) v        o = gate ⊙ A
#pragma once

#include "../cuda/cluster.cuh"
#include "fused.cuh"

namespace kx::gau_attention {

constexpr int kMostResidentBlocks = 8;  // of a cluster, everywhere

// How the kernel is laid out: as on chip, but for two stages, and P of kTiles tiles of keys at most.
template <class T, bool kWgmma>
struct ResidentForm : OnChipForm<T, std::is_same_v<T, bfloat16> ? 2 * kTile : kTile, kWgmma> {
  static constexpr int kStages = 2;
  static constexpr int kTiles = kWgmma ? 10 : std::is_same_v<T, bfloat16> ? 8 : 6;
};

template <class T, bool kWgmma>
struct Shared<ResidentForm<T, kWgmma>> {
  using F = ResidentForm<T, kWgmma>;
  using E = typename F::E;
  using Scores = Tile<E, kTile, F::kKeys, F::kSwizzle>;
  Scores scores[F::kTiles];
  union {
    struct {
      Tile<E, kTile, F::kDepth, F::kSwizzle> q[F::kPanels];
      KeyTile<F> k[F::kStages][F::kPanels];
    };
    Tile<E, F::kKeys, F::kColumns, F::kSwizzle> v[F::kStages];
    float staged[kTile][64 + 4];  // columns of a product, once it is whole
  };
  Mbarrier there[F::kTiles];  // its first phase ends when the tile of scores is there
  float own[kTile];           // sums of rows
  bool keep_key[F::kStages][F::kKeys];
};

// P of a tile of keys from registers to where products find it.
template <class F>
__device__ __forceinline__ void keep_scores(const float (&scores)[F::kScoreN][4], typename Shared<F>::Scores& to,
                                            int thread) {
  using T = typename F::T;
  using E = typename F::E;
  if (F::kSwizzle == 0 && thread < kTile) {  // what pads a row is sent along
    store(to.at(thread, F::kKeys), Vector<E, 16 / sizeof(E)>{});
  }
#pragma unroll
  for (int n = 0; n < F::kScoreN; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * r, column = 8 * n + thread % 4 * 2;
      store(to.at(row, column), Vector<E, 2>{operand<T>(scores[n][2 * r]), operand<T>(scores[n][2 * r + 1])});
    }
  }
}

// This block's tiles of P, each sent to the others as soon as it is made.
template <class F>
__device__ __forceinline__ void make_resident_scores(Block<F>& block, const Problem& p, const Sequence& s, int head,
                                                     int tiles) {
  using T = typename F::T;
  Shared<F>& shared = block.shared;
  const int rank = static_cast<int>(cluster_rank()), blocks = static_cast<int>(cluster_size());
  const int panels = ceil_div(static_cast<int>(p.key_dim), F::kDepth);
  const Rows<T> q = queries_of<T>(p, p.q, s, head, p.key_dim), k = keys_of<T>(p, p.k, s, head, p.key_dim);
  const auto fetch = [&](int tile, int stage) {
    if (tile < tiles) {
      load_keys(block, p, s, k, tile * F::kKeys, shared.k[stage], shared.keep_key[stage]);
    }
    commit_copies();
  };
  for (int i = 0; i < panels; ++i) {
    block.load(shared.q[i], q, s.first, i * F::kDepth);
  }
  fetch(rank, 0);
  Scores<F> rows(p, s, head);
  wait_for_cluster();  // the others run, and their mbarriers are there
  for (int tile = rank, stage = 0; tile < tiles; tile += blocks, stage ^= 1) {
    wait_copies<0>();
    block.sync();
    fetch(tile + blocks, stage ^ 1);
    float scores[F::kScoreN][4] = {};
    for (int i = 0; i < panels; ++i) {
      begin_product<T, false, false>(scores, shared.q[i], 16 * block.warp, shared.k[stage][i], 0, F::kDepth);
    }
    finish_products<0, F::kWgmma>(scores);
    rows.weigh(scores, tile * F::kKeys, shared.keep_key[stage]);
    keep_scores<F>(scores, shared.scores[tile], block.thread);
    fence_proxy_async();
    __syncthreads();
    if (block.thread == 0) {
      for (int i = 1; i < blocks; ++i) {
        const auto other = static_cast<unsigned>((rank + i) % blocks);
        copy_bytes_to(other, &shared.scores[tile], sizeof shared.scores[tile], shared.there[tile]);
      }
      shared.there[tile].arrive();
    }
  }
  wait_all_copies();
  __syncthreads();
}

// kTile rows of the output, and of its columns this block's slices.
template <class F>
__device__ __forceinline__ void make_resident_out(const Problem& p, Shared<F>& shared) {
  using T = typename F::T;
  Block<F> block(shared);
  const int rank = static_cast<int>(cluster_rank()), blocks = static_cast<int>(cluster_size());
  const int task = static_cast<int>(gridDim.x - 1 - blockIdx.x) / blocks;  // those that see most keys first
  const int heads = static_cast<int>(p.heads), head = task % heads;
  const Sequence s = tile_of_rows(p, task / heads);
  const int tiles = ceil_div(s.seen(p.causal), F::kKeys);
  if (block.thread == 0) {
    for (int tile = 0; tile < tiles; ++tile) {
      shared.there[tile].init(1);
      if (tile % blocks != rank) {
        shared.there[tile].arrive_and_expect(sizeof shared.scores[tile]);
      }
    }
    fence_mbarriers();
  }
  arrive_at_cluster();
  make_resident_scores(block, p, s, head, tiles);

  const Rows<T> v = keys_of<T>(p, p.v, s, head, p.value_dim);
  for (int slice = rank; slice * F::kColumns < p.value_dim; slice += blocks) {
    const int first_column = slice * F::kColumns;
    const auto fetch = [&](int tile) {
      if (tile < tiles) {
        block.load(shared.v[tile % F::kStages], v, tile * F::kKeys, first_column);
      }
      commit_copies();
    };
    float d[F::kN][4] = {};
    float sum = 0;  // of half of this thread's row
    fetch(0);
    for (int tile = 0; tile < tiles; ++tile) {
      wait_copies<0>();
      shared.there[tile].wait(0);
      block.sync();
      multiply<T, false, true>(d, shared.scores[tile], 16 * block.warp, shared.v[tile % F::kStages], 0, F::kKeys,
                               [&] { fetch(tile + 1); });
      if (p.by_sum && slice == rank) {
        add_half_row(sum, shared.scores[tile], block.thread);
      }
    }
    if (p.by_sum && slice == rank) {
      write_row_sum(sum, shared.own, block.thread);
    }
    __syncthreads();
    for (int first = 0; first < F::kColumns; first += Block<F>::kStaged) {
      block.stage(d, first);
      finish_out(block, p, s, head, first_column + first);
      __syncthreads();
    }
  }
  sync_cluster();  // others may still copy from here
}

template <class F>
__global__ void __launch_bounds__(kThreads, 1) gau_resident_kernel(const __grid_constant__ Problem p) {
  if constexpr (runs_here<typename F::T, F::kWgmma>() && has_clusters_here()) {
    make_resident_out(p, shared_memory<Shared<F>>());
  } else {
    __trap();
  }
}

}  // namespace kx::gau_attention
