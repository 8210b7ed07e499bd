// The local runs of many devices that train a multi-layer perceptron: one device after the other, its model in the cache.
//
// A batch is kept as rows, (samples, features), and as columns, (features, samples), so that every product is a row of
// coefficients times rows that lie in vectors: forward on the columns, the weights' gradients on the rows. Columns are
// padded with zeros to whole vectors. Every device's arithmetic is its own: the same bits in any company.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();

enum Activation : int64_t { NONE, RELU, TANH, SIGMOID };
enum Loss : int64_t { CROSS_ENTROPY, SQUARED };

struct Layer {
  int64_t inputs, outputs;
  int64_t weight, bias; // where they begin in a row; no bias: -1
  int64_t activation;
};

struct Optimizer {
  int64_t adam, nesterov, decoupled;
  double momentum, weight_decay, beta1, beta2, eps;
};

struct Cohort {
  const Layer* layers;
  int64_t depth, numbers, loss;
  Optimizer optimizer;
  const float* inputs; // (n, features)
  const int64_t* labels; // (n), or
  const float* values; // (n, outputs)
  int64_t devices, most, batch;
  const int64_t* samples; // (epochs, devices, most): rows of the inputs, in the order in which they are taken
  const int64_t* sizes; // (devices): how many of them a device has
  const int64_t* steps; // (devices)
  const float* lr; // (devices)
  const float* mu; // (devices)
  float* models; // (devices, numbers), trained in place
  double* losses; // (devices): mean over the samples of the last pass
  int64_t* finite; // (devices): whether the model's numbers are
};

namespace {

// C = start + A B, or, ADDED, C += scale A B, for M rows of C and n lanes at most; `start` has a number for each row. A is
// kept in rows lda apart, or, TURNED, in columns.
template <int M, bool WHOLE, bool TURNED, bool ADDED>
inline void tile(
    int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, const float* start, float scale, float* c,
    int64_t ldc, int64_t n) {
  Vec sums[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sums[m] = Vec(start == nullptr ? 0.0f : start[m]);
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    const Vec row = WHOLE ? Vec::loadu(b + k * ldb) : Vec::loadu(b + k * ldb, n);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      sums[m] = at::vec::fmadd(Vec(TURNED ? a[k * lda + m] : a[m * lda + k]), row, sums[m]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    float* to = c + m * ldc;
    if (ADDED) sums[m] = at::vec::fmadd(Vec(scale), sums[m], WHOLE ? Vec::loadu(to) : Vec::loadu(to, n));
    if (WHOLE) sums[m].store(to);
    else sums[m].store(to, n);
  }
}

template <int M, bool TURNED, bool ADDED>
inline void band(
    int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, const float* start,
    float scale, float* c, int64_t ldc) {
  int64_t n = 0;
  for (; n + LANES <= columns; n += LANES)
    tile<M, true, TURNED, ADDED>(depth, a, lda, b + n, ldb, start, scale, c + n, ldc, LANES);
  if (n < columns) tile<M, false, TURNED, ADDED>(depth, a, lda, b + n, ldb, start, scale, c + n, ldc, columns - n);
}

template <bool TURNED, bool ADDED = false>
void multiply(
    int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
    int64_t ldc, const float* start = nullptr, float scale = 1) {
  int64_t m = 0;
  const auto next = [&](auto bands, int64_t some) {
    for (; m + some <= rows; m += some)
      bands(columns, depth, a + m * (TURNED ? 1 : lda), lda, b, ldb, start == nullptr ? nullptr : start + m, scale,
            c + m * ldc, ldc);
  };
  next(band<8, TURNED, ADDED>, 8);
  next(band<2, TURNED, ADDED>, 2);
  next(band<1, TURNED, ADDED>, 1);
}

void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t row = 0; row < rows; row += LANES)
    for (int64_t column = 0; column < columns; column += LANES)
      at::vec::transpose_mxn<float>(
          from + row * columns + column, columns, to + column * rows + row, rows,
          std::min(LANES, rows - row), std::min(LANES, columns - column));
}

void activate(int64_t kind, float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    const Vec x = Vec::loadu(values + i);
    if (kind == RELU) at::vec::maximum(x, Vec(0)).store(values + i);
    else if (kind == TANH) x.tanh().store(values + i);
    else if (kind == SIGMOID) (Vec(1) / (Vec(1) + x.neg().exp())).store(values + i);
  }
}

// Takes gradients of an activation's outputs back to its inputs.
void deactivate(int64_t kind, const float* outputs, float* gradients, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    const Vec y = Vec::loadu(outputs + i), g = Vec::loadu(gradients + i);
    if (kind == RELU) Vec::blendv(Vec(0), g, y > Vec(0)).store(gradients + i);
    else if (kind == TANH) (g * (Vec(1) - y * y)).store(gradients + i);
    else if (kind == SIGMOID) (g * y * (Vec(1) - y)).store(gradients + i);
  }
}

