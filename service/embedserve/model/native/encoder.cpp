// The forward pass of a BERT-like encoder over packed rows, from token ids to pooled vectors, without Python's lock.
//
// Decides how a pass is cut into chunks of rows, which core takes which chunk, and how each layer is computed on one.
// Must never know requests, buckets or Python. It is built on the machine that runs it (see compiler.py). Products are
// ours in bfloat16 on AVX-512 (avx512.h); elsewhere they are ATen's brgemm (ATen/native/CPUBlas.h), the oneDNN
// micro-kernel that picks AMX or AVX-512 by itself.
//
// Why not operation by operation: for 12 tokens of MiniLM 80 % of a pass was not arithmetic (4.8 ms, of which 0.6 are
// matrix products at the machine's rate), and between two operations a thread needs Python's lock.
// Why chunks: all layers of some 128 tokens stay in a core's own cache, and whoever is free takes the next, of the next
// pass too if that is here: otherwise all cores but one wait at the end of each pass.

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"

namespace c10 {
struct BFloat16 {
  uint16_t bits;
};
}  // namespace c10

namespace at::native::cpublas {
// C[M, N] (+)= A[M, K] B[K, N]; with is_vnni, B lies as [K / 2, N, 2].
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C,
            const c10::BFloat16* A, const c10::BFloat16* B, float* C, bool is_vnni);
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C, const float* A,
            const float* B, float* C, bool is_vnni);
