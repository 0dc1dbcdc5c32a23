// The code of an activation as a comparison of the integer that it follows from.
#pragma once

#include <cstdint>

#include "buffer.h"
#include "kernels.h"

namespace bipft {

enum class Activation { kNone, kGelu, kRelu };

// One comparison for each output of a linear.
class Thresholds {
 public:
  Thresholds() = default;
  explicit Thresholds(int outputs);

  // Output n is coded as the sign of f(dot * scale + bias) + shift, or, if is_unsigned, as 1 where
  // that exceeds `limit` and 0 elsewhere; dot is an integer from -inputs to inputs. Decided in
  // float64, but that GELU is 0 where it underflows in float32.
  void set(int n, int inputs, double scale, double bias, Activation f, double shift,
           bool is_unsigned, double limit);

  ThresholdRows rows() const {
    return {above_.data(), below_.data(), minus_from_.data(), minus_to_.data()};
  }
  bool zeros() const { return zeros_; }  // whether some dot gives code 0

 private:
  Buffer<int16_t> above_, below_, minus_from_, minus_to_;
  bool zeros_ = false;
};

}  // namespace bipft