float sum_of(const Vec& values) {
  return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, values);
}

class Run {
 public:
  explicit Run(const Cohort& cohort)
      : its(cohort),
        padded((cohort.batch + LANES - 1) / LANES * LANES),
        rows(cohort.depth),
        columns(cohort.depth + 1),
        model(cohort.numbers),
        gradients(cohort.numbers),
        first(cohort.optimizer.adam || cohort.optimizer.momentum != 0 ? cohort.numbers : 0),
        second(cohort.optimizer.adam ? cohort.numbers : 0),
        plain(first.empty() && cohort.optimizer.weight_decay == 0) {
    int64_t widest = 0;
    for (int64_t l = 0; l < its.depth; ++l) {
      rows[l].resize(padded * its.layers[l].inputs);
      columns[l].resize(padded * its.layers[l].inputs);
      widest = std::max({widest, its.layers[l].inputs, its.layers[l].outputs});
    }
    columns[its.depth].resize(padded * its.layers[its.depth - 1].outputs);
    delta.resize(padded * widest);
    before.resize(padded * widest);
  }

  void train(int64_t device) {
    sent = its.models + device * its.numbers;
    std::copy_n(sent, its.numbers, model.begin());
    std::fill(first.begin(), first.end(), 0.0f);
    std::fill(second.begin(), second.end(), 0.0f);
    const int64_t size = its.sizes[device], a_pass = (size + its.batch - 1) / its.batch;
    double total = 0;
    int64_t seen = 0;
    for (int64_t step = 0; step < its.steps[device]; ++step) {
      const int64_t epoch = step / a_pass, done = step % a_pass * its.batch, count = std::min(its.batch, size - done);
      const int64_t* samples = its.samples + (epoch * its.devices + device) * its.most + done;
      lanes = (count + LANES - 1) / LANES * LANES;
      gather(samples, count);
      forward();
      const double loss = its.loss == CROSS_ENTROPY ? cross_entropy(samples, count) : squared(samples, count);
      total = done == 0 ? loss : total + loss;
      seen = done + count;
      const float lr = its.lr[device], mu = its.mu[device];
      if (plain && mu == 0) {
        backward<true>(model.data(), count, -lr);
      } else {
        backward<false>(gradients.data(), count, 1);
        move(lr, mu, step);
      }
    }
    its.losses[device] = total / seen;
    its.finite[device] = keep();
  }

 private:
  void gather(const int64_t* samples, int64_t count) {
    const int64_t features = its.layers[0].inputs;
    float* to = rows[0].data();
    for (int64_t i = 0; i < count; ++i) std::copy_n(its.inputs + samples[i] * features, features, to + i * features);
    std::fill(to + count * features, to + lanes * features, 0.0f);
    transpose(to, lanes, features, columns[0].data());
  }

  bool keep() {
    Vec nothing(0); // what zero times the numbers comes to
    for (int64_t i = 0; i < its.numbers; i += LANES) {
      const int64_t n = std::min(LANES, its.numbers - i);
      const Vec numbers = Vec::loadu(model.data() + i, n);
      nothing = at::vec::fmadd(Vec(0), numbers, nothing);
      numbers.store(sent + i, n);
    }
    return sum_of(nothing) == 0;
  }

  void forward() {
    for (int64_t l = 0; l < its.depth; ++l) {
      const Layer& layer = its.layers[l];
      float* out = columns[l + 1].data();
      multiply<false>(
          layer.outputs, lanes, layer.inputs, model.data() + layer.weight, layer.inputs, columns[l].data(), lanes, out,
          lanes, layer.bias < 0 ? nullptr : model.data() + layer.bias);
      if (layer.activation != NONE) activate(layer.activation, out, layer.outputs * lanes);
      if (l + 1 < its.depth) transpose(out, layer.outputs, lanes, rows[l + 1].data());
    }
  }

  // Losses leave the gradients of the mean in `delta`, (outputs, lanes), and return the sum over the samples.

  double cross_entropy(const int64_t* samples, int64_t count) {
    const int64_t classes = its.layers[its.depth - 1].outputs;
    const float* out = columns[its.depth].data();
    alignas(64) float log_sums[LANES];
    double sum = 0;
    for (int64_t i = 0; i < lanes; i += LANES) {
      Vec most = Vec::loadu(out + i), total(0);
      for (int64_t c = 1; c < classes; ++c) most = at::vec::maximum(most, Vec::loadu(out + c * lanes + i));
      for (int64_t c = 0; c < classes; ++c) {
        const Vec e = (Vec::loadu(out + c * lanes + i) - most).exp();
        e.store(delta.data() + c * lanes + i);
        total = total + e;
      }
      const Vec share = Vec::set(Vec(0), Vec(1.0f / count) / total, std::min(LANES, count - i));
      for (int64_t c = 0; c < classes; ++c)
        (Vec::loadu(delta.data() + c * lanes + i) * share).store(delta.data() + c * lanes + i);
      (most + total.log()).store(log_sums);
      for (int64_t j = i; j < std::min(count, i + LANES); ++j) {
        const int64_t at = its.labels[samples[j]] * lanes + j;
        sum += log_sums[j - i] - out[at];
        delta[at] -= 1.0f / count;
      }
    }
    return sum;
  }