// Gives the tile registers of AMX back; they cost every switch of threads.
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace {

using BFloat16 = c10::BFloat16;

constexpr int64_t TOKENS_OF_CHUNK = 128;  // Fits a core's cache; more brought nothing, 64 cost 3 %.
constexpr int64_t TOKENS_WORTH_A_CHUNK = 32;  // Fewer take longer each: all weights are read for every chunk.
constexpr int64_t TOKENS_HERE = 32;       // A pass of no more may be computed by its caller: 2 ms.
constexpr float VANISHING_NORM = 1e-12f;
constexpr int64_t TOKENS_OF_BLOCK = 64;   // Rows of A in one matrix product.
constexpr int64_t QUERIES_OF_BLOCK = 32;  // Scores of 32 queries and 256 keys fill 32 KiB, a core's first cache.
constexpr int64_t KEYS_OF_BLOCK = 256;    // Longer rows go by blocks of keys with a running maximum (flash attention).
constexpr int64_t SLACK = TOKENS_OF_BLOCK;  // Rows behind the last one that a rounded-up product may read.
constexpr size_t CACHE_LINE = 64;
constexpr size_t HUGE_PAGE = 2 << 20;
constexpr int64_t ROW_OF_TILES = 128;     // Tokens of a text up to which tiles of AMX would not pay in attention.

#ifdef EMBEDSERVE_AVX512
constexpr bool AVX512 = true;
#else
constexpr bool AVX512 = false;
#endif
#ifdef __AMX_BF16__
constexpr bool AMX = true;
#else
constexpr bool AMX = false;
#endif

enum Activation : int64_t { GELU = 0, GELU_TANH = 1, RELU = 2, SILU = 3 };

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// oneDNN makes a kernel for each number of rows: a few sizes keep them few.
int64_t rows_rounded(int64_t rows) { return up_to(rows, rows <= 16 ? 4 : 8); }

int64_t keys_rounded(int64_t keys) { return keys <= 16 ? 16 : up_to(keys, 32); }

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { grow(size); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
    other.size_ = 0;
  }
  ~Buffer() { std::free(data_); }

  // At least `size` elements, zeros when new; what it held before is lost. Large ones lie in huge pages where the system
  // gives them: all weights are read in every pass, and in small pages they are more than a core has translations for.
  T* grow(int64_t size) {
    if (size > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      const size_t wanted = static_cast<size_t>(size) * sizeof(T);
      const size_t alignment = wanted < HUGE_PAGE ? CACHE_LINE : HUGE_PAGE;
      const size_t bytes = up_to(wanted, alignment);
      void* fresh = std::aligned_alloc(alignment, bytes);
      if (fresh == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      if (alignment == HUGE_PAGE) madvise(fresh, bytes, MADV_HUGEPAGE);  // where it is refused, small pages serve
#endif
      std::memset(fresh, 0, bytes);
      data_ = static_cast<T*>(fresh);
      size_ = size;
    }
    return data_;
  }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// ------------------------------------------------------------------------------------------------------- numbers

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void store(float* to, float x) { *to = x; }

inline void store(BFloat16* to, float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0x7fffu + ((bits >> 16) & 1u);
  to->bits = static_cast<uint16_t>(bits >> 16);
}

// e^x, relative error below 3e-7 down to -87, and 0 below; no table, no branch, so that loops become vectors.
inline float exponential(float x) {
  const float bounded = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float scaled = bounded * 1.44269504088896341f;
  const float rounded = scaled + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, which its last bits are then
  const float whole = rounded - 12582912.0f;
  const float part = scaled - whole;
  float y = 1.54035303933816e-4f;
  y = y * part + 1.33335581464284e-3f;
  y = y * part + 9.61812910762848e-3f;
  y = y * part + 5.55041086648216e-2f;
  y = y * part + 2.40226506959101e-1f;
  y = y * part + 6.93147180559945e-1f;
  y = y * part + 1.0f;
  // Without a conversion, which is not defined for NaN: the shift leaves of the bits the integer and nothing else, and
  // of a NaN's some factor, with which y stays NaN.
  uint32_t power;
  std::memcpy(&power, &rounded, sizeof power);
  power = (power + 127u) << 23;
  float factor;
  std::memcpy(&factor, &power, sizeof factor);
  // A NaN must stay one: a comparison with it is false, and both bounds let it pass.
  return x < -87.0f ? 0.0f : y * factor;
}

// Abramowitz and Stegun, 7.1.26: absolute error below 1.5e-7.
inline float error_function(float x) {
  const float size = std::fabs(x);
  const float t = 1.0f / (1.0f + 0.3275911f * size);
  float y = 1.061405429f;
  y = y * t - 1.453152027f;
  y = y * t + 1.421413741f;
  y = y * t - 0.284496736f;
  y = y * t + 0.254829592f;
  const float result = 1.0f - y * t * exponential(-size * size);
  return std::copysign(result, x);
}

template <Activation A>
inline float activated(float x) {
  if constexpr (A == GELU) return 0.5f * x * (1.0f + error_function(x * 0.70710678118654752f));
  if constexpr (A == GELU_TANH) {
    const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(-2.0f * inner));  // x * (1 + tanh(u)) / 2
  }
  if constexpr (A == RELU) return x < 0.0f ? 0.0f : x;
  if constexpr (A == SILU) return x / (1.0f + exponential(-x));
}

template <typename T>
constexpr bool IN_PAIRS = std::is_same_v<T, BFloat16>;

// Whether avx512.h computes it: rows of `n` in bfloat16.
template <typename T>
constexpr bool takes_registers(int64_t n) {
  return AVX512 && IN_PAIRS<T> && n % 32 == 0;
}

template <Activation A, typename T>
void activate(const float* __restrict from, const float* __restrict bias, T* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) store(to + j, activated<A>(from[j] + bias[j]));
}

template <typename T>
void activate_by(int64_t kind, const float* from, const float* bias, T* to, int64_t n) {
  switch (kind) {
    case GELU: return activate<GELU>(from, bias, to, n);
    case GELU_TANH: return activate<GELU_TANH>(from, bias, to, n);
    case RELU: return activate<RELU>(from, bias, to, n);
    default: return activate<SILU>(from, bias, to, n);
  }
}

// A block of a product without its bias, [rows, width], where it belongs in a result whose rows lie `ld` apart.
struct Block {
  const float* sums;
  int64_t rows, width;
  const float* bias;
  int64_t first, column;

  template <typename T>
  T* place(T* result, int64_t ld) const {
    return result + first * ld + column;
  }

