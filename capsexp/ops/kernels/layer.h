// One layer of matrix capsules on a CPU: its sizes, its memory, its votes.
//
// The votes V_ij = M_i W_ij + offset_i are never stored. Parent types are the lanes of a vector. For each parent
// position and each column m of a pose, the votes of all children in the window make a tile that fits the L1
// cache; mean, variance and distances of that column come from the tile, and the next column overwrites it.
//
// layer.h: sizes, memory, votes. shares.h: R from densities, and backward. passes.h: the iterations, and
// backward through them. run.h: images over threads, and code for each type and shape. One algorithm's
// arithmetic is in em.cpp, vb.cpp, heinsen.cpp.
//
// Sizes: B images, I children, P parent positions, K places of a window, J types (Jp: padded to whole vectors),
// D = rows * side numbers of a pose, T iterations.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "vectors.h"

// One call, as far as all algorithms share it; an algorithm adds its own fields at the end. Mirrored field by
// field in problem.py.
struct Problem {
  int64_t batch, children, positions, places, types, matrices, iterations, rows, side, lanes, doubles;
  int64_t normalisation, keep, detach, threads;
  double outlier;  // least sum of densities; 0 for none
  // Read. [B I D], [matrices J side side], [B I], [P K], [P K], [K], [K D] or null, [matrices J D] or
  // null.
  const void *poses, *weight, *activations, *initial;
  const int64_t *child, *matrix;
  const void *offsets, *bias;
  // Written by forward, read by backward; with keep = 0 all iterations share one slot.
  // [T-1 B P K Jp], [T B P D Jp], [T B P D Jp], [T B P saved Jp], of an algorithm's `saved` numbers per parent.
  void *coupling, *mean, *variance, *stats;
  void *whole;  // with `outlier` only, see shares.h: [T-1 B I], for TYPES [T-1 B P K]
  // Written by forward: [B P J D], [B P J]; of EM the scores are activations.
  void *out_poses, *out_scores;
  // Read by backward, each may be null: [B P J D], [B P J], [B P K Jp].
  const void *g_poses, *g_scores, *g_coupling;
  // Written by backward; zero before.
  void *d_poses, *d_weight, *d_activations, *d_bias;
};

