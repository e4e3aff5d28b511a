// EM routing of one layer of matrix capsules on a CPU: forward, and backward through all iterations.
//
// Equations are those of `em_routing` in capsexp/routing/em.py; tests compare the two.
#include "run.h"

// Mirrored field by field in em.py.
struct EMProblem : Problem {
  static constexpr int SAVED = 3;  // mass, sum of log deviations, logit
  double variance_floor, cost_scale, mean_smoothing;
  const void *beta_u, *beta_a, *temperatures;  // [J], [J], [T]
  void *d_beta_u, *d_beta_a;
};

namespace {

template <typename L> struct EM {
  using T = typename L::T;
  using V = typename L::V;
  using M = typename L::M;
  using Denormals = KeepDenormals;

  L &l;
  const EMProblem &q;
  const T floor, scale, smooth, *temperatures;
  Buffer<V> beta_u, beta_a;
  EM(L &layer, const EMProblem &problem)
      : l(layer), q(problem), floor(T(q.variance_floor)), scale(T(q.cost_scale)), smooth(T(q.mean_smoothing)),
        temperatures((const T *)q.temperatures), beta_u(l.by_type(q.beta_u, 1)), beta_a(l.by_type(q.beta_a, 1)) {}

  // ---------------------------------------------------------------- forward

  struct Position {};  // nothing that the types at one position share
  Position position(int64_t, int64_t, int64_t) const { return {}; }

  struct Parents { V mass, inverse; };

  // r_ij = R_ij a_i of the window, and its sum.
  Parents parents(const Position &, int64_t t, int64_t b, int64_t p, int64_t block, V *r) {
    const V mass = l.assigned(t, b, p, block, r), least = V{} + T(SMALLEST_MASS);
    return {mass, 1 / (mass > least ? mass : least)};
  }

  V mean(const Parents &s, V total, const V *before, int64_t at) const {
    V fresh = total * s.inverse;
    if (smooth != 0) fresh = (1 - smooth) * fresh + (before ? smooth * before[at] : V{});
    return fresh;
  }

  V spread(const Parents &s, V total, V) const { return total * s.inverse; }
  V whole(V spread) const { return spread + floor; }

  Density<V, T> density(const Parents &s, int64_t t, int64_t block, V log_deviation, V *saved) {
    const V cost = scale * (T(L::D) * beta_u[block] + log_deviation) * s.mass;
    const V logit = temperatures[t] * (beta_a[block] - cost);
    saved[0] = s.mass, saved[l.NB] = log_deviation, saved[2 * l.NB] = logit;
    const auto active = M::logistic(logit);
    return {active.log_on - log_deviation, T(0.5), active.on};
  }

  // ---------------------------------------------------------------- backward

  using PositionBack = Position;
  PositionBack position_back(int64_t, int64_t, int64_t, const V *) const { return {}; }

  // Of the scalars of a vector of parents; g_mass gathers what all r_ij of a parent share.
  struct Gradients { V g_mass, g_deviation, mass, inverse; };

  // g: in the last iteration the gradient of the activation, in the others the sum of those of the logarithms of
  // the densities.
  Gradients scalars(const PositionBack &, bool last, V g, int64_t t, int64_t block, const V *saved, V *own) {
    const V mass = saved[0], log_deviation = saved[l.NB], least = V{} + T(SMALLEST_MASS);
    const auto active = M::logistic(saved[2 * l.NB]);
    const V g_logit = last ? g * active.on * active.off : g * active.off;
    V g_deviation = last ? V{} : -g;
    const T temperature = temperatures[t];
    const V g_cost = -temperature * g_logit;
    own[block] += T(L::D) * scale * mass * g_cost;
    own[l.NB + block] += temperature * g_logit;
    g_deviation += scale * mass * g_cost;
    const V g_mass = scale * (T(L::D) * beta_u[block] + log_deviation) * g_cost;
    return {g_mass, g_deviation, mass, 1 / (mass > least ? mass : least)};
  }

  // Of r_ij, as far as `change` does not add it.
  void start(const Gradients &, int64_t, int64_t, int64_t, int64_t, V *gr, V *) const { std::fill(gr, gr + l.K, V{}); }

  // The factor of (V - mu) in the derivative of the logarithm of a density.
  V scaled(const Gradients &, V precision) const { return precision; }

  // One number of the poses. precision: 1 / whole.
  Change<V> change(Gradients &g, V middle, V spread, V precision, V second_moment, V g_mean, const V *before,
                   int64_t at, V &carry) const {
    const V g_var = T(0.5) * precision * (second_moment * precision + g.g_deviation);
    g_mean = carry + g_mean;
    V fresh = middle;  // the mean before smoothing
    if (smooth != 0) fresh = (fresh - (before ? smooth * before[at] : V{})) / (1 - smooth);
    g_mean -= 2 * g_var * (fresh - middle * (g.mass * g.inverse));  // 0 but for smoothing or hardly any mass
    carry = q.detach ? V{} : smooth * g_mean;
    const V slope = (1 - smooth) * g_mean * g.inverse, curve = g_var * g.inverse;
    g.g_mass += g.mass > T(SMALLEST_MASS) ? slope * (middle - fresh) - curve * spread : slope * middle;
    return {slope, curve};
  }

  int64_t parameters() const { return 2 * l.NB; }
  void gradients(const V *own) const {
    l.template from_vectors<1>(own, 1, q.d_beta_u);
    l.template from_vectors<1>(own + l.NB, 1, q.d_beta_a);
  }
};

}  // namespace

extern "C" int em_forward(const EMProblem *q) { return run_type<EM>(*q, false); }
extern "C" int em_backward(const EMProblem *q) { return run_type<EM>(*q, true); }