  template <typename T>
  void add_bias(T* result, int64_t ld) const {
    T* to = place(result, ld);
#ifdef EMBEDSERVE_AVX512
    if (takes_registers<T>(width))
      return embedserve::avx512::add_bias(sums, rows, width, bias, reinterpret_cast<uint16_t*>(to), ld);
#endif
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < width; ++j) store(to + row * ld + j, sums[row * width + j] + bias[j]);
    }
  }

  template <typename T>
  void activate(int64_t kind, T* result, int64_t ld) const {
    T* to = place(result, ld);
#ifdef EMBEDSERVE_AVX512
    if (kind == GELU && takes_registers<T>(width))
      return embedserve::avx512::add_bias_gelu(sums, rows, width, bias, reinterpret_cast<uint16_t*>(to), ld);
#endif
    for (int64_t row = 0; row < rows; ++row) activate_by(kind, sums + row * width, bias, to + row * ld, width);
  }

  void add_to(float* result, int64_t ld) const {
    float* to = place(result, ld);
#ifdef EMBEDSERVE_AVX512
    if (width % 32 == 0) return embedserve::avx512::add_to(sums, rows, width, bias, to, ld);
#endif
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < width; ++j) to[row * ld + j] += sums[row * width + j] + bias[j];
    }
  }
};

struct Norm {
  const float* weight;
  const float* bias;
  float eps;

  // Normalises one row in place, and writes it once more in the type of the next product.
  template <typename T>
  void apply(float* __restrict row, T* __restrict also, int64_t n) const {
#ifdef EMBEDSERVE_AVX512
    if (takes_registers<T>(n)) return embedserve::avx512::normalize(row, weight, bias, eps, also, n);
#endif
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += row[j];
    const float mean = sum / static_cast<float>(n);
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < n; ++j) squares += (row[j] - mean) * (row[j] - mean);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float value = (row[j] - mean) * scale * weight[j] + bias[j];
      row[j] = value;
      store(also + j, value);
    }
  }
};

// ------------------------------------------------------------------------------------------------------ products

// y = x W^T + b, the weights cut into panels of `width` outputs, each [k, width] (bfloat16: [k / 2, width, 2]).
template <typename T>
struct Linear {
  int64_t n, k, width;
  const T* panels;
  const float* bias;

  // Writes n * k weights to `to`, which has to outlive this.
  Linear(const T* weight, const float* bias_of, int64_t outputs, int64_t inputs, T* to)
      : n(outputs), k(inputs), width(width_of(outputs)), panels(to), bias(bias_of) {
    for (int64_t row = 0; row < n; ++row) {
      T* panel = to + row / width * k * width;
      const int64_t column = row % width;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t place = IN_PAIRS<T> ? i / 2 * width * 2 + column * 2 + i % 2 : i * width + column;
        panel[place] = weight[row * k + i];
      }
    }
  }

  // Our own product has panels of two registers; AMX's tiles are faster than it.
  static int64_t width_of(int64_t outputs) {
    if (!AMX && takes_registers<T>(outputs)) return 32;
    return outputs % 64 == 0 ? 64 : 16;
  }

  // Products of all `rows` rows of x, without the bias, block by block to `finish`; `y` is room for one. brgemm reads
  // more rows than it needs.
  template <typename F>
  void multiply(int64_t rows, const T* x, float* y, F&& finish) const {
    for (int64_t column = 0; column < n; column += width) {
      const T* panel = panels + column * k;
#ifdef EMBEDSERVE_AVX512
      if (width == 32) {
        namespace own = embedserve::avx512;
        // What this panel's tiles fetch meanwhile is the next one, of the next linear too: they lie in order of use.
        const int64_t bytes = k * width * static_cast<int64_t>(sizeof(T));
        const int64_t tiles = up_to(rows, own::TILE_ROWS) / own::TILE_ROWS;
        own::Ahead ahead{reinterpret_cast<const char*>(panel) + bytes, bytes / 2, own::LINE / tiles};
        own::in_tiles(rows, [&](int64_t first, int64_t count) {
          own::tile_of<2, true>(count)(k / 2, reinterpret_cast<const uint32_t*>(x + first * k), k / 2, 1,
                                       reinterpret_cast<const uint32_t*>(panel), y, width, ahead);
          ahead.first += bytes / 2 / tiles;
          finish(Block{y, count, width, bias + column, first, column});
        });
        continue;
      }
#endif
      for (int64_t first = 0; first < rows; first += TOKENS_OF_BLOCK) {
        const int64_t count = std::min(TOKENS_OF_BLOCK, rows - first);
        at::native::cpublas::brgemm(rows_rounded(count), width, k, k, width, width, false, x + first * k, panel, y,
                                    IN_PAIRS<T>);
        finish(Block{y, count, width, bias + column, first, column});
      }
    }
  }
};

