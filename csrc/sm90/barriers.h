// Named barriers of the Hopper kernels, by the event they announce. Barrier 0 belongs to __syncthreads.
#pragma once

#include "common/math.cuh"

namespace flash_ext::sm90 {

enum class NamedBarrier : int {
  // The tensor cores are warpgroup i's turn: i waits (128 threads), its predecessor in the ring arrives (128).
  kTurn0 = 1,
  kTurn1,
  kTurn2,
  // All threads of consumer warpgroup i (128) have rewritten their part of Q.
  kQueryRewritten0,
  kQueryRewritten1,
  kQueryRewritten2,
  // All threads of consumer warpgroup i (128) are done with its rows of Q, which become the staging of its output.
  kQueryRead0,
  kQueryRead1,
  kQueryRead2,
};

// Of the forward over latent vectors, beside kQueryRewritten0.
enum class LatentBarrier : int {
  // The first consumer has written the weights of a tile and the factors of its rows: both wait for all of it (256).
  kWeightsWritten = 1,
  // The second consumer has used them: it arrives (128), the first one waits (128).
  kWeightsUsed,
};

// The backward's, in kernels of their own.
enum class BwdBarrier : int {
  // All consumers (256 threads) have written their part of dS (and P) of a tile.
  kScoresWritten = 1,
  // All consumers (256) have used those of the tile before; where there is one stage.
  kScoresUsed,
  // The consumers' products of an item are complete, and V becomes the staging of dK and dV: consumer i (128), or, where
  // both read all of V, all (256, the first one).
  kValuesUsed0,
  kValuesUsed1,
};

FX_HOST_DEVICE constexpr int turn_of(int warpgroup) { return static_cast<int>(NamedBarrier::kTurn0) + warpgroup; }
FX_HOST_DEVICE constexpr int query_rewritten_by(int warpgroup) {
  return static_cast<int>(NamedBarrier::kQueryRewritten0) + warpgroup;
}
FX_HOST_DEVICE constexpr int query_read_by(int warpgroup) {
  return static_cast<int>(NamedBarrier::kQueryRead0) + warpgroup;
}

}  // namespace flash_ext::sm90
