// Dynamic routing of a layer on a CPU: votes and all passes over them, forward and backward.
//
// The votes of a chunk of the batch are made child by child, so that each child's matrices are read once, and routed
// image by image. A pass reads the votes once: for each child it computes the agreement with the poses of the pass
// before, the softmax over its parents, and its share of every parent's sum. Backward likewise, with votes made again.
// Formulas are those of `FusedDynamicRouting` in capsexp/ops/dynamic_passes.py.
//
// Sizes: B images, I children of N numbers each, J parents, D numbers of a pose (a multiple of W), T passes.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"

// One call. Mirrored field by field in dynamic.py.
struct Passes {
  int64_t batch, children, numbers, parents, dim, iterations, doubles, leaky, first, chunk, threads;
  // Read: [B I N], [I N J D], [I J] or null, [J D] or null.
  const void *inputs, *weight, *prior, *bias;
  // Written by forward, read by backward: [T B I J], [T B J D], [T B J D].
  void *coupling, *total, *poses;
  // Read by backward: [B J D] or null, [B I J] or null.
  const void *g_poses, *g_coupling;
  // Written by backward: [B I N]; [I N J D], 0 before; [B I J] or null: of the logits before pass `first`;
  // [B J D], 0 before: of the sums.
  void *d_inputs, *d_weight, *d_logits, *d_total;
};