template <typename T>
struct Layer {
  Linear<T> attend, project, widen, narrow;
  Norm after_attention, after_feed_forward;
};

struct Shape {
  int64_t hidden, heads, intermediate, layers, activation;
  float scale, eps;
  int64_t head() const { return hidden / heads; }
};

// ----------------------------------------------------------------------------------------------------- one chunk

// What one core needs for one chunk; kept from pass to pass.
template <typename T>
struct Scratch {
  Buffer<float> states, product, scores, summed, maxima, sums;
  Buffer<T> inputs, attended, intermediate, mixed, weights, keys, values;
#ifdef EMBEDSERVE_AVX512
  Buffer<uint32_t> queries_across, values_in_pairs;
  Buffer<float> scores_across;
#endif

  void fit(const Shape& shape, int64_t tokens, int64_t longest) {
    const int64_t rows = tokens + SLACK;
    const int64_t keys_padded = up_to(longest, KEYS_OF_BLOCK);
    states.grow(rows * shape.hidden);
    inputs.grow(rows * shape.hidden);
    attended.grow(rows * 3 * shape.hidden);
    mixed.grow(rows * shape.hidden);
    intermediate.grow(rows * shape.intermediate);
    product.grow(TOKENS_OF_BLOCK * 64);
    scores.grow(QUERIES_OF_BLOCK * KEYS_OF_BLOCK);
    weights.grow(QUERIES_OF_BLOCK * KEYS_OF_BLOCK);
    summed.grow(QUERIES_OF_BLOCK * shape.head());
    maxima.grow(QUERIES_OF_BLOCK);
    sums.grow(QUERIES_OF_BLOCK);
    keys.grow(keys_padded * shape.head());
    values.grow(keys_padded * shape.head());
#ifdef EMBEDSERVE_AVX512
    using embedserve::avx512::Room;
    queries_across.grow(Room::queries_size(shape.head()));
    scores_across.grow(Room::scores_size(longest));
    values_in_pairs.grow(Room::values_size(longest, shape.head()));
#endif
  }
};

// Keys of one head as the right side of a product, [head, keys] (bfloat16: in pairs), by blocks; zeros behind the last.
template <typename T>
void lay_keys(const T* from, int64_t stride, int64_t count, int64_t head, T* to) {
  for (int64_t first = 0; first < count; first += KEYS_OF_BLOCK, to += KEYS_OF_BLOCK * head) {
    const int64_t real = std::min(KEYS_OF_BLOCK, count - first);
    const int64_t padded = keys_rounded(real);
    if constexpr (IN_PAIRS<T>) {
      for (int64_t pair = 0; pair < head / 2; ++pair) {
        uint32_t* row = reinterpret_cast<uint32_t*>(to) + pair * padded;
        for (int64_t s = 0; s < real; ++s) std::memcpy(row + s, from + (first + s) * stride + 2 * pair, 4);
        for (int64_t s = real; s < padded; ++s) row[s] = 0;
      }
    } else {
      for (int64_t d = 0; d < head; ++d) {
        for (int64_t s = 0; s < real; ++s) to[d * padded + s] = from[(first + s) * stride + d];
        for (int64_t s = real; s < padded; ++s) to[d * padded + s] = T{};
      }
    }
  }
}

// Values of one head, [keys, head] (bfloat16: two rows interleaved), by blocks; zeros behind the last.
template <typename T>
void lay_values(const T* from, int64_t stride, int64_t count, int64_t head, T* to) {
  for (int64_t first = 0; first < count; first += KEYS_OF_BLOCK, to += KEYS_OF_BLOCK * head) {
    const int64_t real = std::min(KEYS_OF_BLOCK, count - first);
    const int64_t padded = keys_rounded(real);
    if constexpr (IN_PAIRS<T>) {
      static const T zeros[1024] = {};
      for (int64_t s = 0; s < padded; s += 2) {
        const T* even = s < real ? from + (first + s) * stride : zeros;
        const T* odd = s + 1 < real ? from + (first + s + 1) * stride : zeros;
        T* pairs = to + s * head;
#pragma omp simd
        for (int64_t d = 0; d < head; ++d) {
          pairs[2 * d] = even[d];
          pairs[2 * d + 1] = odd[d];
        }
      }
    } else {
      for (int64_t s = 0; s < real; ++s) std::memcpy(to + s * head, from + (first + s) * stride, head * sizeof(T));
      std::memset(to + real * head, 0, (padded - real) * head * sizeof(T));
    }
  }
}

