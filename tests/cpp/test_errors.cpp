// Wrong arguments of every operator are refused in a sentence that names the operator and the value.
#include "catch.h"
#include "support.h"

namespace qtale::test {
namespace {

// Valid arguments of all operators for a weight [4, 64] in two groups; each case spoils one of them.
struct Arguments {
  std::vector<float> floats = std::vector<float>(1024, 1.0f);
  std::vector<std::int8_t> bytes = std::vector<std::int8_t>(1024);
  std::vector<std::int32_t> words = std::vector<std::int32_t>(1024);
  std::vector<std::uint8_t> buffer = prepacked(weight_of());
  TensorView weight = TensorView::matrix(floats.data(), DType::f32, 4, 64);
  TensorView out = weight;
  TensorView codes = TensorView::matrix(bytes.data(), DType::s8, 4, 64);
  TensorView scale = TensorView::matrix(floats.data() + 512, DType::f32, 4, 2);
  TensorView zero = TensorView::matrix(bytes.data() + 512, DType::s8, 4, 2);
  TensorView packed = TensorView::matrix(words.data(), DType::s32, 4, 8);
  TensorView prepack_buffer = view(buffer);
  TensorView x = TensorView::matrix(floats.data(), DType::f32, 3, 64);
  TensorView y = TensorView::matrix(floats.data() + 512, DType::f32, 3, 4);
  TensorView bias = TensorView::vector(floats.data() + 600, DType::f32, 4);
  TensorView values = TensorView::matrix(floats.data() + 700, DType::f32, 3, 2);
  TensorView indices = TensorView::matrix(words.data() + 64, DType::s32, 3, 2);
  TensorView left = TensorView::matrix(words.data(), DType::s32, 3, 5);
  TensorView right = TensorView::matrix(words.data(), DType::s32, 3, 4);
  std::vector<double> doubles = std::vector<double>(16);
  TensorView shares = TensorView::vector(doubles.data(), DType::f64, 3);
  int bits = 4;