namespace {

template <typename T, int W> struct Routing {
  using V = typename Lanes<T, W>::type;
  static constexpr int WIDE = 8;  // lanes of parents
  using P = typename Lanes<T, WIDE>::type;

  const Passes &q;
  const int64_t B, I, N, J, D, T_, JP, size;  // size: numbers of a child's votes
  Buffer<T> votes;                            // of a chunk, [chunk][I][J D]; backward: then their gradient
  int64_t begin = 0;                          // of the chunk

  explicit Routing(const Passes &passes)
      : q(passes), B(q.batch), I(q.children), N(q.numbers), J(q.parents), D(q.dim), T_(q.iterations),
        JP((J + WIDE - 1) / WIDE * WIDE), size(J * D), votes(std::min(q.chunk, q.batch) * I * size) {}

  static V load(const T *from) { V v; std::memcpy(&v, from, sizeof v); return v; }
  static void store(T *to, V v) { std::memcpy(to, &v, sizeof v); }
  T *row(int64_t i, int64_t b) const { return votes.data + ((b - begin) * I + i) * size; }
  const T *input(int64_t i, int64_t b) const { return (const T *)q.inputs + (b * I + i) * N; }
  const T *matrix(int64_t i) const { return (const T *)q.weight + i * N * size; }
  int64_t end() const { return std::min(begin + q.chunk, B); }
  T *coupling(int64_t t, int64_t b) const { return (T *)q.coupling + (t * B + b) * I * J; }
  T *total(int64_t t, int64_t b) const { return (T *)q.total + (t * B + b) * J * D; }
  T *poses(int64_t t, int64_t b) const { return (T *)q.poses + (t * B + b) * J * D; }

  // to[j] += the inner product of parent j's parts of a row and of `with`.
  void agreements(const T *votes_of_child, const T *with, T *to) const {
    int64_t j = 0;
    for (; j + 4 <= J; j += 4) {
      V part[4];
      for (int n = 0; n < 4; n++) part[n] = product(votes_of_child + (j + n) * D, with + (j + n) * D);
      const auto four = sums<T, W>(part);
      for (int n = 0; n < 4; n++) to[j + n] += four[n];
    }
    for (; j < J; j++) to[j] += sum<T, W>(product(votes_of_child + j * D, with + j * D));
  }

  V product(const T *a, const T *b) const {
    V total = load(a) * load(b);
    for (int64_t d = W; d < D; d += W) total += load(a + d) * load(b + d);
    return total;
  }

  void add(const T *shares, const T *votes_of_child, T *to) const {
    for (int64_t j = 0; j < J; j++)
      for (int64_t d = j * D; d < (j + 1) * D; d += W) store(to + d, load(to + d) + shares[j] * load(votes_of_child + d));
  }

  // Softmax of JP logits, of which J count; leaky: one more, which is 0.
  void softmax(const T *logits, T *shares) const {
    T top = q.leaky ? T(0) : logits[0];
    for (int64_t j = 0; j < J; j++) top = std::max(top, logits[j]);
    T total = 0;
    for (int64_t j = 0; j < JP; j += WIDE) {
      P x;
      std::memcpy(&x, logits + j, sizeof x);
      const P e = Math<T, WIDE>::exp(x - top);
      std::memcpy(shares + j, &e, sizeof e);
    }
    for (int64_t j = 0; j < J; j++) total += shares[j];
    if (q.leaky) total += std::exp(-top);
    for (int64_t j = 0; j < J; j++) shares[j] /= total;
  }

  struct Scratch {
    Buffer<T> logits, shares, sums;  // [I][JP], [JP], [J D]
    Scratch(int64_t logits_, int64_t parents, int64_t numbers) : logits(logits_), shares(parents), sums(numbers) {}
  };

  void forward(int64_t b, Scratch &s) const {
    T *logits = s.logits.data, *shares = s.shares.data;
    for (int64_t i = 0; i < I; i++)
      for (int64_t j = 0; j < JP; j++) logits[i * JP + j] = q.prior && j < J ? ((const T *)q.prior)[i * J + j] : T(0);
    for (int64_t t = 0; t < T_; t++) {
      std::fill(s.sums.data, s.sums.data + J * D, T(0));
      T *saved = coupling(t, b);
      for (int64_t i = 0; i < I; i++) {
        const T *child = row(i, b);
        if (t > 0) agreements(child, poses(t - 1, b), logits + i * JP);
        softmax(logits + i * JP, shares);
        std::copy(shares, shares + J, saved + i * J);
        add(shares, child, s.sums.data);
      }
      T *sum_of = total(t, b), *pose = poses(t, b);
      for (int64_t d = 0; d < J * D; d++) sum_of[d] = s.sums[d] + (q.bias ? ((const T *)q.bias)[d] : T(0));
      for (int64_t j = 0; j < J; j++) squash(sum_of + j * D, pose + j * D);
    }
  }

  void squash(const T *from, T *to) const {
    const T n = length(from), factor = n / (1 + n * n);
    for (int64_t d = 0; d < D; d++) to[d] = factor * from[d];
  }

  T length(const T *of) const { return std::sqrt(sum<T, W>(product(of, of))); }

  // See `squash_backward` in capsexp/ops/squash.py.
  void squash_backward(const T *from, const T *g, T *to) const {
    const T n = length(from), denominator = 1 + n * n, along = sum<T, W>(product(from, g));
    const T bend = along * (1 - n * n) / (denominator * denominator * std::max(n, std::numeric_limits<T>::min()));
    for (int64_t d = 0; d < D; d++) to[d] = g[d] * (n / denominator) + from[d] * bend;
  }

  struct BackScratch {
    Buffer<T> d_logits, d_total, d_poses, here;  // [T][I][JP], [T][J D], [J D], [JP]
    BackScratch(const Routing &r, bool needed)
        : d_logits(needed ? r.T_ * r.I * r.JP : 0), d_total(r.T_ * r.size), d_poses(r.size), here(r.JP) {}
  };

  void backward(int64_t b, BackScratch &s) const {
    T *d_poses = s.d_poses.data;
    for (int64_t d = 0; d < size; d++) d_poses[d] = q.g_poses ? ((const T *)q.g_poses)[b * size + d] : T(0);
    T *d_sum = (T *)q.d_total + b * size;
    for (int64_t t = T_ - 1; t >= q.first; t--) {
      T *d_total = s.d_total.data + t * size;
      for (int64_t j = 0; j < J; j++) squash_backward(total(t, b) + j * D, d_poses + j * D, d_total + j * D);
      for (int64_t d = 0; d < size; d++) d_sum[d] += d_total[d];
      if (t == q.first && !q.d_logits) break;  // the logits before this pass are constants
      std::fill(d_poses, d_poses + size, T(0));
      for (int64_t i = 0; i < I; i++) {
        T *d_logits = s.d_logits.data + (t * I + i) * JP;
        logits_of(t, b, i, d_total, s.here.data, d_logits, t + 1 < T_ ? d_logits + I * JP : nullptr);
        if (t > q.first) add(d_logits, row(i, b), d_poses);
      }
    }
    if (q.d_logits)
      for (int64_t i = 0; i < I; i++)
        std::copy_n(s.d_logits.data + (q.first * I + i) * JP, J, (T *)q.d_logits + (b * I + i) * J);
    for (int64_t i = 0; i < I; i++) gradient_of_votes(b, i, s);
  }

  // Votes of one child in all images of the chunk.
  void make_votes(int64_t i) const {
    const T *w = matrix(i);
    for (int64_t b = begin; b < end(); b++) {
      const T *u = input(i, b);
      T *to = row(i, b);
      int64_t e = 0;
      for (; e + 4 * W <= size; e += 4 * W) {
        V total[4] = {};
        for (int64_t n = 0; n < N; n++)
          for (int part = 0; part < 4; part++) total[part] += u[n] * load(w + n * size + e + part * W);
        for (int part = 0; part < 4; part++) store(to + e + part * W, total[part]);
      }
      for (; e < size; e += W) {
        V total = {};
        for (int64_t n = 0; n < N; n++) total += u[n] * load(w + n * size + e);
        store(to + e, total);
      }
    }
  }

  // From the gradient of one child's votes to those of its pose and its matrices.
  void products(int64_t i) const {
    const T *w = matrix(i);
    T *d_weight = (T *)q.d_weight + i * N * size;
    for (int64_t n = 0; n < N; n++)
      for (int64_t e = 0; e < size; e += W) {
        V total = load(d_weight + n * size + e);
        for (int64_t b = begin; b < end(); b++) total += input(i, b)[n] * load(row(i, b) + e);
        store(d_weight + n * size + e, total);
      }
    for (int64_t b = begin; b < end(); b++) {
      T *to = (T *)q.d_inputs + (b * I + i) * N;
      for (int64_t n = 0; n < N; n++) {
        V total = {};
        for (int64_t e = 0; e < size; e += W) total += load(w + n * size + e) * load(row(i, b) + e);
        to[n] = sum<T, W>(total);
      }
    }
  }

  // Gradient of a child's logits before pass t: through its softmax, plus that of later passes.
  void logits_of(int64_t t, int64_t b, int64_t i, const T *d_total, T *here, T *to, const T *later) const {
    const T *shares = coupling(t, b) + i * J;
    for (int64_t j = 0; j < J; j++)
      here[j] = t + 1 == T_ && q.g_coupling ? ((const T *)q.g_coupling)[(b * I + i) * J + j] : T(0);
    agreements(row(i, b), d_total, here);
    T mean = 0;
    for (int64_t j = 0; j < J; j++) mean += shares[j] * here[j];
    for (int64_t j = 0; j < J; j++) to[j] = shares[j] * (here[j] - mean) + (later ? later[j] : T(0));
  }

  void gradient_of_votes(int64_t b, int64_t i, const BackScratch &s) const {
    T *to = row(i, b);
    for (int64_t j = 0; j < J; j++)
      for (int64_t d = j * D; d < (j + 1) * D; d += W) {
        V g = {};
        for (int64_t t = q.first; t < T_; t++) {
          g += coupling(t, b)[i * J + j] * load(s.d_total.data + t * J * D + d);
          if (t > q.first) g += s.d_logits.data[(t * I + i) * JP + j] * load(poses(t - 1, b) + d);
        }
        store(to + d, g);
      }
  }
};

template <typename T, int W> void run(const Passes &q, bool backward) {
  using R = Routing<T, W>;
  R routing(q);
#pragma omp parallel num_threads(q.threads)
  {
    typename R::Scratch scratch(backward ? 0 : routing.I * routing.JP, routing.JP, routing.size);
    typename R::BackScratch back(routing, backward);
    for (int64_t begin = 0; begin < q.batch; begin += q.chunk) {
#pragma omp single
      routing.begin = begin;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < q.children; i++) routing.make_votes(i);
      const int64_t end = std::min(begin + q.chunk, q.batch);
#pragma omp for schedule(dynamic, 1)
      for (int64_t b = begin; b < end; b++) backward ? routing.backward(b, back) : routing.forward(b, scratch);
      if (backward) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < q.children; i++) routing.products(i);
      }
    }
  }
}

template <typename T> int run_width(const Passes &q, bool backward) {
  if (q.dim % 16 == 0) return run<T, 16>(q, backward), 0;
  if (q.dim % 8 == 0) return run<T, 8>(q, backward), 0;
  if (q.dim % 4 == 0) return run<T, 4>(q, backward), 0;
  return 1;
}

int run_type(const Passes &q, bool backward) {
  return q.doubles ? run_width<double>(q, backward) : run_width<float>(q, backward);
}

}  // namespace

extern "C" int dynamic_forward(const Passes *q) { return run_type(*q, false); }
extern "C" int dynamic_backward(const Passes *q) { return run_type(*q, true); }
