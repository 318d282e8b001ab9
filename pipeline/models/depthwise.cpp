// Depthwise convolution of float32 NHWC images and its gradients: 3x3 or 5x5, stride 1, any dilation, zero padding that
// keeps the size. Compiled for the processor it runs on, see native.py; PyTorch's kernel is the reference.
//
// A task is one image, LANES channels and a band of rows. It copies its input into a tile with zero margins, so that
// the inner loops need not handle borders, strides or channels that do not fill a register. Tasks depend only on the
// shape, and each has its own sums, which are added in the order of the tasks: results do not depend on the number of
// threads, to the last bit.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif
constexpr int PIXELS = 8;                        // pixels of a row, computed together in registers
constexpr int64_t TILE_FLOATS = 384 * 1024 / 4;  // two tiles fit into the second-level cache
constexpr int64_t TASKS = 32, LEAST_ROWS = 8;    // enough tasks for many cores, with bands larger than their margins

typedef float Vector __attribute__((vector_size(4 * LANES)));

static inline Vector load(const float* from) {
  Vector value;
  memcpy(&value, from, sizeof value);
  return value;
}

static inline void store(float* to, Vector value, int lanes) { memcpy(to, &value, sizeof(float) * lanes); }

struct Shape {
  int64_t images, height, width, channels, dilation, kernel;
  int64_t margin() const { return dilation * (kernel / 2); }
  int64_t blocks() const { return (channels + LANES - 1) / LANES; }
  int64_t tile_width() const { return width + 2 * margin() + PIXELS * dilation; }  // may be read past the row
  int64_t rows() const {  // in a band
    int64_t fitting = TILE_FLOATS / (tile_width() * LANES) - 2 * margin();
    int64_t bands = (TASKS + images * blocks() - 1) / (images * blocks());
    int64_t rows = (height + bands - 1) / bands;
    rows = rows < fitting ? rows : fitting;
    rows = rows > LEAST_ROWS ? rows : LEAST_ROWS;
    return rows < height ? rows : height;
  }
  int64_t bands() const { return (height + rows() - 1) / rows(); }
  int64_t tasks() const { return images * blocks() * bands(); }
  int64_t tile_floats() const { return (rows() + 2 * margin()) * tile_width() * LANES; }
};

struct Task {
  int64_t image, block, first, rows, channel;
  int lanes;
  Task(const Shape& s, int64_t number) {
    int64_t bands = s.bands();
    image = number / (s.blocks() * bands), block = number / bands % s.blocks(), first = number % bands * s.rows();
    rows = s.height - first < s.rows() ? s.height - first : s.rows();
    channel = block * LANES;
    lanes = s.channels - channel < LANES ? int(s.channels - channel) : LANES;
  }
  int64_t offset(const Shape& s, int64_t y, int64_t x) const {
    return ((image * s.height + y) * s.width + x) * s.channels + channel;
  }
};

static void fill_tile(float* tile, const float* images, const Shape& s, const Task& t) {
  const int64_t margin = s.margin(), row_floats = s.tile_width() * LANES;
  for (int64_t y = t.first - margin; y < t.first + t.rows + margin; y++, tile += row_floats) {
    if (y < 0 || y >= s.height) {
      memset(tile, 0, sizeof(float) * row_floats);
      continue;
    }
    memset(tile, 0, sizeof(float) * margin * LANES);
    float* to = tile + margin * LANES;
    const float* from = images + t.offset(s, y, 0);
    for (int64_t x = 0; x < s.width; x++, to += LANES, from += s.channels) {
      Vector value = {};
      if (t.lanes == LANES)
        value = load(from);
      else
        memcpy(&value, from, sizeof(float) * t.lanes);
      store(to, value, LANES);
    }
    memset(to, 0, sizeof(float) * (row_floats - (margin + s.width) * LANES));
  }
}

// Computes P pixels of an output row. They are `step` floats apart, like the taps, and therefore share loaded values.
template <int K, int P>
static inline void convolve(const float* tile, int64_t row, int64_t step, const float* weights, Vector* sums) {
  for (int i = 0; i < K; i++, tile += row, weights += K * LANES) {
    Vector read[P + K - 1];
#pragma GCC unroll 16
    for (int p = 0; p < P + K - 1; p++) read[p] = load(tile + p * step);
#pragma GCC unroll 5
    for (int j = 0; j < K; j++) {
      const Vector weight = load(weights + j * LANES);
#pragma GCC unroll 8
      for (int p = 0; p < P; p++) sums[p] += weight * read[p + j];
    }
  }
}

