// R from the logarithms of densities, and backward: a softmax over the parents that compete for a child.
#pragma once
#include "layer.h"

namespace {

template <typename L> struct Shares {
  using T = typename L::T;
  using V = typename L::V;
  using M = typename L::M;
  static constexpr int W = L::LANES;

  L &l;
  const Problem &q;
  const int64_t I, P, K, NB;
  explicit Shares(L &layer) : l(layer), q(l.q), I(l.I), P(l.P), K(l.K), NB(l.NB) {}

  // ---------------------------------------------------------------- forward

  struct Scratch {
    Buffer<V> child_vectors;
    Buffer<T> child_numbers;
    explicit Scratch(const L &l) : child_vectors(2 * l.I * l.NB), child_numbers(2 * l.I) {}
  };

  // In place: from logarithms of densities to R of iteration t.
  void normalise(int64_t t, int64_t b, Scratch &s) {
    if (q.normalisation == OFFICIAL_V1) return normalise_types_apart(t, b, s);
    T *top = s.child_numbers.data, *total = top + I;
    const bool everywhere = q.normalisation == PAPER && P > 1;
    if (!everywhere) {
      for (int64_t p = 0; p < P; p++)
        for (int64_t k = 0; k < K; k++) softmax(l.shares(t, b, p) + k * NB);
      return;
    }
    std::fill(top, top + I, -std::numeric_limits<T>::infinity());
    std::fill(total, total + I, T(0));
    for (int64_t p = 0; p < P; p++)
      for (int64_t k = 0; k < K; k++) {
        T &highest = top[q.child[p * K + k]];
        highest = std::max(highest, largest_of(l.shares(t, b, p) + k * NB));
      }
    for (int64_t p = 0; p < P; p++)
      for (int64_t k = 0; k < K; k++) {
        const int64_t i = q.child[p * K + k];
        total[i] += exponentials(l.shares(t, b, p) + k * NB, top[i]);
      }
    for (int64_t i = 0; i < I; i++) total[i] = 1 / total[i];
    for (int64_t p = 0; p < P; p++)
      for (int64_t k = 0; k < K; k++) {
        V *share = l.shares(t, b, p) + k * NB;
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
            V &share = l.shares(t, b, p)[k * NB + block];
            const int64_t i = q.child[p * K + k] * NB + block;
            if (pass == 0) top[i] = share > top[i] ? share : top[i];
            if (pass == 1) total[i] += share = M::exp(share - top[i]);
            if (pass == 2) share *= l.real[block] / total[i];
          }
  }

  // ---------------------------------------------------------------- backward

  // The sum of R gR over the parents that compete for a child.
  struct Balance {
    Buffer<V> vectors;
    Buffer<T> numbers;
    explicit Balance(const L &l)
        : vectors(l.q.normalisation == OFFICIAL_V1 ? l.I * l.NB : 0),
          numbers(l.q.normalisation == TYPES ? l.P * l.K : l.I) {}
  };

  void clear(Balance &s) {
    if (q.normalisation == OFFICIAL_V1)
      std::fill(s.vectors.data, s.vectors.data + I * NB, V{});
    else
      std::fill(s.numbers.data, s.numbers.data + (q.normalisation == TYPES ? P * K : I), T(0));
  }

  // R gR of one vector of parents of the child at place k, and its sum.
  inline void add(Balance &s, int64_t p, int64_t k, int64_t block, V product, T total) {
    const int64_t i = q.child[p * K + k];
    if (q.normalisation == OFFICIAL_V1)
      s.vectors[i * NB + block] += product;
    else
      s.numbers[q.normalisation == TYPES ? p * K + k : i] += total;
  }

  // Softmax backward at one position, in place: gl = R (gR - sum of R gR over the competitors).
  void logits_from_shares(int64_t t, int64_t b, int64_t p, Balance &s, V *g) {
    const V *share = l.shares(t, b, p);
    for (int64_t k = 0; k < K; k++) {
      const int64_t i = q.child[p * K + k];
      for (int64_t block = 0; block < NB; block++) {
        const int64_t at = k * NB + block;
        if (q.normalisation == OFFICIAL_V1)
          g[at] = share[at] * (g[at] - s.vectors[i * NB + block]);
        else
          g[at] = share[at] * (g[at] - s.numbers[q.normalisation == TYPES ? p * K + k : i]);
      }
    }
  }
};

}  // namespace
