// Heinsen routing of one layer of matrix capsules on a CPU: forward, and backward through all iterations.
//
// Equations are those of `heinsen_routing` in capsexp/routing/heinsen.py; tests compare the two. Mean and variance
// are those of EM routing; the score of a parent, with use_ij = r_ij, is
//   x_j = sum_i (beta_use_ij + beta_ign_ij) use_ij - sum_i beta_ign_ij a_i
#include "run.h"

// Mirrored field by field in heinsen.py.
struct HeinsenProblem : Problem {
  static constexpr int SAVED = 2;  // mass, score
  double variance_floor, mass_epsilon;
  const void *beta_use, *beta_ign;  // [K J]
  void *d_beta_use, *d_beta_ign;
};

namespace {

template <typename L> struct Heinsen {
  using T = typename L::T;
  using V = typename L::V;
  using M = typename L::M;
  using Denormals = FlushDenormals;

  L &l;
  const HeinsenProblem &q;
  const T floor, epsilon;
  Buffer<V> both, ignored;  // [NB][K]: beta_use + beta_ign, beta_ign
  Heinsen(L &layer, const HeinsenProblem &problem)
      : l(layer), q(problem), floor(T(q.variance_floor)), epsilon(T(q.mass_epsilon)),
        both(l.by_type(q.beta_use, l.K)), ignored(l.by_type(q.beta_ign, l.K)) {
    for (int64_t k = 0; k < l.NB * l.K; k++) both[k] += ignored[k];
  }

  V clamped(V mass) const {
    const V divisor = mass + epsilon;
    return divisor > T(SMALLEST_MASS) ? divisor : V{} + T(SMALLEST_MASS);
  }

  // ---------------------------------------------------------------- forward

  struct Position {};  // nothing that the types at one position share
  Position position(int64_t, int64_t, int64_t) const { return {}; }

  struct Parents { V mass, inverse, score; };

  Parents parents(const Position &, int64_t t, int64_t b, int64_t p, int64_t block, V *r) {
    const V mass = l.assigned(t, b, p, block, r);
    const V *use = both.data + block * l.K, *ignore = ignored.data + block * l.K;
    V score = {};
    for (int64_t k = 0; k < l.K; k++) {
      score += use[k] * r[k];
      score -= ignore[k] * l.activations[b * l.I + q.child[p * l.K + k]];
    }
    return {mass, 1 / clamped(mass), score};
  }

  V mean(const Parents &s, V total, const V *, int64_t) const { return total * s.inverse; }
  V spread(const Parents &s, V total, V) const { return total * s.inverse; }
  V whole(V spread) const { return spread + floor; }

  Density<V, T> density(const Parents &s, int64_t, int64_t, V log_deviation, V *saved) const {
    saved[0] = s.mass, saved[l.NB] = s.score;
    return {M::logistic(s.score).log_on - log_deviation, T(0.5), s.score};
  }

  // ---------------------------------------------------------------- backward

  using PositionBack = Position;
  PositionBack position_back(int64_t, int64_t, int64_t, const V *) const { return {}; }

  // Of the scalars of a vector of parents; g_mass gathers what all r_ij of a parent share.
  struct Gradients { V g_mass, g_deviation, g_score, mass, inverse; };

  // g: in the last iteration the gradient of the score, in the others the sum of those of the logarithms of the
  // densities.
  Gradients scalars(const PositionBack &, bool last, V g, int64_t, int64_t, const V *saved, V *) const {
    const V mass = saved[0], g_score = last ? g : g * M::logistic(saved[l.NB]).off;
    return {V{}, last ? V{} : -g, g_score, mass, 1 / clamped(mass)};
  }

  // Of r_ij, as far as `change` does not add it, of the betas, and of a_i as far as it is ignored.
  void start(const Gradients &g, int64_t t, int64_t b, int64_t p, int64_t block, V *gr, V *own) {
    V *d_use = own + block * l.K, *d_ignore = own + (l.NB + block) * l.K;
    T *d_active = (T *)q.d_activations + b * l.I;
    for (int64_t k = 0; k < l.K; k++) {
      const int64_t i = q.child[p * l.K + k];
      const T active = l.activations[b * l.I + i];
      const V use = l.share(t, b, p, block, k) * active;
      d_use[k] += g.g_score * use;
      d_ignore[k] += g.g_score * (use - active);
      d_active[i] -= sum<T, L::LANES>(g.g_score * ignored[block * l.K + k]);
      gr[k] = g.g_score * both[block * l.K + k];
    }
  }

  V scaled(const Gradients &, V precision) const { return precision; }

  // One number of the poses. precision: 1 / whole.
  Change<V> change(Gradients &g, V middle, V spread, V precision, V second_moment, V g_mean, const V *, int64_t,
                   V &) const {
    const V g_var = T(0.5) * precision * (second_moment * precision + g.g_deviation);
    g_mean -= 2 * g_var * middle * (1 - g.mass * g.inverse);  // 0 but for an epsilon or hardly any mass
    const V slope = g_mean * g.inverse, curve = g_var * g.inverse;
    g.g_mass += g.mass + epsilon > T(SMALLEST_MASS) ? -curve * spread : slope * middle;
    return {slope, curve};
  }

  int64_t parameters() const { return 2 * l.NB * l.K; }
  void gradients(const V *own) const {
    l.template from_vectors<1>(own, l.K, q.d_beta_use);
    l.template from_vectors<1>(own + l.NB * l.K, l.K, q.d_beta_ign);
  }
};

}  // namespace

extern "C" int heinsen_forward(const HeinsenProblem *q) { return run_type<Heinsen>(*q, false); }
extern "C" int heinsen_backward(const HeinsenProblem *q) { return run_type<Heinsen>(*q, true); }