template <int K, int P>
static inline void convolve_pixels(float* to, const float* tile, const Shape& s, const float* weights, Vector bias,
                                   int64_t count, int lanes) {
  Vector sums[P];
  for (int p = 0; p < P; p++) sums[p] = bias;
  convolve<K, P>(tile, s.dilation * s.tile_width() * LANES, s.dilation * LANES, weights, sums);
  if (count == P && lanes == LANES)
    for (int p = 0; p < P; p++) store(to + p * s.dilation * s.channels, sums[p], LANES);
  else
    for (int p = 0; p < count; p++) store(to + p * s.dilation * s.channels, sums[p], lanes);
}

template <int K>
static void convolve_band(float* out, const float* tile, const Shape& s, const Task& t, const float* weights,
                          Vector bias) {
  for (int64_t y = 0; y < t.rows; y++) {
    const float* row = tile + y * s.tile_width() * LANES;
    for (int64_t phase = 0; phase < s.dilation; phase++)
      for (int64_t x = phase; x < s.width; x += PIXELS * s.dilation) {
        int64_t left = (s.width - x + s.dilation - 1) / s.dilation;
        float* to = out + t.offset(s, t.first + y, x);
        if (left > PIXELS / 2)
          convolve_pixels<K, PIXELS>(to, row + x * LANES, s, weights, bias, left < PIXELS ? left : PIXELS, t.lanes);
        else
          convolve_pixels<K, PIXELS / 2>(to, row + x * LANES, s, weights, bias, left, t.lanes);
      }
  }
}

// Adds the sums of gradient * image over a row to those of R rows of taps, P pixels at a time as above. The gradient's
// tile is zero beyond the end of the row. Each row is first summed separately, because long sums in one register lose
// precision.
template <int K, int R>
static inline void correlate(Vector* sums, const float* gradient, const float* image, const Shape& s) {
  constexpr int P = PIXELS;
  const int64_t step = s.dilation * LANES, row = s.dilation * s.tile_width() * LANES;
  Vector local[R * K] = {};
  for (int64_t phase = 0; phase < s.dilation; phase++)
    for (int64_t x = phase; x < s.width; x += P * s.dilation) {
      Vector g[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; p++) g[p] = load(gradient + x * LANES + p * step);
#pragma GCC unroll 3
      for (int i = 0; i < R; i++)
#pragma GCC unroll 12
        for (int q = 0; q < P + K - 1; q++) {
          const Vector value = load(image + x * LANES + i * row + q * step);
#pragma GCC unroll 5
          for (int j = 0; j < K; j++)
            if (q - j >= 0 && q - j < P) local[i * K + j] += g[q - j] * value;
        }
    }
  for (int k = 0; k < R * K; k++) sums[k] += local[k];
}

template <int K>
static void correlate_band(Vector* sums, const float* gradients, const float* images, const Shape& s, const Task& t) {
  constexpr int R = (REGISTERS == 32 ? 2 : 1) + (K == 3);  // rows of taps whose sums fit into registers
  const int64_t row = s.tile_width() * LANES;
  for (int64_t y = 0; y < t.rows; y++) {
    const float* gradient = gradients + (y + s.margin()) * row + s.margin() * LANES;
    const float* image = images + y * row;
    for (int i = 0; i + R <= K; i += R) correlate<K, R>(sums + i * K, gradient, image + i * s.dilation * row, s);
    if constexpr (K % R) correlate<K, K % R>(sums + (K - K % R) * K, gradient, image + (K - K % R) * s.dilation * row, s);
    Vector bias = {};
    for (int64_t x = 0; x < s.width; x++) bias += load(gradient + x * LANES);
    sums[K * K] += bias;
  }
}