namespace {

enum Normalisation { PAPER = 0, TYPES = 1, OFFICIAL_V1 = 2 };
constexpr double SMALLEST_MASS = 1e-8;  // as in capsexp/ops/em_steps.py

// SAVED: numbers of each parent and iteration that the algorithm saves for the backward pass.
template <typename Number, int W, int ROWS_, int SIDE_, int SAVED> struct Layer {
  using T = Number;
  using V = typename Lanes<T, W>::type;
  using M = Math<T, W>;
  static constexpr int LANES = W, ROWS = ROWS_, SIDE = SIDE_, D = ROWS * SIDE;

  const Problem &q;
  const int64_t I, P, K, J, T_, NB;  // NB: vectors of types
  const T *poses, *activations, *initial, *offsets;
  V *coupling, *mean, *variance, *stats;
  Buffer<V> packed;  // weights, [NB][side (m)][matrices][side (n)]
  Buffer<V> bias;    // [NB][side (m)][matrices][rows], or nothing
  Buffer<V> real;    // [NB]: 1 where a lane is a type, 0 in the padding

  explicit Layer(const Problem &problem)
      : q(problem), I(q.children), P(q.positions), K(q.places), J(q.types), T_(q.iterations),
        NB((q.types + W - 1) / W), poses((const T *)q.poses), activations((const T *)q.activations),
        initial((const T *)q.initial), offsets((const T *)q.offsets), coupling((V *)q.coupling), mean((V *)q.mean),
        variance((V *)q.variance), stats((V *)q.stats), packed(NB * SIDE * q.matrices * SIDE),
        bias(q.bias ? NB * q.matrices * D : 0), real(NB) {
    const T *weight = (const T *)q.weight, *given = (const T *)q.bias;
    for (int64_t block = 0; block < NB; block++)
      for (int lane = 0; lane < W; lane++) {
        const int64_t j = block * W + lane;
        const bool there = j < J;
        real[block][lane] = there ? T(1) : T(0);
        for (int64_t k = 0; k < q.matrices; k++)
          for (int m = 0; m < SIDE; m++) {
            for (int n = 0; n < SIDE; n++)
              matrix_row(block, m, k)[n][lane] = there ? weight[((k * J + j) * SIDE + n) * SIDE + m] : T(0);
            for (int row = 0; row < ROWS && q.bias; row++)
              biases(block, m, k)[row][lane] = there ? given[(k * J + j) * D + row * SIDE + m] : T(0);
          }
      }
  }

  // Numbers of each type, [count][J], as vectors, [NB][count].
  Buffer<V> by_type(const void *numbers, int64_t count) const {
    Buffer<V> vectors(NB * count);
    for (int64_t k = 0; k < count; k++)
      for (int64_t j = 0; j < NB * W; j++)
        vectors[j / W * count + k][j % W] = j < J ? ((const T *)numbers)[k * J + j] : T(0);
    return vectors;
  }
  // Back from [NB][count][NUMBERS] to [count][J][NUMBERS].
  template <int NUMBERS> void from_vectors(const V *vectors, int64_t count, void *numbers) const {
    for (int64_t k = 0; k < count; k++)
      for (int64_t j = 0; j < J; j++)
        for (int e = 0; e < NUMBERS; e++)
          ((T *)numbers)[(k * J + j) * NUMBERS + e] = vectors[(j / W * count + k) * NUMBERS + e][j % W];
  }

  V *matrix_row(int64_t block, int m, int64_t k) { return packed.data + ((block * SIDE + m) * q.matrices + k) * SIDE; }
  V *biases(int64_t block, int m, int64_t k) { return bias.data + ((block * SIDE + m) * q.matrices + k) * ROWS; }
  int64_t slot(int64_t t) const { return q.keep ? t : 0; }
  int64_t parent(int64_t t, int64_t b, int64_t p) const { return (slot(t) * q.batch + b) * P + p; }
  V *means(int64_t t, int64_t b, int64_t p, int64_t block) { return mean + parent(t, b, p) * D * NB + block; }
  V *variances(int64_t t, int64_t b, int64_t p, int64_t block) { return variance + parent(t, b, p) * D * NB + block; }
  // The algorithm's own, [SAVED][NB].
  V *saved(int64_t t, int64_t b, int64_t p, int64_t block) { return stats + parent(t, b, p) * SAVED * NB + block; }
  // R of iteration t >= 1, [K][NB].
  V *shares(int64_t t, int64_t b, int64_t p) { return coupling + parent(t - 1, b, p) * K * NB; }
  V share(int64_t t, int64_t b, int64_t p, int64_t block, int64_t k) {
    return t == 0 ? real[block] * initial[p * K + k] : shares(t, b, p)[k * NB + block];
  }

  // R_ij a_i of the children in the window of position p. Returns their sum.
  V assigned(int64_t t, int64_t b, int64_t p, int64_t block, V *r) {
    const int64_t *child = q.child + p * K;
    const T *active = activations + b * I;
    V total = {};
    for (int64_t k = 0; k < K; k++) {
      r[k] = share(t, b, p, block, k) * active[child[k]];
      total += r[k];
    }
    return total;
  }

  // Votes of place k for column m of the pose, one vector per row.
  [[gnu::always_inline]] inline void votes(int64_t b, int64_t p, int64_t block, int m, int64_t k, V *v) {
    const T *pose = poses + (b * I + q.child[p * K + k]) * D;
    const V *w = matrix_row(block, m, q.matrix[k]);
    for (int row = 0; row < ROWS; row++) {
      v[row] = w[0] * pose[row * SIDE];
      for (int n = 1; n < SIDE; n++) v[row] += w[n] * pose[row * SIDE + n];
      if (offsets) v[row] += offsets[k * D + row * SIDE + m];
      if (q.bias) v[row] += biases(block, m, q.matrix[k])[row];
    }
  }

  // Results of the parents in one vector.
  void write(int64_t b, int64_t p, int64_t block, const V *mu, V score) {
    const int64_t types = std::min<int64_t>(W, J - block * W), first = (b * P + p) * J + block * W;
    T *out = (T *)q.out_poses + first * D, *to = (T *)q.out_scores + first;
    for (int64_t lane = 0; lane < types; lane++) {
      to[lane] = score[lane];
      for (int h = 0; h < D; h++) out[lane * D + h] = mu[h * NB][lane];
    }
  }

  // Gradients of the results of the parents in one vector.
  V given_score(int64_t b, int64_t p, int64_t block) const {
    V g = {};
    if (!q.g_scores) return g;
    const T *from = (const T *)q.g_scores + (b * P + p) * J + block * W;
    for (int64_t lane = 0; lane < std::min<int64_t>(W, J - block * W); lane++) g[lane] = from[lane];
    return g;
  }
  V given_pose(int64_t b, int64_t p, int64_t block, int h) const {
    V g = {};
    if (!q.g_poses) return g;
    const T *from = (const T *)q.g_poses + ((b * P + p) * J + block * W) * D + h;
    for (int64_t lane = 0; lane < std::min<int64_t>(W, J - block * W); lane++) g[lane] = from[lane * D];
    return g;
  }
};

}  // namespace
