// A call of an algorithm: its images over threads, with code for each type of number, vector and pose.
#pragma once
#include "passes.h"

namespace {

constexpr int64_t GROUPS = 16;  // of images, each with its own gradient, so that their sum does not depend on
                                // the number of threads

template <typename L, typename A> void run_forward(L &layer, A &algorithm) {
  Forward<L, A> forward(layer, algorithm);
#pragma omp parallel num_threads(layer.q.threads)
  {
    [[maybe_unused]] const typename A::Denormals mode;
    typename Forward<L, A>::Scratch scratch(layer);
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < layer.q.batch; b++) forward.image(b, scratch);
  }
}

template <typename L, typename A> void run_backward(L &layer, A &algorithm) {
  using V = typename L::V;
  constexpr int NUMBERS = L::SIDE * L::SIDE;
  const Problem &q = layer.q;
  Backward<L, A> backward(layer, algorithm);
  const int64_t groups = std::min(GROUPS, q.batch), elements = layer.NB * q.matrices * NUMBERS;
  const int64_t with_bias = elements + (q.bias ? layer.NB * q.matrices * L::D : 0);
  const int64_t size = with_bias + algorithm.parameters();
  Buffer<V> shared(std::max<int64_t>(groups, 1) * size);
#pragma omp parallel num_threads(q.threads)
  {
    [[maybe_unused]] const typename A::Denormals mode;
    typename Backward<L, A>::Scratch scratch(layer);
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < groups; group++) {
      V *own = shared.data + group * size;
      std::fill(own, own + size, V{});
      const typename Backward<L, A>::Shared g{own, own + elements, own + with_bias};
      for (int64_t b = group * q.batch / groups; b < (group + 1) * q.batch / groups; b++) backward.image(b, scratch, g);
    }
  }
  for (int64_t group = 1; group < groups; group++)
    for (int64_t e = 0; e < size; e++) shared[e] += shared[group * size + e];
  if (groups == 0) return;
  layer.template from_vectors<NUMBERS>(shared.data, q.matrices, q.d_weight);
  if (q.bias) layer.template from_vectors<L::D>(shared.data + elements, q.matrices, q.d_bias);
  algorithm.gradients(shared.data + with_bias);
}

template <template <typename> class A, typename Call, typename T, int W, int ROWS, int SIDE>
void run(const Call &q, bool backward) {
  using L = Layer<T, W, ROWS, SIDE, Call::SAVED>;
  L layer(q);
  A<L> algorithm(layer, q);
  backward ? run_backward(layer, algorithm) : run_forward(layer, algorithm);
}

template <template <typename> class A, typename Call, typename T, int W>
bool run_shape(const Call &q, bool backward) {
  if (q.rows == 4 && q.side == 4) return run<A, Call, T, W, 4, 4>(q, backward), true;
  if (q.rows == 1 && q.side == 16) return run<A, Call, T, W, 1, 16>(q, backward), true;
  if (q.rows == 3 && q.side == 3) return run<A, Call, T, W, 3, 3>(q, backward), true;
  if (q.rows == 2 && q.side == 2) return run<A, Call, T, W, 2, 2>(q, backward), true;
  return false;
}

// 0, or 1 where there is no code for a call.
template <template <typename> class A, typename Call> int run_type(const Call &q, bool backward) {
  bool done = false;
  if (q.doubles && q.lanes == 8) done = run_shape<A, Call, double, 8>(q, backward);
  if (!q.doubles && q.lanes == 8) done = run_shape<A, Call, float, 8>(q, backward);
  if (!q.doubles && q.lanes == 16) done = run_shape<A, Call, float, 16>(q, backward);
  return done ? 0 : 1;
}

}  // namespace
