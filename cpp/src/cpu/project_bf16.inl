// Products of numbers rounded to bfloat16 on AVX-512 BF16.
#include <cstring>

#include "cpu/project.inl"
#include "cpu/vec_avx512_bf16.h"

namespace qtale::cpu::projection {
namespace {

// Two numbers that follow one another in the depth, rounded to bf16.
struct PairLane {
  static constexpr std::int64_t kNumbers = 2;
  template <class E>
  QTALE_INLINE static VecF load(const typename E::T* p) {
    if constexpr (std::is_same_v<E, Bf16>) return load_f32(reinterpret_cast<const float*>(p));
    return reinterpret_cast<VecF>(_mm512_cvtne2ps_pbh(E::load(p + kWidth), E::load(p)));
  }
  QTALE_INLINE static void accumulate(VecF& sum, VecF a, VecF b) {
    accumulate_pairs(sum, reinterpret_cast<Pairs>(a), reinterpret_cast<Pairs>(b));
  }
};

// Entries [begin, end) as rows of bf16.
inline void round_rows(const RoundArgs& a, std::int64_t begin, std::int64_t end) {
  with_type(a.matrix.dtype, [&](auto element) {
    using E = decltype(element);
    constexpr std::int64_t kLine = PairLane::kNumbers * kWidth;
    for (std::int64_t e = begin; e < end; ++e) {
      const auto* from = static_cast<const typename E::T*>(a.matrix.data) + e * a.matrix.stride;
      std::uint16_t* to = a.out + e * a.depth;
      for (std::int64_t i = 0; i < a.depth; i += kLine) {
        const std::int64_t count = min64(kLine, a.depth - i);
        const VecF line = count == kLine ? PairLane::load<E>(from + i)
                                         : load_lanes<PairLane, E>(from + i, count / PairLane::kNumbers);
        std::memcpy(to + i, &line, static_cast<std::size_t>(count) * sizeof(*to));
      }
    }
  });
}

constexpr ProjectKernel bf16_kernel = [] {
  ProjectKernel pairs = kernel<12, 2, PairLane>;
  pairs.round = round_rows;
  return pairs;
}();

}  // namespace
}  // namespace qtale::cpu::projection
