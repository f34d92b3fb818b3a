// Instruction sets and what the environment says about them.
#include <algorithm>
#include <cstdlib>

#include "catch.h"
#include "qtale/error.h"
#include "support.h"

namespace qtale::test {

TEST_CASE("isa: reference and generic are always there, and the best one is the default") {
  const auto names = cpu_isas();
  REQUIRE(names.size() >= 2);
  CHECK(names[0] == "reference");
  CHECK(names[1] == "generic");
  CHECK(names.size() == cpu::available_tables().size());
  if (std::getenv("QTALE_CPU_ISA") == nullptr) CHECK(cpu_isa() == names.back());
}

TEST_CASE("isa: switching takes the names of the list and refuses others with them") {
  const std::string before = cpu_isa();
  for (const std::string& name : cpu_isas()) {
    const IsaScope scope(name);
    CHECK(cpu_isa() == name);
  }
  CHECK(cpu_isa() == before);
  const std::string message = input_error_of([] { set_cpu_isa("sse9"); });
  CHECK(message.find("'sse9'") != std::string::npos);
  CHECK(message.find("generic") != std::string::npos);
  CHECK(cpu_isa() == before);
}

TEST_CASE("isa: a weight packed for other panels is refused") {
  for (const cpu::KernelTable* from : cpu::available_tables())
    for (const cpu::KernelTable* to : cpu::available_tables()) {
      Random random(61);
      const IsaScope packing(from->name);
      auto buffer = prepacked(random_weight(random, {3, 32, 1, 4, true, DType::f32}));
      const IsaScope running(to->name);
      const Floats x(DType::f32, 32), y(DType::f32, 3);
      const std::string message =
          input_error_of([&] { qmatmul(x.matrix(1, 32), view(buffer), nullptr, y.matrix(1, 3), Compute::int8); });
      INFO(from->name << " to " << to->name << ": " << message);
      CHECK((message.find("prepack") != std::string::npos) == (from->panel_rows != to->panel_rows));
    }
}

// Run by ctest in processes of their own, one per setting.
TEST_CASE("environment: settings are taken or refused in a sentence", "[.environment][environment]") {
  if (const char* isa = std::getenv("QTALE_CPU_ISA")) {
    const auto names = cpu_isas();
    if (std::find(names.begin(), names.end(), isa) != names.end()) {
      CHECK(cpu_isa() == isa);
    } else {
      CHECK(input_error_of([] { cpu_isa(); }).find("QTALE_CPU_ISA: '" + std::string(isa) + "'") == 0);
    }
  }
  if (const char* threads = std::getenv("QTALE_NUM_THREADS")) {
    if (std::atoi(threads) > 0) {
      CHECK(num_threads() == std::atoi(threads));
    } else {
      CHECK(input_error_of([] { num_threads(); }).find("QTALE_NUM_THREADS: '" + std::string(threads) + "'") == 0);
    }
  }
  CHECK((std::getenv("QTALE_CPU_ISA") != nullptr || std::getenv("QTALE_NUM_THREADS") != nullptr));
}

}  // namespace qtale::test
