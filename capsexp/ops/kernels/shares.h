// R from the logarithms of densities, and backward: a softmax over the parents that compete for a child. With
// `outlier` the sum of densities that divides them is at least that, and R of a child may sum to less than 1.
#pragma once
#include <cmath>

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
  const T floor;  // log outlier
  explicit Shares(L &layer)
      : l(layer), q(l.q), I(l.I), P(l.P), K(l.K), NB(l.NB), floor(q.outlier > 0 ? T(std::log(q.outlier)) : T(0)) {}

  // Children, or the places of each position apart.
  static int64_t groups_of(const Problem &q) { return q.normalisation == TYPES ? q.positions * q.places : q.children; }
  int64_t groups() const { return groups_of(q); }
  int64_t group(int64_t p, int64_t k) const { return q.normalisation == TYPES ? p * K + k : q.child[p * K + k]; }
  // Of iteration t >= 1: 1 where the R of a group sum to 1, 0 where `outlier` limits them.
  T *whole(int64_t t, int64_t b) const { return (T *)q.whole + (l.slot(t - 1) * q.batch + b) * groups(); }

  // 1 / the sum of densities, which is total e^top.
  T inverse(T total, T top, T *whole) const {
    if (q.outlier > 0) {
      const T least = std::exp(floor - top);
      *whole = total > least ? T(1) : T(0);
      total = std::max(total, least);
    }
    return 1 / total;
  }

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
        for (int64_t k = 0; k < K; k++) softmax(l.shares(t, b, p) + k * NB, whole(t, b) + group(p, k));
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
    for (int64_t i = 0; i < I; i++) total[i] = inverse(total[i], top[i], whole(t, b) + i);
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

  void softmax(V *share, T *whole) const {
    const T top = largest_of(share), factor = inverse(exponentials(share, top), top, whole);
    for (int64_t block = 0; block < NB; block++) share[block] *= factor;
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
          numbers(Shares::groups_of(l.q)) {}
  };

  void clear(Balance &s) {
    if (q.normalisation == OFFICIAL_V1)
      std::fill(s.vectors.data, s.vectors.data + I * NB, V{});
    else
      std::fill(s.numbers.data, s.numbers.data + groups(), T(0));
  }

  // R gR of one vector of parents of the child at place k, and its sum.
  inline void add(Balance &s, int64_t p, int64_t k, int64_t block, V product, T total) {
    if (q.normalisation == OFFICIAL_V1)
      s.vectors[q.child[p * K + k] * NB + block] += product;
    else
      s.numbers[group(p, k)] += total;
  }

  // Softmax backward of iteration t, in place, for all positions: gl = R (gR - sum of R gR over the competitors).
  void logits_from_shares(int64_t t, int64_t b, Balance &s, V *g) {
    if (q.outlier > 0)
      for (int64_t i = 0; i < groups(); i++) s.numbers[i] *= whole(t, b)[i];
    for (int64_t p = 0; p < P; p++) {
      const V *share = l.shares(t, b, p);
      for (int64_t k = 0; k < K; k++)
        for (int64_t block = 0; block < NB; block++) {
          V &at = g[(p * K + k) * NB + block];
          const V part = share[k * NB + block];
          if (q.normalisation == OFFICIAL_V1)
            at = part * (at - s.vectors[q.child[p * K + k] * NB + block]);
          else
            at = part * (at - s.numbers[group(p, k)]);
        }
    }
  }
};

}  // namespace
