// Variational Bayes routing of one layer of matrix capsules on a CPU: forward, and backward through all iterations.
//
// Equations are those of `vb_routing` in capsexp/routing/vb.py; tests compare the two. With d = V - m:
//   S = sum r;  alpha = alpha_0 + S, kappa = kappa_0 + S, nu = nu_0 + S
//   m = sum r V / kappa;  psi = 1 / Psi_0 + sum r d^2 + kappa_0 m^2
//   log pi = digamma(alpha) - digamma(sum of alpha over the types at the position)
//   log Lambda = sum_h digamma((nu - h) / 2) + D log 2 - sum_h log psi_h
// `variance` holds psi. m is where psi is least, so that psi has no derivative by m.
#include "run.h"

// Mirrored field by field in vb.py.
struct VBProblem : Problem {
  static constexpr int SAVED = 3;  // S, log pi, log Lambda
  double counts, strength, degrees, inverse_scale;  // alpha_0, kappa_0, nu_0, 1 / Psi_0
};

namespace {

template <typename L> struct VB {
  using T = typename L::T;
  using V = typename L::V;
  using M = typename L::M;
  using Denormals = FlushDenormals;
  static constexpr int D = L::D;
  static constexpr double LOG_2 = 0.6931471805599453, LOG_2PI = 1.8378770664093453;

  L &l;
  const VBProblem &q;
  const T counts, strength, degrees, inverse_scale, all_counts;
  VB(L &layer, const VBProblem &problem)
      : l(layer), q(problem), counts(T(q.counts)), strength(T(q.strength)), degrees(T(q.degrees)),
        inverse_scale(T(q.inverse_scale)), all_counts(T(q.counts * q.types)) {}

  static V clamped(V x) { return x > T(SMALLEST_MASS) ? x : V{} + T(SMALLEST_MASS); }  // for kappa_0 = 0
  // sum_h digamma((nu - h) / 2): two chains of steps of 1.
  static V digammas(V nu) {
    const V lowest = T(0.5) * (nu - T(D - 1));
    return M::template digammas<(D + 1) / 2>(lowest) + M::template digammas<D / 2>(lowest + T(0.5));
  }
  static V trigammas(V nu) {
    const V lowest = T(0.5) * (nu - T(D - 1));
    return M::template trigammas<(D + 1) / 2>(lowest) + M::template trigammas<D / 2>(lowest + T(0.5));
  }

  // ---------------------------------------------------------------- forward

  struct Position { V digamma; };  // of the sum of alpha over the types

  Position position(int64_t t, int64_t b, int64_t p) {
    T mass = 0;
    for (int64_t block = 0; block < l.NB; block++) {
      V total = {};
      for (int64_t k = 0; k < l.K; k++)
        total += l.share(t, b, p, block, k) * l.activations[b * l.I + q.child[p * l.K + k]];
      mass += sum<T, L::LANES>(total);
    }
    return {M::template digammas<1>(V{} + (all_counts + mass))};
  }

  struct Parents { V mass, strength, log_share; };

  Parents parents(const Position &all, int64_t t, int64_t b, int64_t p, int64_t block, V *r) {
    const V mass = l.assigned(t, b, p, block, r);
    return {mass, clamped(strength + mass), M::template digammas<1>(counts + mass) - all.digamma};
  }

  V mean(const Parents &s, V total, const V *, int64_t) const { return total / s.strength; }
  V spread(const Parents &, V total, V mean) const { return inverse_scale + (total + strength * mean * mean); }
  V whole(V psi) const { return psi; }

  // log_deviation: half of sum_h log psi_h.
  Density<V, V> density(const Parents &s, int64_t, int64_t, V log_deviation, V *saved) {
    const V nu = degrees + s.mass, log_precision = digammas(nu) + T(D * LOG_2) - 2 * log_deviation;
    saved[0] = s.mass, saved[l.NB] = s.log_share, saved[2 * l.NB] = log_precision;
    const V bias = s.log_share + T(0.5) * log_precision - T(0.5 * D * LOG_2PI) - T(0.5 * D) / s.strength;
    return {bias, T(0.5) * nu, -M::exp(s.log_share) * entropy(log_precision)};
  }

  static V entropy(V log_precision) { return T(0.5 * D * (LOG_2PI + 1)) - T(0.5) * log_precision; }

  // ---------------------------------------------------------------- backward

  struct PositionBack { V g_counts; };  // gradient of the sum of alpha over the types

  // gl: gradients of the logarithms of the densities, [K][NB]; null in the last iteration.
  PositionBack position_back(int64_t t, int64_t b, int64_t p, const V *gl) {
    T mass = 0, g_log_share = 0;
    for (int64_t block = 0; block < l.NB; block++) {
      const V *saved = l.saved(t, b, p, block);
      mass += sum<T, L::LANES>(saved[0]);
      V total = {};
      for (int64_t k = 0; k < l.K && gl; k++) total += gl[k * l.NB + block];
      if (!gl) total = g_share(l.given_score(b, p, block), saved);
      g_log_share += sum<T, L::LANES>(total);
    }
    return {-g_log_share * M::template trigammas<1>(V{} + (all_counts + mass))};
  }

  // Gradient of log pi from that of the score.
  V g_share(V g_score, const V *saved) const { return -g_score * M::exp(saved[l.NB]) * entropy(saved[2 * l.NB]); }

  // Of the scalars of a vector of parents; g_mass gathers what all r_ij of a parent share.
  struct Gradients { V g_mass, g_deviation, mass, strength, degrees; };

  // g: in the last iteration the gradient of the score, in the others the sum of those of the logarithms of the
  // densities.
  Gradients scalars(const PositionBack &all, bool last, V g, int64_t, int64_t, const V *saved, V *) {
    const V mass = saved[0], nu = degrees + mass, whole = strength + mass, kappa = clamped(whole);
    const V g_log_share = last ? g_share(g, saved) : g;
    const V g_log_precision = T(0.5) * (last ? g * M::exp(saved[l.NB]) : g);
    V g_mass = all.g_counts + g_log_share * M::template trigammas<1>(counts + mass);
    g_mass += T(0.5) * g_log_precision * trigammas(nu);
    if (!last) g_mass += whole > T(SMALLEST_MASS) ? T(0.5 * D) * g / (kappa * kappa) : V{};
    return {g_mass, -2 * g_log_precision, mass, kappa, nu};
  }

  void start(const Gradients &, int64_t, int64_t, int64_t, int64_t, V *gr, V *) const { std::fill(gr, gr + l.K, V{}); }

  V scaled(const Gradients &g, V inverse) const { return g.degrees * inverse; }

  // One number of the poses. inverse: 1 / psi.
  Change<V> change(Gradients &g, V middle, V, V inverse, V second_moment, V g_mean, const V *, int64_t, V &) const {
    const V g_psi = T(0.5) * inverse * (g.degrees * inverse * second_moment + g.g_deviation);
    const V missing = g.strength - (strength + g.mass);  // 0 unless the divisor of the mean is clamped
    g_mean -= 2 * g_psi * middle * missing;
    const V slope = g_mean / g.strength;
    g.g_mass -= T(0.5) * second_moment * inverse;
    g.g_mass += missing > 0 ? slope * middle : V{};
    return {slope, g_psi};
  }

  int64_t parameters() const { return 0; }
  void gradients(const V *) const {}
};

}  // namespace

extern "C" int vb_forward(const VBProblem *q) { return run_type<VB>(*q, false); }
extern "C" int vb_backward(const VBProblem *q) { return run_type<VB>(*q, true); }
