// Products of numbers rounded to bfloat16 on AVX-512 BF16.
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

}  // namespace
}  // namespace qtale::cpu::projection