// Attention of one head over one row: `count` tokens whose queries, keys and values lie `stride` apart.
template <typename T>
void attend_row(const Shape& shape, const T* base, int64_t stride, int64_t count, T* to, Scratch<T>& own) {
  const int64_t head = shape.head();
#ifdef EMBEDSERVE_AVX512
  if (takes_registers<T>(head) && (!AMX || count <= ROW_OF_TILES)) {
    const auto pairs = [](auto* of) { return reinterpret_cast<const uint32_t*>(of); };
    return embedserve::avx512::attend(
        pairs(base), pairs(base + shape.hidden), pairs(base + 2 * shape.hidden), stride / 2, count, head, shape.scale,
        reinterpret_cast<uint32_t*>(to), shape.hidden / 2,
        {own.queries_across.get(), own.scores_across.get(), own.values_in_pairs.get()});
  }
#endif
  T* keys = own.keys.get();
  T* values = own.values.get();
  lay_keys(base + shape.hidden, stride, count, head, keys);
  lay_values(base + 2 * shape.hidden, stride, count, head, values);
  float* scores = own.scores.get();
  float* summed = own.summed.get();
  float* maxima = own.maxima.get();
  float* sums = own.sums.get();
  T* weights = own.weights.get();
  for (int64_t query = 0; query < count; query += QUERIES_OF_BLOCK) {
    const int64_t queries = std::min(QUERIES_OF_BLOCK, count - query);
    const int64_t padded_queries = rows_rounded(queries);
    for (int64_t first = 0; first < count; first += KEYS_OF_BLOCK) {
      const int64_t real = std::min(KEYS_OF_BLOCK, count - first);
      const int64_t padded = keys_rounded(real);
      at::native::cpublas::brgemm(padded_queries, padded, head, stride, padded, padded, false, base + query * stride,
                                  keys + first * head, scores, IN_PAIRS<T>);
      for (int64_t q = 0; q < queries; ++q) {
        const float* __restrict row = scores + q * padded;
        T* __restrict weight = weights + q * padded;
        float highest = row[0];
#pragma omp simd reduction(max : highest)
        for (int64_t s = 0; s < real; ++s) highest = row[s] > highest ? row[s] : highest;
        float before = 0.0f;
        if (first > 0) {
          before = maxima[q];
          highest = std::max(highest, before);
        }
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t s = 0; s < real; ++s) {
          const float value = exponential((row[s] - highest) * shape.scale);
          sum += value;
          store(weight + s, value);
        }
        for (int64_t s = real; s < padded; ++s) weight[s] = T{};
        if (first > 0) {
          const float fade = exponential((before - highest) * shape.scale);
          sums[q] = sums[q] * fade + sum;
          for (int64_t d = 0; d < head; ++d) summed[q * head + d] *= fade;
        } else {
          sums[q] = sum;
        }
        maxima[q] = highest;
      }
      at::native::cpublas::brgemm(padded_queries, head, padded, padded, head, head, first > 0, weights,
                                  values + first * head, summed, IN_PAIRS<T>);
    }
    for (int64_t q = 0; q < queries; ++q) {
      const float part = 1.0f / sums[q];
      T* __restrict row = to + (query + q) * shape.hidden;
      const float* __restrict from = summed + q * head;
#pragma omp simd
      for (int64_t d = 0; d < head; ++d) store(row + d, from[d] * part);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- the encoder

struct Pass {
  int64_t rows;
  const int32_t* ids;        // [tokens], row after row
  const int32_t* positions;  // [tokens]; null: from 0 in each row
  const int32_t* offsets;    // [rows + 1]
  const float* pooling;      // [modes, tokens]: what each token counts in each mode; null: the mean
  int64_t modes;
  const uint8_t* normalize;  // [rows]: whether the vector is scaled to unit length; null: none is
  float* vectors;            // [rows, modes * hidden]
  int64_t lanes;             // cores, at most
};

struct Chunk {
  std::vector<int64_t> rows;  // longest first
  int64_t tokens = 0;
};

// A pass that is at work: which of its chunks are taken, and how many are not done.
struct Job {
  const Pass& pass;
  std::vector<Chunk> chunks;
  size_t taken = 0;
  size_t undone = chunks.size();
  std::exception_ptr failure;
  std::condition_variable done;

  Job(const Pass& of, std::vector<Chunk> cut) : pass(of), chunks(std::move(cut)) {}
  bool has_more() const { return taken < chunks.size(); }
};

class Encoder {
 public:
  virtual ~Encoder() = default;
  virtual void run(const Pass& pass) = 0;
};

template <typename T>
class EncoderOf final : public Encoder {
 public:
  EncoderOf(const Shape& shape, const void* const* tensors, int64_t lanes, int nice) : shape_(shape) {
    words_ = static_cast<const T*>(*tensors++);
    positions_ = static_cast<const float*>(*tensors++);
    embedded_ = norm(tensors);
    const int64_t h = shape.hidden, wide = shape.intermediate;
    layers_.reserve(shape.layers);
    T* panels = panels_.grow(shape.layers * (4 * h * h + 2 * wide * h));
    for (int64_t l = 0; l < shape.layers; ++l) {
      const Linear<T> attend = linear(tensors, 3 * h, h, panels);
      const Linear<T> project = linear(tensors, h, h, panels);
      const Norm after_attention = norm(tensors);
      const Linear<T> widen = linear(tensors, wide, h, panels);
      const Linear<T> narrow = linear(tensors, h, wide, panels);
      layers_.push_back({attend, project, widen, narrow, after_attention, norm(tensors)});
    }
    try {
      for (int64_t lane = 0; lane < lanes; ++lane) threads_.emplace_back([this, nice] { serve(nice); });
    } catch (...) {  // a limit on threads or memory; no destructor runs for what was never whole
      end();
      throw;
    }
  }

  ~EncoderOf() override { end(); }

  // A short pass for which nobody else waits is computed by its caller: two threads need not wake for it. Otherwise a
  // caller must not: it holds a processor at full priority, which the lanes do not.
  //
  // Several threads may be in here. A pass's chunks are taken in the order in which the passes came: while one core is
  // at the last chunk of a pass, the others begin with the next one.
  void run(const Pass& pass) override {
    Job job(pass, cut(pass));
    std::unique_lock<std::mutex> lock(mutex_);
    if (working_ == 0 && jobs_.empty() && pass.offsets[pass.rows] <= TOKENS_HERE) {
      jobs_.push_back(&job);
      work(lock, job, lent_);
      lock.unlock();
      at::native::cpublas::brgemm_release(IN_PAIRS<T>);
      if (job.failure) std::rethrow_exception(job.failure);
      return;
    }
    jobs_.push_back(&job);
    for (size_t lanes = std::min(job.chunks.size(), threads_.size()); lanes > 0; --lanes) wake_.notify_one();
    job.done.wait(lock, [&job] { return job.undone == 0; });
    if (job.failure) std::rethrow_exception(job.failure);
  }

 private:
  Norm norm(const void* const*& tensors) const {
    const float* weight = static_cast<const float*>(*tensors++);
    return {weight, static_cast<const float*>(*tensors++), shape_.eps};
  }

  static Linear<T> linear(const void* const*& tensors, int64_t outputs, int64_t inputs, T*& panels) {
    const T* weight = static_cast<const T*>(*tensors++);
    T* to = panels;
    panels += outputs * inputs;
    return Linear<T>(weight, static_cast<const float*>(*tensors++), outputs, inputs, to);
  }

  // Longest rows first, and smaller chunks towards the end, which decide how long one core waits for the others: each
  // is half of what a lane's share of the rest would be. Cores are not equally fast, an event loop may sit on one.
  static std::vector<Chunk> cut(const Pass& pass) {
    std::vector<Chunk> chunks;
    const int32_t* offsets = pass.offsets;
    const auto tokens_of = [offsets](int64_t row) { return int64_t{offsets[row + 1]} - offsets[row]; };
    std::vector<int64_t> order(pass.rows);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return tokens_of(a) > tokens_of(b); });
    int64_t left = offsets[pass.rows], target = 0;
    for (const int64_t row : order) {
      const int64_t tokens = tokens_of(row);
      if (chunks.empty() || chunks.back().tokens + tokens / 2 >= target) {
        target = pass.lanes < 2 || left < 2 * TOKENS_WORTH_A_CHUNK
                     ? TOKENS_OF_CHUNK
                     : std::clamp(left / (2 * pass.lanes), TOKENS_WORTH_A_CHUNK, TOKENS_OF_CHUNK);
        chunks.emplace_back();
      }
      chunks.back().rows.push_back(row);
      chunks.back().tokens += tokens;
      left -= tokens;
    }
    return chunks;
  }

  void end() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // A lane. Its priority is low: whoever talks to callers and to this engine has short turns, for which all wait.
  void serve(int nice) {
    pthread_setname_np(pthread_self(), "embedserve-lane");
    const id_t self = static_cast<id_t>(syscall(SYS_gettid));
    setpriority(PRIO_PROCESS, self, getpriority(PRIO_PROCESS, self) + nice);  // where it may not be, it stays as it is
    Scratch<T> own;
    std::unique_lock<std::mutex> lock(mutex_);
    while (!ended_) {
      if (jobs_.empty()) {
        lock.unlock();
        at::native::cpublas::brgemm_release(IN_PAIRS<T>);
        lock.lock();
        wake_.wait(lock, [this] { return ended_ || !jobs_.empty(); });
      } else {
        work(lock, *jobs_.front(), own);
      }
    }
  }

  // One chunk of `job`. Called and left with the lock held.
  void work(std::unique_lock<std::mutex>& lock, Job& job, Scratch<T>& own) {
    const Chunk& chunk = job.chunks[job.taken++];
    if (!job.has_more()) jobs_.pop_front();
    ++working_;
    lock.unlock();
    std::exception_ptr failure;
    try {
      compute(job.pass, chunk, own);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    --working_;
    if (failure && !job.failure) {
      job.failure = failure;
      if (job.has_more()) {  // nobody needs the others
        jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
        job.undone -= job.chunks.size() - job.taken;
        job.taken = job.chunks.size();
      }
    }
    if (--job.undone == 0) job.done.notify_one();
  }

  void compute(const Pass& pass, const Chunk& chunk, Scratch<T>& own) const {
    const int32_t* offsets = pass.offsets;
    const int64_t longest = offsets[chunk.rows[0] + 1] - offsets[chunk.rows[0]];
    own.fit(shape_, chunk.tokens, longest);
    embed(pass, chunk, own);
    for (const Layer<T>& layer : layers_) {
      attend(pass, chunk, layer, own);
      add_and_normalize(chunk.tokens, layer.project, own.mixed.get(), layer.after_attention, own);
      widen(chunk.tokens, layer.widen, own);
      add_and_normalize(chunk.tokens, layer.narrow, own.intermediate.get(), layer.after_feed_forward, own);
    }
    pool(pass, chunk, own);
  }

  void embed(const Pass& pass, const Chunk& chunk, Scratch<T>& own) const {
    const int64_t h = shape_.hidden;
    float* state = own.states.get();
    T* input = own.inputs.get();
    for (const int64_t row : chunk.rows) {
      const int64_t first = pass.offsets[row];
      for (int64_t t = first; t < pass.offsets[row + 1]; ++t, state += h, input += h) {
        const T* __restrict word = words_ + static_cast<int64_t>(pass.ids[t]) * h;
        const float* __restrict place = positions_ + (pass.positions ? pass.positions[t] : t - first) * h;
#pragma omp simd
        for (int64_t j = 0; j < h; ++j) state[j] = to_float(word[j]) + place[j];
        embedded_.apply(state, input, h);
      }
    }
  }

  void attend(const Pass& pass, const Chunk& chunk, const Layer<T>& layer, Scratch<T>& own) const {
    const int64_t h = shape_.hidden, stride = 3 * h;
    const Linear<T>& linear = layer.attend;
    linear.multiply(chunk.tokens, own.inputs.get(), own.product.get(),
                    [&](const Block& block) { block.add_bias(own.attended.get(), stride); });
    int64_t token = 0;
    for (const int64_t row : chunk.rows) {
      const int64_t count = pass.offsets[row + 1] - pass.offsets[row];
      for (int64_t head = 0; head < shape_.heads; ++head) {
        attend_row(shape_, own.attended.get() + token * stride + head * shape_.head(), stride, count,
                   own.mixed.get() + token * h + head * shape_.head(), own);
      }
      token += count;
    }
  }

  // states = norm(states + linear(x)), and inputs the same in the type of the next product.
  void add_and_normalize(int64_t tokens, const Linear<T>& linear, const T* x, const Norm& norm, Scratch<T>& own) const {
    const int64_t h = shape_.hidden;
    float* states = own.states.get();
    linear.multiply(tokens, x, own.product.get(), [&](const Block& block) { block.add_to(states, h); });
    for (int64_t row = 0; row < tokens; ++row) norm.apply(states + row * h, own.inputs.get() + row * h, h);
  }

  void widen(int64_t tokens, const Linear<T>& linear, Scratch<T>& own) const {
    linear.multiply(tokens, own.inputs.get(), own.product.get(), [&](const Block& block) {
      block.activate(shape_.activation, own.intermediate.get(), linear.n);
    });
  }

  // As torch.nn.functional.normalize: a vector of nothing stays one.
  static void scale_to_unit_length(float* __restrict vector, int64_t size) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < size; ++j) sum += vector[j] * vector[j];
    const float scale = 1.0f / std::max(std::sqrt(sum), VANISHING_NORM);
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) vector[j] *= scale;
  }

  void pool(const Pass& pass, const Chunk& chunk, const Scratch<T>& own) const {
    const int64_t h = shape_.hidden, tokens = pass.offsets[pass.rows];
    const float* state = own.states.get();
    for (const int64_t row : chunk.rows) {
      const int64_t first = pass.offsets[row];
      const int64_t count = pass.offsets[row + 1] - first;
      for (int64_t mode = 0; mode < pass.modes; ++mode) {
        float* __restrict to = pass.vectors + (row * pass.modes + mode) * h;
        for (int64_t j = 0; j < h; ++j) to[j] = 0.0f;
        for (int64_t t = 0; t < count; ++t) {
          const float weight = pass.pooling ? pass.pooling[mode * tokens + first + t] : 1.0f / static_cast<float>(count);
          if (weight == 0.0f) continue;  // a token that does not count may be anything, NaN too
          const float* __restrict from = state + t * h;
#pragma omp simd
          for (int64_t j = 0; j < h; ++j) to[j] += weight * from[j];
        }
      }
      if (pass.normalize && pass.normalize[row]) scale_to_unit_length(pass.vectors + row * pass.modes * h, pass.modes * h);
      state += count * h;
    }
  }

  const Shape shape_;
  const T* words_;
  const float* positions_;
  Norm embedded_;
  Buffer<T> panels_;  // all linear weights, in the order of their use
  std::vector<Layer<T>> layers_;

  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_;
  std::deque<Job*> jobs_;  // with chunks that nobody has taken, oldest first
  bool ended_ = false;
  int working_ = 0;  // threads that compute
  Scratch<T> lent_;  // to a caller that computes here: one at a time, since another one finds it working
  std::vector<std::thread> threads_;
};

int tell(const char* why, char* message, int64_t room) {
  if (room > 0) {
    std::strncpy(message, why, room - 1);
    message[room - 1] = '\0';
  }
  return 1;
}

}  // namespace

extern "C" {

// 0, 1 (message says why) or 2 (no memory).
int embedserve_create(const Shape* shape, const void* const* tensors, int64_t lanes, int64_t nice, int64_t is_bfloat16,
                      void** made, char* message, int64_t room) try {
  if (is_bfloat16) {
    *made = static_cast<Encoder*>(new EncoderOf<BFloat16>(*shape, tensors, lanes, static_cast<int>(nice)));
  } else {
    *made = static_cast<Encoder*>(new EncoderOf<float>(*shape, tensors, lanes, static_cast<int>(nice)));
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 2;
} catch (const std::exception& error) {
  return tell(error.what(), message, room);
}

int embedserve_run(void* encoder, const Pass* pass, char* message, int64_t room) try {
  static_cast<Encoder*>(encoder)->run(*pass);
  return 0;
} catch (const std::bad_alloc&) {
  return 2;
} catch (const std::exception& error) {
  return tell(error.what(), message, room);
}

void embedserve_destroy(void* encoder) { delete static_cast<Encoder*>(encoder); }

}  // extern "C"