// (channels, 1, K, K) -> (blocks, K * K, LANES), padded with 0; flipped for the gradient of the input.
static float* packed(const float* weights, const Shape& s, bool is_flipped) {
  const int64_t taps = s.kernel * s.kernel;
  float* found = static_cast<float*>(calloc(s.blocks() * taps * LANES, sizeof(float)));
  for (int64_t c = 0; found && c < s.channels; c++)
    for (int64_t k = 0; k < taps; k++)
      found[(c / LANES * taps + (is_flipped ? taps - 1 - k : k)) * LANES + c % LANES] = weights[c * taps + k];
  return found;
}

template <int K>
static bool run_forward(const float* images, const float* weights, const float* bias, float* out, const Shape& s,
                        int threads) {
  float* ready = packed(weights, s, false);
  if (!ready) return false;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    float* tile = static_cast<float*>(malloc(sizeof(float) * s.tile_floats()));
    failed |= !tile;
#pragma omp for schedule(dynamic)
    for (int64_t number = 0; number < s.tasks(); number++) {
      if (failed) continue;
      const Task t(s, number);
      Vector start = {};
      if (bias) memcpy(&start, bias + t.channel, sizeof(float) * t.lanes);
      fill_tile(tile, images, s, t);
      convolve_band<K>(out, tile, s, t, ready + t.block * K * K * LANES, start);
    }
    free(tile);
  }
  free(ready);
  return !failed;
}

template <int K>
static bool run_backward(const float* images, const float* gradients, const float* weights, float* to_images,
                         float* to_weights, float* to_bias, const Shape& s, int threads) {
  constexpr int SUMS = K * K + 1;
  float* ready = packed(weights, s, true);
  float* sums = static_cast<float*>(calloc(s.tasks() * SUMS * LANES, sizeof(float)));
  int failed = 0;
  if (!ready || !sums) {
    free(sums);
    free(ready);
    return false;
  }
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    float* tiles = static_cast<float*>(malloc(sizeof(float) * s.tile_floats() * 2));
    failed |= !tiles;
#pragma omp for schedule(dynamic)
    for (int64_t number = 0; number < s.tasks(); number++) {
      if (failed) continue;
      const Task t(s, number);
      float *gradient = tiles, *image = tiles + s.tile_floats();
      fill_tile(gradient, gradients, s, t);
      if (to_images) convolve_band<K>(to_images, gradient, s, t, ready + t.block * K * K * LANES, Vector{});
      if (to_weights) {
        Vector own[SUMS] = {};
        fill_tile(image, images, s, t);
        correlate_band<K>(own, gradient, image, s, t);
        memcpy(sums + number * SUMS * LANES, own, sizeof own);
      }
    }
    free(tiles);
  }
  for (int64_t number = 0; to_weights && number < s.tasks(); number++) {
    const Task t(s, number);
    const float* own = sums + number * SUMS * LANES;
    for (int lane = 0; lane < t.lanes; lane++) {
      for (int k = 0; k < K * K; k++) to_weights[(t.channel + lane) * K * K + k] += own[k * LANES + lane];
      to_bias[t.channel + lane] += own[K * K * LANES + lane];
    }
  }
  free(sums);
  free(ready);
  return !failed;
}

// Takes pointers to contiguous tensors: images, gradients and results NHWC, weights (channels, kernel, kernel).
// Returns 0 on success.
extern "C" int depthwise_forward(const float* images, const float* weights, const float* bias, float* out,
                                 int64_t number, int64_t height, int64_t width, int64_t channels, int64_t kernel,
                                 int64_t dilation, int threads) {
  const Shape s{number, height, width, channels, dilation, kernel};
  return kernel == 3   ? !run_forward<3>(images, weights, bias, out, s, threads)
         : kernel == 5 ? !run_forward<5>(images, weights, bias, out, s, threads)
                       : 1;
}

// Adds to `to_weights` and `to_bias`, which must be zeros. A null `to_images`, or null for both, skips that part.
extern "C" int depthwise_backward(const float* images, const float* gradients, const float* weights, float* to_images,
                                  float* to_weights, float* to_bias, int64_t number, int64_t height, int64_t width,
                                  int64_t channels, int64_t kernel, int64_t dilation, int threads) {
  const Shape s{number, height, width, channels, dilation, kernel};
  return kernel == 3   ? !run_backward<3>(images, gradients, weights, to_images, to_weights, to_bias, s, threads)
         : kernel == 5 ? !run_backward<5>(images, gradients, weights, to_images, to_weights, to_bias, s, threads)
                       : 1;
}
