#include "thresholds.h"

#include <cmath>

namespace bipft {
namespace {

constexpr double kGeluLowest = -0.7517915246935645;  // where GELU is smallest: it falls, then rises
constexpr double kGeluUnderflow = (float)-5.26;          // below, float32 GELU is 0 (NumpyEncoder)

double gelu(double y) {
  return y < kGeluUnderflow ? 0.0 : 0.5 * y * std::erfc(-y * 0.70710678118654752440);
}

// The first integer of [from, to) at which `is` holds, to if there is none; `is` never ends once
// it has begun.
template <class Predicate>
int first_where(int from, int to, const Predicate& is) {
  while (from < to) {
    const int middle = from + (to - from) / 2;
    if (is(middle))
      to = middle;
    else
      from = middle + 1;
  }
  return from;
}

}  // namespace

Thresholds::Thresholds(int outputs)
    : above_(padded(outputs)),
      below_(padded(outputs)),
      minus_from_(padded(outputs)),
      minus_to_(padded(outputs)) {
  for (int n = 0; n < padded(outputs); n++) {  // code 0, which the padding keeps
    above_[n] = minus_from_[n] = INT16_MAX;
    below_[n] = minus_to_[n] = INT16_MIN;
  }
}

void Thresholds::set(int n, int inputs, double scale, double bias, Activation f, double shift,
                     bool is_unsigned, double limit) {
  const auto linear = [&](int dot) { return dot * scale + bias; };
  const auto value = [&](int dot) {
    const double y = linear(dot);
    if (f == Activation::kGelu) return gelu(y) + shift;
    return (f == Activation::kRelu && y < 0 ? 0.0 : y) + shift;
  };
  const double least = is_unsigned ? limit : 0.0;
  const auto plus = [&](int dot) { return value(dot) > least; };
  const auto minus = [&](int dot) { return !is_unsigned && value(dot) < 0; };
  const int end = inputs + 1;
  // Below `turn`, values fall as the dot rises (GELU's left branch); from it on, they rise.
  int turn = -inputs;
  if (f == Activation::kGelu)
    turn = first_where(-inputs, end, [&](int dot) { return linear(dot) > kGeluLowest; });
  const int below = first_where(-inputs, turn, [&](int dot) { return !plus(dot); });
  const int above = first_where(turn, end, plus) - 1;
  // Most often no dot gives 0: the interval between is -1, without a second search.
  int minus_from = below, minus_to = above;
  if (below < turn && !minus(below)) minus_from = first_where(below, turn, minus);
  if (above >= turn && !minus(above))
    minus_to = first_where(turn, above + 1, [&](int dot) { return !minus(dot); }) - 1;
  if (minus_from != below || minus_to != above) zeros_ = true;
  above_[n] = (int16_t)above;
  below_[n] = (int16_t)(below == -inputs ? INT16_MIN : below);
  minus_from_[n] = (int16_t)minus_from;
  minus_to_[n] = (int16_t)minus_to;
}

}  // namespace bipft
