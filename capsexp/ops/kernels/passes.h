// The iterations of a routing that fits a Gaussian to the votes of each parent, and backward through them.
//
// An algorithm A is a page of arithmetic on vectors of parents; em.cpp is the simplest:
//   forward    position, parents, mean, spread, whole, density
//   backward   position_back, scalars, start, scaled, change, parameters, gradients
#pragma once
#include "shares.h"

namespace {

// What a vector of parents adds to the logarithm of a density, bias - factor * distance, and its result.
template <typename V, typename F> struct Density { V bias; F factor; V result; };
// Of one number of a pose, with d = V - mean: the gradient of r_ij is that of all parents + d (slope + curve d).
template <typename V> struct Change { V slope, curve; };

template <typename L, typename A> struct Forward {
  using T = typename L::T;
  using V = typename L::V;
  using M = typename L::M;
  static constexpr int ROWS = L::ROWS, SIDE = L::SIDE;

  L &l;
  A &a;
  Shares<L> shares;
  Forward(L &layer, A &algorithm) : l(layer), a(algorithm), shares(layer) {}

  struct Scratch {
    Buffer<V> r, tile, distance;
    typename Shares<L>::Scratch shares;
    explicit Scratch(const L &l) : r(l.K), tile(l.K * ROWS), distance(l.K), shares(l) {}
  };

  void image(int64_t b, Scratch &s) {
    for (int64_t t = 0; t < l.T_; t++) {
      for (int64_t p = 0; p < l.P; p++) {
        const auto position = a.position(t, b, p);
        for (int64_t block = 0; block < l.NB; block++) fit(t, b, p, block, position, s);
      }
      if (t + 1 < l.T_) shares.normalise(t + 1, b, s.shares);
    }
  }

  // M-step of the parents at one position; distances and densities of the E-step, not yet normalised.
  void fit(int64_t t, int64_t b, int64_t p, int64_t block, const typename A::Position &position, Scratch &s) {
    const bool last = t + 1 == l.T_;
    const int64_t K = l.K, NB = l.NB;
    V *r = s.r.data, *tile = s.tile.data, *distance = s.distance.data;
    const auto parents = a.parents(position, t, b, p, block, r);
    V *mu = l.means(t, b, p, block), *var = l.variances(t, b, p, block);
    const V *before = t > 0 ? l.means(t - 1, b, p, block) : nullptr;
    typename M::Product volume;
    if (!last) std::fill(distance, distance + K, V{});
    for (int m = 0; m < SIDE; m++) {
      V middle[ROWS], spread[ROWS], precision[ROWS];
      for (int row = 0; row < ROWS; row++) middle[row] = spread[row] = V{};
      for (int64_t k = 0; k < K; k++) {
        V v[ROWS];
        l.votes(b, p, block, m, k, v);
        for (int row = 0; row < ROWS; row++) {
          tile[k * ROWS + row] = v[row];
          middle[row] += r[k] * v[row];
        }
      }
      for (int row = 0; row < ROWS; row++)
        middle[row] = a.mean(parents, middle[row], before, (row * SIDE + m) * NB);
      for (int64_t k = 0; k < K; k++)
        for (int row = 0; row < ROWS; row++) {
          const V d = tile[k * ROWS + row] - middle[row], d2 = d * d;
          tile[k * ROWS + row] = d2;
          spread[row] += r[k] * d2;
        }
      for (int row = 0; row < ROWS; row++) {
        const int h = row * SIDE + m;
        spread[row] = a.spread(parents, spread[row], middle[row]);
        const V whole = l.real[block] != 0 ? a.whole(spread[row]) : V{} + 1;
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
    const auto density = a.density(parents, t, block, T(0.5) * volume.log(), l.saved(t, b, p, block));
    if (last) {
      l.write(b, p, block, mu, density.result);
      return;
    }
    const V bias = l.real[block] != 0 ? density.bias : V{} - T(1e30);
    V *to = l.shares(t + 1, b, p) + block;
    for (int64_t k = 0; k < K; k++) to[k * NB] = bias - density.factor * distance[k];
  }
};

template <typename L, typename A> struct Backward {
  using T = typename L::T;
  using V = typename L::V;
  using M = typename L::M;
  static constexpr int W = L::LANES, ROWS = L::ROWS, SIDE = L::SIDE, D = L::D;

  L &l;
  A &a;
  Shares<L> shares;
  const Problem &q;
  const int64_t K, NB;
  Backward(L &layer, A &algorithm) : l(layer), a(algorithm), shares(layer), q(l.q), K(l.K), NB(l.NB) {}

  struct Scratch {
    Buffer<V> r, tile, gr;  // [K], [K][rows], [K]
    Buffer<V> gl;           // [T-1][P][K][NB]: first g of R_(t+1), then of the E-step's logits
    Buffer<V> terms;        // [P][NB][D][T] of Term, from which a vote's gradient is computed
    Buffer<V> carry;        // [P][D][NB]: gradient of the mean before, for mean smoothing
    typename Shares<L>::Balance balance;
    explicit Scratch(const L &l)
        : r(l.K * 3), tile(l.K * ROWS), gr(l.K), gl((l.T_ - 1) * l.P * l.K * l.NB), terms(l.P * l.NB * D * l.T_ * 4),
          carry(l.P * D * l.NB), balance(l) {}
  };
  // With d = V - mean: gV = sum over t of R_ij a_i (slope + curve d) - gl precision d.
  struct Term { V mean, slope, curve, precision; };
  // Gradients that many images share: of the matrices, [NB][matrices][side][side], of the bias,
  // [NB][matrices][D], and the algorithm's own.
  struct Shared { V *weight, *bias, *own; };

  void image(int64_t b, Scratch &s, const Shared &g) {
    const int64_t first = q.detach ? l.T_ - 1 : 0;
    std::fill(s.carry.data, s.carry.data + l.P * D * NB, V{});
    for (int64_t t = l.T_ - 1; t >= first; t--) {
      if (t + 1 < l.T_) shares.logits_from_shares(t + 1, b, s.balance, g_logits(s, t, 0));
      if (t > first) shares.clear(s.balance);
      for (int64_t p = 0; p < l.P; p++) {
        const auto position = a.position_back(t, b, p, t + 1 < l.T_ ? g_logits(s, t, p) : nullptr);
        for (int64_t block = 0; block < NB; block++) {
          unfit(t, first, b, p, block, position, s, g);
          if (t == first) products(first, b, p, block, s, g);
        }
      }
    }
  }

  V *g_logits(Scratch &s, int64_t t, int64_t p) { return s.gl.data + (t * l.P + p) * K * NB; }

  // Gradients of one position's M-step t and of the densities of the E-step after it; `products` adds its votes'.
  void unfit(int64_t t, int64_t first, int64_t b, int64_t p, int64_t block, const typename A::PositionBack &position,
             Scratch &s, const Shared &shared) {
    const bool last = t + 1 == l.T_;
    V *tile = s.tile.data, *gr = s.gr.data;
    const V *gl = last ? nullptr : g_logits(s, t, p) + block, *saved = l.saved(t, b, p, block);
    V total = {};
    if (!last)
      for (int64_t k = 0; k < K; k++) total += gl[k * NB];
    const V given = last ? l.given_score(b, p, block) : total;
    auto scalars = a.scalars(position, last, given, t, block, saved, shared.own);
    a.start(scalars, t, b, p, block, gr, shared.own);

    const V *mu = l.means(t, b, p, block), *var = l.variances(t, b, p, block);
    const V *before = t > 0 ? l.means(t - 1, b, p, block) : nullptr;
    Term *terms = (Term *)s.terms.data + (p * NB + block) * D * l.T_ + t;
    V *carry = s.carry.data + p * D * NB + block;
    for (int m = 0; m < SIDE; m++) {
      V middle[ROWS], first_moment[ROWS], second_moment[ROWS];
      Change<V> change[ROWS];
      for (int row = 0; row < ROWS; row++) {
        middle[row] = mu[(row * SIDE + m) * NB];
        first_moment[row] = second_moment[row] = V{};
      }
      for (int64_t k = 0; k < K && !last; k++) {
        V v[ROWS];
        l.votes(b, p, block, m, k, v);
        for (int row = 0; row < ROWS; row++) {
          const V d = v[row] - middle[row], part = gl[k * NB] * d;
          tile[k * ROWS + row] = d;
          first_moment[row] += part;
          second_moment[row] += part * d;
        }
      }
      for (int row = 0; row < ROWS; row++) {
        const int h = (row * SIDE + m) * NB;
        const V inverse = 1 / (l.real[block] != 0 ? a.whole(var[h]) : V{} + 1);
        const V precision = a.scaled(scalars, inverse);
        const V g_mean = last ? l.given_pose(b, p, block, row * SIDE + m) : first_moment[row] * precision;
        change[row] = a.change(scalars, middle[row], var[h], inverse, second_moment[row], g_mean, before, h, carry[h]);
        terms[(row * SIDE + m) * l.T_] = {middle[row], change[row].slope, 2 * change[row].curve, precision};
      }
      for (int64_t k = 0; k < K; k++) {
        V v[ROWS], *d = tile + k * ROWS;
        if (last) {  // no sum over all children is needed first
          l.votes(b, p, block, m, k, v);
          for (int row = 0; row < ROWS; row++) v[row] -= middle[row];
          d = v;
        }
        V g = gr[k];
        for (int row = 0; row < ROWS; row++) g += d[row] * (change[row].slope + change[row].curve * d[row]);
        gr[k] = g;
      }
    }
    assignments(t, first, b, p, block, scalars.g_mass, s);
  }

  // From the gradient of R_ij a_i to those of a_i and R_ij.
  void assignments(int64_t t, int64_t first, int64_t b, int64_t p, int64_t block, V constant, Scratch &s) {
    T *d_active = (T *)q.d_activations + b * l.I;
    const T *active = l.activations + b * l.I;
    const V *given = t + 1 == l.T_ && q.g_coupling ? (const V *)q.g_coupling + (b * l.P + p) * K * NB : nullptr;
    for (int64_t k = 0; k < K; k++) {
      const int64_t i = q.child[p * K + k], at = k * NB + block;
      const V g = s.gr[k] + constant, share = l.share(t, b, p, block, k);
      T total = sum<T, W>(share * g);
      d_active[i] += total;
      if (t == first) continue;
      V gR = g * active[i];
      total *= active[i];
      if (given) {
        gR += given[at];
        total += sum<T, W>(share * given[at]);
      }
      g_logits(s, t - 1, p)[at] = gR;
      shares.add(s.balance, p, k, block, share * gR, total);
    }
  }

  // Gradients of the votes of one position, summed over the iterations, into those of poses and matrices.
  void products(int64_t first, int64_t b, int64_t p, int64_t block, Scratch &s, const Shared &g) {
    constexpr int MOST = 3;  // iterations at a time
    for (int64_t begin = first; begin < l.T_; begin += MOST) {
      const int64_t count = std::min<int64_t>(MOST, l.T_ - begin);
      for (int64_t c = 0; c < count; c++) l.assigned(begin + c, b, p, block, s.r.data + c * K);
      if (begin + count < l.T_) {
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
  void products_of(int64_t begin, int64_t b, int64_t p, int64_t block, Scratch &s, const Shared &g) {
    const Term *terms = (const Term *)s.terms.data + (p * NB + block) * D * l.T_ + begin;
    T *d_poses = (T *)q.d_poses + b * l.I * D;
    const T *offsets = l.offsets;
    for (int64_t k = 0; k < K; k++) {
      const int64_t i = q.child[p * K + k], matrix = q.matrix[k];
      const T *pose = l.poses + (b * l.I + i) * D;
      const V *w[SIDE];
      for (int m = 0; m < SIDE; m++) w[m] = l.matrix_row(block, m, matrix);
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
          if (q.bias) v[m] += l.biases(block, m, matrix)[row];
        }
        for (int c = 0; c < COUNT; c++)
          for (int m = 0; m < SIDE; m++) {
            const Term &term = terms[(row * SIDE + m) * l.T_ + c];
            const V d = v[m] - term.mean, part = r[c] * (term.slope + term.curve * d);
            total[m] = c == 0 ? part : total[m] + part;
            if (c + 1 < COUNT || !ENDS) total[m] -= gl[c] * (term.precision * d);
          }
        for (int m = 0; m < SIDE; m++) gv[row * SIDE + m] = total[m];
      }
      for (int h = 0; h < D && q.bias; h++) g.bias[(block * q.matrices + matrix) * D + h] += gv[h];
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

}  // namespace
