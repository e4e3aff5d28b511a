// EM routing of one layer of matrix capsules on a CPU: forward, and backward through all iterations.
//
// The votes V_ij = M_i W_ij + offset_i are never stored. Parent types are the lanes of a vector. For each parent
// position and each column m of a pose, the votes of all children in the window make a tile that fits the L1
// cache; mean, variance and distances of that column come from the tile, and the next column overwrites it.
// Equations are those of `em_routing` in capsexp/routing/em.py; tests compare the two.
//
// Sizes: B images, I children, P parent positions, K places of a window, J types (Jp: padded to whole vectors),
// D = rows * side numbers of a pose, T iterations.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "vectors.h"

// One call. Mirrored field by field in em.py.
struct Problem {
  int64_t batch, children, positions, places, types, matrices, iterations, rows, side, lanes, doubles;
  int64_t normalisation, keep, detach, threads;
  double variance_floor, cost_scale, mean_smoothing;
  // Read. [B I D], [matrices J side side], [B I], [J], [J], [T], [P K], [P K], [K], [K D] or null.
  const void *poses, *weight, *activations, *beta_u, *beta_a, *temperatures, *initial;
  const int64_t *child, *matrix;
  const void *offsets;
  // Written by forward, read by backward; with keep = 0 all iterations share one slot.
  // [T-1 B P K Jp], [T B P D Jp], [T B P D Jp], [T B P 3 Jp] (mass, sum of log deviations, logit).
  void *coupling, *mean, *variance, *stats;
  // Written by forward: [B P J D], [B P J].
  void *out_poses, *out_activations;
  // Read by backward, each may be null: [B P J D], [B P J], [B P K Jp].
  const void *g_poses, *g_activations, *g_coupling;
  // Written by backward; zero before.
  void *d_poses, *d_weight, *d_activations, *d_beta_u, *d_beta_a;
};