  double squared(const int64_t* samples, int64_t count) {
    const int64_t outputs = its.layers[its.depth - 1].outputs;
    const float* out = columns[its.depth].data();
    double sum = 0;
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t j = 0; j < lanes; ++j) {
        const float off = j < count ? out[o * lanes + j] - its.values[samples[j] * outputs + o] : 0.0f;
        sum += double(off) * off / outputs;
        delta[o * lanes + j] = 2 * off / (float(outputs) * count);
      }
    return sum;
  }

  // Takes the gradients in `delta` back through the layers. Writes the arrays' gradients, or, ADDED, adds them times `scale`.
  template <bool ADDED>
  void backward(float* to, int64_t count, float scale) {
    for (int64_t l = its.depth - 1; l >= 0; --l) {
      const Layer& layer = its.layers[l];
      if (l > 0) {
        multiply<true>(
            layer.inputs, lanes, layer.outputs, model.data() + layer.weight, layer.inputs, delta.data(), lanes,
            before.data(), lanes);
        deactivate(its.layers[l - 1].activation, columns[l].data(), before.data(), layer.inputs * lanes);
      }
      multiply<false, ADDED>(
          layer.outputs, layer.inputs, count, delta.data(), lanes, rows[l].data(), layer.inputs, to + layer.weight,
          layer.inputs, nullptr, scale);
      for (int64_t o = 0; o < layer.outputs && layer.bias >= 0; ++o) {
        Vec sum(0);
        for (int64_t i = 0; i < lanes; i += LANES) sum = sum + Vec::loadu(delta.data() + o * lanes + i);
        float& bias = to[layer.bias + o];
        bias = ADDED ? bias + scale * sum_of(sum) : sum_of(sum);
      }
      delta.swap(before);
    }
  }

  // One step of torch's optimiser.
  void move(float lr, float mu, int64_t step) {
    for (int64_t i = 0; i < its.numbers; i += LANES) {
      const int64_t n = std::min(LANES, its.numbers - i);
      Vec w = Vec::loadu(model.data() + i, n), g = Vec::loadu(gradients.data() + i, n);
      if (mu != 0) g = at::vec::fmadd(Vec(mu), w - Vec::loadu(sent + i, n), g);
      (its.optimizer.adam ? adam(w, g, lr, step, i, n) : sgd(w, g, lr, i, n)).store(model.data() + i, n);
    }
  }

  Vec sgd(Vec w, Vec g, float lr, int64_t i, int64_t n) {
    const Optimizer& told = its.optimizer;
    if (told.weight_decay != 0) g = at::vec::fmadd(Vec(told.weight_decay), w, g);
    if (told.momentum != 0) {
      const Vec velocity = at::vec::fmadd(Vec(told.momentum), Vec::loadu(first.data() + i, n), g);
      velocity.store(first.data() + i, n);
      g = told.nesterov ? at::vec::fmadd(Vec(told.momentum), velocity, g) : velocity;
    }
    return w - Vec(lr) * g;
  }

  Vec adam(Vec w, Vec g, float lr, int64_t step, int64_t i, int64_t n) {
    const Optimizer& told = its.optimizer;
    if (told.decoupled) w = w * Vec(1 - lr * told.weight_decay);
    else if (told.weight_decay != 0) g = at::vec::fmadd(Vec(told.weight_decay), w, g);
    const Vec m = Vec(told.beta1) * Vec::loadu(first.data() + i, n) + Vec(1 - told.beta1) * g;
    const Vec v = Vec(told.beta2) * Vec::loadu(second.data() + i, n) + Vec(1 - told.beta2) * g * g;
    m.store(first.data() + i, n);
    v.store(second.data() + i, n);
    const double unbiased = lr / (1 - std::pow(told.beta1, step + 1));
    const double root = std::sqrt(1 - std::pow(told.beta2, step + 1));
    return w - Vec(unbiased) * m / (v.sqrt() / Vec(root) + Vec(told.eps));
  }

  const Cohort& its;
  const int64_t padded; // lanes of the largest batch
  int64_t lanes = 0; // of this batch
  std::vector<std::vector<float>> rows, columns; // what goes into each layer; the last columns come out
  float* sent = nullptr; // the device's row
  std::vector<float> model, gradients, first, second; // `first` and `second`: the optimiser's
  std::vector<float> delta, before; // gradients of what comes out of a layer, and of what went in
  const bool plain; // w -= lr * gradient, and nothing else
};

} // namespace

extern "C" void train(const Cohort* cohort) {
  Run run(*cohort);
  for (int64_t device = 0; device < cohort->devices; ++device) run.train(device);
}