  static Weight weight_of() {
    Random random(71);
    return random_weight(random, {4, 64, 2, 4, false, DType::f32});
  }
};

using Op = void (*)(Arguments&);
void call_quantize(Arguments& a) { quantize(a.weight, a.bits, a.codes, a.scale, &a.zero); }
void call_dequantize(Arguments& a) { dequantize(a.codes, a.scale, &a.zero, a.out); }
void call_fake_quantize(Arguments& a) { fake_quantize(a.weight, a.scale, &a.zero, a.bits, a.out); }
void call_pack(Arguments& a) { pack(a.codes, a.bits, a.packed); }
void call_unpack(Arguments& a) { unpack(a.packed, a.bits, a.codes); }
void call_prepack(Arguments& a) { prepack(a.codes, a.scale, &a.zero, a.bits, a.prepack_buffer); }
void call_unprepack(Arguments& a) { unprepack(a.prepack_buffer, a.codes, a.scale, &a.zero); }
void call_qmatmul(Arguments& a) { qmatmul(a.x, a.prepack_buffer, &a.bias, a.y, Compute::int8); }

void call_project_topk(Arguments& a) { project_topk(a.x, a.weight, a.values, a.indices); }
void call_jaccard(Arguments& a) { jaccard(a.left, a.right, a.shares); }

struct NamedOp {
  const char* name;
  Op call;
  std::vector<TensorView Arguments::*> tensors;
};
using A = Arguments;
const NamedOp kOps[] = {
    {"quantize", call_quantize, {&A::weight, &A::codes, &A::scale, &A::zero}},
    {"dequantize", call_dequantize, {&A::codes, &A::scale, &A::zero, &A::out}},
    {"fake_quantize", call_fake_quantize, {&A::weight, &A::scale, &A::zero, &A::out}},
    {"pack", call_pack, {&A::codes, &A::packed}},
    {"unpack", call_unpack, {&A::codes, &A::packed}},
    {"prepack", call_prepack, {&A::codes, &A::scale, &A::zero, &A::prepack_buffer}},
    {"unprepack", call_unprepack, {&A::codes, &A::scale, &A::zero}},
    {"qmatmul", call_qmatmul, {&A::x, &A::bias, &A::y}},
    {"project_topk", call_project_topk, {&A::x, &A::weight, &A::values, &A::indices}},
    {"jaccard", call_jaccard, {&A::shares}},
};

// The refusal after one change; it has to be a sentence that begins with the operator.
template <class Change>
void expect_refusal(const NamedOp& op, Change&& change, const std::string& part) {
  Arguments arguments;
  change(arguments);
  const std::string message = input_error_of([&] { op.call(arguments); });
  INFO(op.name << ": " << message);
  CHECK(message.find(std::string(op.name) + ":") == 0);
  CHECK((!message.empty() && message.back() == '.'));
  CHECK(message.find(part) != std::string::npos);
}

}  // namespace

TEST_CASE("errors: the arguments that every case spoils are valid") {
  for (const NamedOp& op : kOps) {
    Arguments arguments;
    INFO(op.name);
    CHECK(input_error_of([&] { op.call(arguments); }) == "");
  }
}

TEST_CASE("errors: every tensor of every operator has a dtype, a shape, a layout and a device") {
  for (const NamedOp& op : kOps) {
    for (const auto tensor : op.tensors) {
      expect_refusal(op, [&](A& a) { (a.*tensor).dtype = DType::s64; }, "int64");
      expect_refusal(op, [&](A& a) { (a.*tensor).device = {DeviceType::cuda, 0}; }, "CUDA");
      expect_refusal(op, [&](A& a) { (a.*tensor).rank = 3, (a.*tensor).shape[2] = 1; }, "shape");
      expect_refusal(op, [&](A& a) { (a.*tensor).strides[(a.*tensor).rank - 1] = 2; }, "contiguous");
      expect_refusal(op, [&](A& a) { (a.*tensor).shape[(a.*tensor).rank - 1] += 1; }, "");
      if (tensor != &A::weight && tensor != &A::x && op.name != std::string("pack") && op.name != std::string("unpack"))
        expect_refusal(op, [&](A& a) { (a.*tensor).shape[0] += 1; }, "");
    }
  }
}

TEST_CASE("errors: bit widths are 2, 3, 4 and 8") {
  for (const NamedOp& op : kOps) {
    const std::string name = op.name;
    if (name == "dequantize" || name == "unprepack" || name == "qmatmul" || name == "project_topk" || name == "jaccard")
      continue;
    for (const int bits : {-1, 0, 1, 5, 6, 7, 9, 16, 64}) {
      expect_refusal(op, [&](A& a) { a.bits = bits; }, "num_bits " + std::to_string(bits));
      expect_refusal(op, [&](A& a) { a.bits = bits; }, "2, 3, 4 or 8");
    }
  }
}

TEST_CASE("errors: groups divide the inputs and prepack wants multiples of 32") {
  const auto three_groups = [](A& a) { a.scale = a.zero = TensorView::matrix(a.floats.data(), DType::f32, 4, 3); };
  for (const NamedOp& op : {kOps[0], kOps[1], kOps[2], kOps[5]}) expect_refusal(op, three_groups, "dividing 64");
  const auto groups_of_16 = [](A& a) {
    a.scale = TensorView::matrix(a.floats.data(), DType::f32, 4, 4);
    a.zero = TensorView::matrix(a.bytes.data(), DType::s8, 4, 4);
  };
  expect_refusal(kOps[5], groups_of_16, "multiple of 32");
}

TEST_CASE("errors: values that no code stands for are refused") {
  const auto code_of_100 = [](A& a) { a.bytes[77] = 100; };
  expect_refusal(kOps[3], code_of_100, "100");
  expect_refusal(kOps[5], code_of_100, "100");
  expect_refusal(kOps[5], [](A& a) { a.bytes[512 + 3] = -128; }, "zero point -128 does not fit");
}

TEST_CASE("errors: weights that are not finite name their row") {
  expect_refusal(kOps[0], [](A& a) { a.floats[2 * 64 + 5] = INFINITY; }, "row 2");
  expect_refusal(kOps[0], [](A& a) { a.floats[63] = NAN; }, "row 0");
}

TEST_CASE("errors: project_topk and jaccard want shapes that go together") {
  expect_refusal(
      kOps[8], [](A& a) { a.values.shape[1] = a.indices.shape[1] = 5; }, "k is 5, but the matrix has 4 rows");
  expect_refusal(kOps[8], [](A& a) { a.values.shape[1] = a.indices.shape[1] = 0; }, "k is 0");
  expect_refusal(kOps[8], [](A& a) { a.x.shape[1] = 32; }, "x has 32 features, the matrix 64");
  expect_refusal(kOps[8], [](A& a) { a.x.dtype = DType::f16; }, "x is float16; expected float32");
  for (const auto tensor : {&A::left, &A::right}) {
    expect_refusal(kOps[9], [&](A& a) { (a.*tensor).dtype = DType::s64; }, "int64; expected int32");
    expect_refusal(kOps[9], [&](A& a) { (a.*tensor).strides[1] = 2; }, "contiguous");
    expect_refusal(kOps[9], [&](A& a) { (a.*tensor).device = {DeviceType::cuda, 0}; }, "CUDA");
    expect_refusal(kOps[9], [&](A& a) { (a.*tensor).shape[0] = 2; }, "rows");
    expect_refusal(kOps[9], [&](A& a) { (a.*tensor).rank = 1; }, "shape");
  }
}

TEST_CASE("errors: unprepack and qmatmul say what the buffer holds") {
  expect_refusal(kOps[7], [](A& a) { a.x.shape[1] = 32; }, "32 features; the weight takes 64");
  Arguments arguments;
  const std::string message =
      input_error_of([&] { unprepack(arguments.prepack_buffer, arguments.codes, arguments.scale, nullptr); });
  CHECK(message.find("unprepack: the weight is asymmetric") == 0);
}

}  // namespace qtale::test