namespace {

enum Normalisation { PAPER = 0, TYPES = 1, OFFICIAL_V1 = 2 };
constexpr double SMALLEST_MASS = 1e-8;  // as in capsexp/ops/em_steps.py
constexpr int64_t GROUPS = 16;          // of images, each with its own gradient, so that their sum does not
                                        // depend on the number of threads

template <typename T, int W, int ROWS, int SIDE> struct Layer {
  using V = typename Lanes<T, W>::type;
  using M = Math<T, W>;
  static constexpr int D = ROWS * SIDE;

  const Problem &q;
  const int64_t I, P, K, J, T_, NB;  // NB: vectors of types
  const T floor_, scale, smooth;
  const T *poses, *activations, *temperatures, *initial, *offsets;
  V *coupling, *mean, *variance, *stats;
  Buffer<V> packed;            // weights, [NB][side (m)][matrices][side (n)]
  Buffer<V> beta_u, beta_a, real;  // [NB]; real: 1 where a lane is a type, 0 in the padding

  explicit Layer(const Problem &problem)
      : q(problem), I(q.children), P(q.positions), K(q.places), J(q.types), T_(q.iterations),
        NB((q.types + W - 1) / W), floor_(T(q.variance_floor)), scale(T(q.cost_scale)), smooth(T(q.mean_smoothing)),
        poses((const T *)q.poses), activations((const T *)q.activations), temperatures((const T *)q.temperatures),
        initial((const T *)q.initial), offsets((const T *)q.offsets), coupling((V *)q.coupling), mean((V *)q.mean),
        variance((V *)q.variance), stats((V *)q.stats), packed(NB * SIDE * q.matrices * SIDE), beta_u(NB), beta_a(NB),
        real(NB) {
    const T *weight = (const T *)q.weight, *bu = (const T *)q.beta_u, *ba = (const T *)q.beta_a;
    for (int64_t block = 0; block < NB; block++)
      for (int lane = 0; lane < W; lane++) {
        const int64_t j = block * W + lane;
        const bool there = j < J;
        beta_u[block][lane] = there ? bu[j] : T(0);
        beta_a[block][lane] = there ? ba[j] : T(0);
        real[block][lane] = there ? T(1) : T(0);
        for (int64_t k = 0; k < q.matrices; k++)
          for (int n = 0; n < SIDE; n++)
            for (int m = 0; m < SIDE; m++)
              matrix_row(block, m, k)[n][lane] = there ? weight[((k * J + j) * SIDE + n) * SIDE + m] : T(0);
      }
  }

  V *matrix_row(int64_t block, int m, int64_t k) { return packed.data + ((block * SIDE + m) * q.matrices + k) * SIDE; }
  int64_t slot(int64_t t) const { return q.keep ? t : 0; }
  int64_t parent(int64_t t, int64_t b, int64_t p) const { return (slot(t) * q.batch + b) * P + p; }
  V *means(int64_t t, int64_t b, int64_t p, int64_t block) { return mean + parent(t, b, p) * D * NB + block; }
  V *variances(int64_t t, int64_t b, int64_t p, int64_t block) { return variance + parent(t, b, p) * D * NB + block; }
  V *numbers(int64_t t, int64_t b, int64_t p, int64_t block) { return stats + parent(t, b, p) * 3 * NB + block; }
  // R of iteration t >= 1, [K][NB].
  V *shares(int64_t t, int64_t b, int64_t p) { return coupling + parent(t - 1, b, p) * K * NB; }

  // R_ij a_i of the children in the window of position p. Returns their sum.
  V assigned(int64_t t, int64_t b, int64_t p, int64_t block, V *r) {
    const int64_t *child = q.child + p * K;
    const T *active = activations + b * I;
    V total = {};
    for (int64_t k = 0; k < K; k++) {
      const V share = t == 0 ? real[block] * initial[p * K + k] : shares(t, b, p)[k * NB + block];
      r[k] = share * active[child[k]];
      total += r[k];
    }
    return total;
  }

  // Votes of place k for column m of the pose, one vector per row.
  inline void votes(int64_t b, int64_t p, int64_t block, int m, int64_t k, V *v) {
    const T *pose = poses + (b * I + q.child[p * K + k]) * D;
    const V *w = matrix_row(block, m, q.matrix[k]);
    for (int row = 0; row < ROWS; row++) {
      v[row] = w[0] * pose[row * SIDE];
      for (int n = 1; n < SIDE; n++) v[row] += w[n] * pose[row * SIDE + n];
      if (offsets) v[row] += offsets[k * D + row * SIDE + m];
    }
  }

  // ---------------------------------------------------------------- forward

  struct Scratch {
    Buffer<V> r, tile, distance, child_vectors;
    Buffer<T> child_numbers;
    Scratch(int64_t places, int64_t children, int64_t blocks)
        : r(places), tile(places * ROWS), distance(places), child_vectors(2 * children * blocks),
          child_numbers(2 * children) {}
  };

  void forward(int64_t b, Scratch &s) {
    for (int64_t t = 0; t < T_; t++) {
      for (int64_t p = 0; p < P; p++)
        for (int64_t block = 0; block < NB; block++) fit(t, b, p, block, s);
      if (t + 1 < T_) normalise(t + 1, b, s);
    }
  }

  // M-step of the parents at one position; distances and densities of the E-step, not yet normalised.
  void fit(int64_t t, int64_t b, int64_t p, int64_t block, Scratch &s) {
    const bool last = t + 1 == T_;
    V *r = s.r.data, *tile = s.tile.data, *distance = s.distance.data;
    const V mass = assigned(t, b, p, block, r);
    const V least = V{} + T(SMALLEST_MASS), inverse = 1 / (mass > least ? mass : least);
    V *mu = means(t, b, p, block), *var = variances(t, b, p, block);
    const V *before = t > 0 ? means(t - 1, b, p, block) : nullptr;
    typename M::Product volume;
    if (!last) std::fill(distance, distance + K, V{});
    for (int m = 0; m < SIDE; m++) {
      V middle[ROWS], spread[ROWS], precision[ROWS];
      for (int row = 0; row < ROWS; row++) middle[row] = spread[row] = V{};
      for (int64_t k = 0; k < K; k++) {
        V v[ROWS];
        votes(b, p, block, m, k, v);
        for (int row = 0; row < ROWS; row++) {
          tile[k * ROWS + row] = v[row];
          middle[row] += r[k] * v[row];
        }
      }
      for (int row = 0; row < ROWS; row++) {
        const int h = row * SIDE + m;
        middle[row] *= inverse;
        if (smooth != 0) middle[row] = (1 - smooth) * middle[row] + (before ? smooth * before[h * NB] : V{});
      }
      for (int64_t k = 0; k < K; k++)
        for (int row = 0; row < ROWS; row++) {
          const V d = tile[k * ROWS + row] - middle[row], d2 = d * d;
          tile[k * ROWS + row] = d2;
          spread[row] += r[k] * d2;
        }
      for (int row = 0; row < ROWS; row++) {
        const int h = row * SIDE + m;
        spread[row] *= inverse;
        const V whole = real[block] != 0 ? spread[row] + floor_ : V{} + 1;
        volume.times(whole);
        precision[row] = 1 / whole;
        mu[h * NB] = middle[row];
        var[h * NB] = spread[row];
      }
      if (last) continue;
      for (int64_t k = 0; k < K; k++) {
        V total = distance[k];
        for (int row = 0; row < ROWS; row++) total += tile[k * ROWS + row] * precision[row];
        distance[k] = total;
      }
    }
    const V log_deviation = T(0.5) * volume.log();
    const V cost = scale * (T(D) * beta_u[block] + log_deviation) * mass;
    const V logit = temperatures[t] * (beta_a[block] - cost);
    V *saved = numbers(t, b, p, block);
    saved[0] = mass, saved[NB] = log_deviation, saved[2 * NB] = logit;
    const auto active = M::logistic(logit);
    if (last) {
      write(b, p, block, mu, active.on);
      return;
    }
    const V bias = real[block] != 0 ? active.log_on - log_deviation : V{} - T(1e30);
    V *density = shares(t + 1, b, p) + block;
    for (int64_t k = 0; k < K; k++) density[k * NB] = bias - T(0.5) * distance[k];
  }

  void write(int64_t b, int64_t p, int64_t block, const V *mu, V active) {
    const int64_t types = std::min<int64_t>(W, J - block * W), first = (b * P + p) * J + block * W;
    T *out = (T *)q.out_poses + first * D, *on = (T *)q.out_activations + first;
    for (int64_t lane = 0; lane < types; lane++) {
      on[lane] = active[lane];
      for (int h = 0; h < D; h++) out[lane * D + h] = mu[h * NB][lane];
    }
  }

  // Logarithms of densities to R: softmax over the parents that compete for a child.
  void normalise(int64_t t, int64_t b, Scratch &s) {
    if (q.normalisation == OFFICIAL_V1) return normalise_types_apart(t, b, s);
    T *top = s.child_numbers.data, *total = top + I;
    const bool everywhere = q.normalisation == PAPER && P > 1;
    if (!everywhere) {
      for (int64_t p = 0; p < P; p++)
        for (int64_t k = 0; k < K; k++) softmax(shares(t, b, p) + k * NB);
      return;
    }
    std::fill(top, top + I, -std::numeric_limits<T>::infinity());
    std::fill(total, total + I, T(0));
    for (int64_t p = 0; p < P; p++)
      for (int64_t k = 0; k < K; k++) {
        T &highest = top[q.child[p * K + k]];
        highest = std::max(highest, largest_of(shares(t, b, p) + k * NB));
      }
    for (int64_t p = 0; p < P; p++)
      for (int64_t k = 0; k < K; k++) {
        const int64_t i = q.child[p * K + k];
        total[i] += exponentials(shares(t, b, p) + k * NB, top[i]);
      }
    for (int64_t i = 0; i < I; i++) total[i] = 1 / total[i];
    for (int64_t p = 0; p < P; p++)
      for (int64_t k = 0; k < K; k++) {
        V *share = shares(t, b, p) + k * NB;
        for (int64_t block = 0; block < NB; block++) share[block] *= total[q.child[p * K + k]];
      }
  }

  T largest_of(const V *share) const {
    V highest = share[0];
    for (int64_t block = 1; block < NB; block++) highest = share[block] > highest ? share[block] : highest;
    return largest<T, W>(highest);
  }

  T exponentials(V *share, T top) const {
    V total = {};
    for (int64_t block = 0; block < NB; block++) total += share[block] = M::exp(share[block] - top);
    return sum<T, W>(total);
  }

  void softmax(V *share) const {
    const T inverse = 1 / exponentials(share, largest_of(share));
    for (int64_t block = 0; block < NB; block++) share[block] *= inverse;
  }

  void normalise_types_apart(int64_t t, int64_t b, Scratch &s) {
    V *top = s.child_vectors.data, *total = top + I * NB;
    std::fill(top, top + I * NB, V{} - std::numeric_limits<T>::infinity());
    std::fill(total, total + I * NB, V{});
    for (int pass = 0; pass < 3; pass++)
      for (int64_t p = 0; p < P; p++)
        for (int64_t k = 0; k < K; k++)
          for (int64_t block = 0; block < NB; block++) {
            V &share = shares(t, b, p)[k * NB + block];
            const int64_t i = q.child[p * K + k] * NB + block;
            if (pass == 0) top[i] = share > top[i] ? share : top[i];
            if (pass == 1) total[i] += share = M::exp(share - top[i]);
            if (pass == 2) share *= real[block] / total[i];
          }
  }

  // ---------------------------------------------------------------- backward

  struct BackScratch {
    Buffer<V> r, tile, gr;            // [K], [K][rows], [K]
    Buffer<V> gl;                     // [T-1][P][K][NB]: first g of R_(t+1), then of the E-step's logits
    Buffer<V> terms;                  // [P][NB][D][T] of Term, from which a vote's gradient is computed
    Buffer<V> carry;                  // [P][D][NB]: gradient of the mean before, for mean smoothing
    Buffer<V> balance_vectors;        // sum of R gR over the parents that compete for a child
    Buffer<T> balance;
    BackScratch(const Layer &l)
        : r(l.K * 3), tile(l.K * ROWS), gr(l.K), gl((l.T_ - 1) * l.P * l.K * l.NB), terms(l.P * l.NB * D * l.T_ * 4),
          carry(l.P * D * l.NB),
          balance_vectors(l.q.normalisation == OFFICIAL_V1 ? l.I * l.NB : 0),
          balance(l.q.normalisation == TYPES ? l.P * l.K : l.I) {}
  };
  // With d = V - mean: gV = sum over t of R_ij a_i (slope + curve d) - gl precision d.
  struct Term { V mean, slope, curve, precision; };
  // Gradients that many images share.
  struct Shared { V *weight, *beta_u, *beta_a; };  // [NB][matrices][side][side], [NB], [NB]

  void backward(int64_t b, BackScratch &s, Shared &g) {
    const int64_t first = q.detach ? T_ - 1 : 0;
    std::fill(s.carry.data, s.carry.data + P * D * NB, V{});
    for (int64_t t = T_ - 1; t >= first; t--) {
      if (t + 1 < T_) logits_from_shares(t, b, s);
      if (t > first) clear_balance(s);
      for (int64_t p = 0; p < P; p++)
        for (int64_t block = 0; block < NB; block++) {
          unfit(t, first, b, p, block, s, g);
          if (t == first) products(first, b, p, block, s, g);
        }
    }
  }

  V *g_logits(BackScratch &s, int64_t t, int64_t p) { return s.gl.data + (t * P + p) * K * NB; }

  void clear_balance(BackScratch &s) {
    if (q.normalisation == OFFICIAL_V1)
      std::fill(s.balance_vectors.data, s.balance_vectors.data + I * NB, V{});
    else
      std::fill(s.balance.data, s.balance.data + (q.normalisation == TYPES ? P * K : I), T(0));
  }

  // Softmax backward, in place: gl = R (gR - sum of R gR over the competitors).
  void logits_from_shares(int64_t t, int64_t b, BackScratch &s) {
    for (int64_t p = 0; p < P; p++) {
      const V *share = shares(t + 1, b, p);
      V *g = g_logits(s, t, p);
      for (int64_t k = 0; k < K; k++) {
        const int64_t i = q.child[p * K + k];
        for (int64_t block = 0; block < NB; block++) {
          const int64_t at = k * NB + block;
          if (q.normalisation == OFFICIAL_V1)
            g[at] = share[at] * (g[at] - s.balance_vectors[i * NB + block]);
          else
            g[at] = share[at] * (g[at] - s.balance[q.normalisation == TYPES ? p * K + k : i]);
        }
      }
    }
  }

  // Gradients of one position's M-step t and of the densities of the E-step after it; `products` adds its votes'.
  void unfit(int64_t t, int64_t first, int64_t b, int64_t p, int64_t block, BackScratch &s, Shared &g) {
    const bool last = t + 1 == T_;
    V *r = s.r.data, *tile = s.tile.data, *gr = s.gr.data;
    assigned(t, b, p, block, r);
    const V *saved = numbers(t, b, p, block), mass = saved[0], log_deviation = saved[NB];
    const V least = V{} + T(SMALLEST_MASS), divisor = mass > least ? mass : least, inverse = 1 / divisor;
    const auto active = M::logistic(saved[2 * NB]);
    const V *gl = last ? nullptr : g_logits(s, t, p) + block;
    V g_logit, g_deviation = {};
    if (last) {
      g_logit = given_activation(b, p, block) * active.on * active.off;
    } else {
      V total = {};
      for (int64_t k = 0; k < K; k++) total += gl[k * NB];
      g_logit = total * active.off;
      g_deviation = -total;
    }
    const T temperature = temperatures[t];
    const V g_cost = -temperature * g_logit;
    g.beta_a[block] += temperature * g_logit;
    g.beta_u[block] += T(D) * scale * mass * g_cost;
    g_deviation += scale * mass * g_cost;
    const V g_mass = scale * (T(D) * beta_u[block] + log_deviation) * g_cost;

    const V *mu = means(t, b, p, block), *var = variances(t, b, p, block);
    const V *before = t > 0 ? means(t - 1, b, p, block) : nullptr;
    Term *terms = (Term *)s.terms.data + (p * NB + block) * D * T_ + t;
    V *carry = s.carry.data + p * D * NB + block;
    V constant = g_mass;
    for (int64_t k = 0; k < K; k++) gr[k] = V{};
    for (int m = 0; m < SIDE; m++) {
      V middle[ROWS], first_moment[ROWS], second_moment[ROWS], alpha[ROWS], gamma[ROWS];
      for (int row = 0; row < ROWS; row++) {
        middle[row] = mu[(row * SIDE + m) * NB];
        first_moment[row] = second_moment[row] = V{};
      }
      for (int64_t k = 0; k < K && !last; k++) {
        V v[ROWS];
        votes(b, p, block, m, k, v);
        for (int row = 0; row < ROWS; row++) {
          const V d = v[row] - middle[row], part = gl[k * NB] * d;
          tile[k * ROWS + row] = d;
          first_moment[row] += part;
          second_moment[row] += part * d;
        }
      }
      for (int row = 0; row < ROWS; row++) {
        const int h = (row * SIDE + m) * NB;
        const V spread = var[h], whole = real[block] != 0 ? spread + floor_ : V{} + 1, precision = 1 / whole;
        const V g_var = T(0.5) * precision * (second_moment[row] * precision + g_deviation);
        V g_mean = carry[h] + (last ? given_pose(b, p, block, row * SIDE + m) : first_moment[row] * precision);
        V fresh = middle[row];  // the mean before smoothing
        if (smooth != 0) fresh = (fresh - (before ? smooth * before[h] : V{})) / (1 - smooth);
        g_mean -= 2 * g_var * (fresh - middle[row] * (mass * inverse));  // 0 but for smoothing or hardly any mass
        carry[h] = q.detach ? V{} : smooth * g_mean;
        alpha[row] = (1 - smooth) * g_mean * inverse;
        gamma[row] = g_var * inverse;
        terms[(row * SIDE + m) * T_] = {middle[row], alpha[row], 2 * gamma[row], precision};
        constant += mass > least ? alpha[row] * (middle[row] - fresh) - gamma[row] * spread : alpha[row] * middle[row];
      }
      for (int64_t k = 0; k < K; k++) {
        V v[ROWS], *d = tile + k * ROWS;
        if (last) {  // no sum over all children is needed first
          votes(b, p, block, m, k, v);
          for (int row = 0; row < ROWS; row++) v[row] -= middle[row];
          d = v;
        }
        V total = gr[k];
        for (int row = 0; row < ROWS; row++) total += d[row] * (alpha[row] + gamma[row] * d[row]);
        gr[k] = total;
      }
    }
    assignments(t, first, b, p, block, constant, s);
  }

  // From the gradient of R_ij a_i to those of a_i and R_ij.
  void assignments(int64_t t, int64_t first, int64_t b, int64_t p, int64_t block, V constant, BackScratch &s) {
    T *d_active = (T *)q.d_activations + b * I;
    const T *active = activations + b * I;
    const V *given = t + 1 == T_ && q.g_coupling ? (const V *)q.g_coupling + (b * P + p) * K * NB : nullptr;
    for (int64_t k = 0; k < K; k++) {
      const int64_t i = q.child[p * K + k], at = k * NB + block;
      const V g = s.gr[k] + constant;
      const V share = t == 0 ? real[block] * initial[p * K + k] : shares(t, b, p)[at];
      const V product = share * g;
      T total = sum<T, W>(product);
      d_active[i] += total;
      if (t == first) continue;
      V gR = g * active[i];
      total *= active[i];
      if (given) {
        gR += given[at];
        total += sum<T, W>(share * given[at]);
      }
      g_logits(s, t - 1, p)[at] = gR;
      if (q.normalisation == OFFICIAL_V1)
        s.balance_vectors[i * NB + block] += share * gR;
      else
        s.balance[q.normalisation == TYPES ? p * K + k : i] += total;
    }
  }

  V given_activation(int64_t b, int64_t p, int64_t block) const {
    V g = {};
    if (!q.g_activations) return g;
    const T *from = (const T *)q.g_activations + (b * P + p) * J + block * W;
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

  // Gradients of the votes of one position, summed over the iterations, into those of poses and matrices.
  void products(int64_t first, int64_t b, int64_t p, int64_t block, BackScratch &s, Shared &g) {
    constexpr int MOST = 3;  // iterations at a time
    for (int64_t begin = first; begin < T_; begin += MOST) {
      const int64_t count = std::min<int64_t>(MOST, T_ - begin);
      for (int64_t c = 0; c < count; c++) assigned(begin + c, b, p, block, s.r.data + c * K);
      if (begin + count < T_) {
        products_of<MOST, false>(begin, b, p, block, s, g);
        continue;
      }
      if (count == 1) products_of<1, true>(begin, b, p, block, s, g);
      if (count == 2) products_of<2, true>(begin, b, p, block, s, g);
      if (count == 3) products_of<3, true>(begin, b, p, block, s, g);
    }
  }

  // ENDS: these iterations end with the last one of the routing, which has no E-step.
  template <int COUNT, bool ENDS>
  void products_of(int64_t begin, int64_t b, int64_t p, int64_t block, BackScratch &s, Shared &g) {
    const Term *terms = (const Term *)s.terms.data + (p * NB + block) * D * T_ + begin;
    T *d_poses = (T *)q.d_poses + b * I * D;
    for (int64_t k = 0; k < K; k++) {
      const int64_t i = q.child[p * K + k], matrix = q.matrix[k];
      const T *pose = poses + (b * I + i) * D;
      const V *w[SIDE];
      for (int m = 0; m < SIDE; m++) w[m] = matrix_row(block, m, matrix);
      V r[COUNT], gl[COUNT];
      for (int c = 0; c < COUNT; c++) {
        r[c] = s.r[c * K + k];
        gl[c] = c + 1 < COUNT || !ENDS ? g_logits(s, begin + c, p)[k * NB + block] : V{};
      }
      V gv[D];
      for (int row = 0; row < ROWS; row++) {
        V v[SIDE], total[SIDE];
        for (int m = 0; m < SIDE; m++) {
          v[m] = w[m][0] * pose[row * SIDE];
          for (int n = 1; n < SIDE; n++) v[m] += w[m][n] * pose[row * SIDE + n];
          if (offsets) v[m] += offsets[k * D + row * SIDE + m];
        }
        for (int c = 0; c < COUNT; c++)
          for (int m = 0; m < SIDE; m++) {
            const Term &term = terms[(row * SIDE + m) * T_ + c];
            const V d = v[m] - term.mean, part = r[c] * (term.slope + term.curve * d);
            total[m] = c == 0 ? part : total[m] + part;
            if (c + 1 < COUNT || !ENDS) total[m] -= gl[c] * (term.precision * d);
          }
        for (int m = 0; m < SIDE; m++) gv[row * SIDE + m] = total[m];
      }
      V *d_weight = g.weight + (block * q.matrices + matrix) * SIDE * SIDE;
      for (int n = 0; n < SIDE; n++)
        for (int m = 0; m < SIDE; m++) {
          V total = d_weight[n * SIDE + m];
          for (int row = 0; row < ROWS; row++) total += gv[row * SIDE + m] * pose[row * SIDE + n];
          d_weight[n * SIDE + m] = total;
        }
      for (int row = 0; row < ROWS; row++) {
        V dm[SIDE];
        for (int n = 0; n < SIDE; n++) {
          dm[n] = gv[row * SIDE] * w[0][n];
          for (int m = 1; m < SIDE; m++) dm[n] += gv[row * SIDE + m] * w[m][n];
        }
        add_sums(dm, d_poses + i * D + row * SIDE);
      }
    }
  }

  static void add_sums(const V *vectors, T *to) {
    int n = 0;
    for (; n + 4 <= SIDE; n += 4) {
      const auto four = sums<T, W>(vectors + n);
      for (int lane = 0; lane < 4; lane++) to[n + lane] += four[lane];
    }
    for (; n < SIDE; n++) to[n] += sum<T, W>(vectors[n]);
  }
};

template <typename T, int W, int ROWS, int SIDE> void run_forward(const Problem &q) {
  using L = Layer<T, W, ROWS, SIDE>;
  L layer(q);
#pragma omp parallel num_threads(q.threads)
  {
    typename L::Scratch scratch(layer.K, layer.I, layer.NB);
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < q.batch; b++) layer.forward(b, scratch);
  }
}

template <typename T, int W, int ROWS, int SIDE> void run_backward(const Problem &q) {
  using L = Layer<T, W, ROWS, SIDE>;
  using V = typename L::V;
  L layer(q);
  const int64_t groups = std::min(GROUPS, q.batch), elements = layer.NB * q.matrices * SIDE * SIDE;
  const int64_t size = elements + 2 * layer.NB;
  Buffer<V> shared(std::max<int64_t>(groups, 1) * size);
#pragma omp parallel num_threads(q.threads)
  {
    typename L::BackScratch scratch(layer);
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < groups; group++) {
      V *own = shared.data + group * size;
      std::fill(own, own + size, V{});
      typename L::Shared g{own, own + elements, own + elements + layer.NB};
      for (int64_t b = group * q.batch / groups; b < (group + 1) * q.batch / groups; b++) layer.backward(b, scratch, g);
    }
  }
  for (int64_t group = 1; group < groups; group++)
    for (int64_t e = 0; e < size; e++) shared[e] += shared[group * size + e];
  if (groups == 0) return;
  T *d_weight = (T *)q.d_weight, *d_beta_u = (T *)q.d_beta_u, *d_beta_a = (T *)q.d_beta_a;
  for (int64_t j = 0; j < q.types; j++) {
    const int64_t block = j / W, lane = j % W;
    d_beta_u[j] = shared[elements + block][lane];
    d_beta_a[j] = shared[elements + layer.NB + block][lane];
    for (int64_t k = 0; k < q.matrices; k++)
      for (int e = 0; e < SIDE * SIDE; e++)
        d_weight[(k * q.types + j) * SIDE * SIDE + e] = shared[(block * q.matrices + k) * SIDE * SIDE + e][lane];
  }
}

template <typename T, int W, int ROWS, int SIDE> void run(const Problem &q, bool backward) {
  backward ? run_backward<T, W, ROWS, SIDE>(q) : run_forward<T, W, ROWS, SIDE>(q);
}

template <typename T, int W> bool run_shape(const Problem &q, bool backward) {
  if (q.rows == 4 && q.side == 4) return run<T, W, 4, 4>(q, backward), true;
  if (q.rows == 1 && q.side == 16) return run<T, W, 1, 16>(q, backward), true;
  if (q.rows == 3 && q.side == 3) return run<T, W, 3, 3>(q, backward), true;
  if (q.rows == 2 && q.side == 2) return run<T, W, 2, 2>(q, backward), true;
  return false;
}

int run_type(const Problem &q, bool backward) {
  bool done = false;
  if (q.doubles && q.lanes == 8) done = run_shape<double, 8>(q, backward);
  if (!q.doubles && q.lanes == 8) done = run_shape<float, 8>(q, backward);
  if (!q.doubles && q.lanes == 16) done = run_shape<float, 16>(q, backward);
  return done ? 0 : 1;
}

}  // namespace

extern "C" int em_forward(const Problem *q) { return run_type(*q, false); }
extern "C" int em_backward(const Problem *q) { return run_type(*q, true); }
