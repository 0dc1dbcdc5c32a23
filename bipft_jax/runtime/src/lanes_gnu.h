// Sixteen floats as four vectors of the compiler's own vector type: SSE, NEON and others.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));

struct Lanes {
  Floats4 v[4];
};

inline Lanes load(const float* x) {
  Lanes r;
  std::memcpy(&r, x, 64);
  return r;
}
inline void store(float* x, const Lanes& a) { std::memcpy(x, &a, 64); }
inline Lanes all(float x) {
  Lanes r;
  for (int i = 0; i < 4; i++) r.v[i] = Floats4{x, x, x, x};
  return r;
}
inline Lanes operator+(const Lanes& a, const Lanes& b) {
  Lanes r;
  for (int i = 0; i < 4; i++) r.v[i] = a.v[i] + b.v[i];
  return r;
}
inline Lanes operator-(const Lanes& a, const Lanes& b) {
  Lanes r;
  for (int i = 0; i < 4; i++) r.v[i] = a.v[i] - b.v[i];
  return r;
}
inline Lanes operator*(const Lanes& a, const Lanes& b) {
  Lanes r;
  for (int i = 0; i < 4; i++) r.v[i] = a.v[i] * b.v[i];
  return r;
}
inline Lanes largest(const Lanes& a, const Lanes& b) {
  Lanes r;
  for (int i = 0; i < 4; i++) r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return r;
}
inline Lanes of_int16(const int16_t* x) {
  Lanes r;
  for (int i = 0; i < 4; i++)
    r.v[i] = __builtin_convertvector((Ints4{x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]}),
                                     Floats4);
  return r;
}
inline unsigned bits_of(Ints4 mask) {
  const Ints4 b = mask & Ints4{1, 2, 4, 8};
  return (unsigned)(b[0] | b[1] | b[2] | b[3]);
}
inline unsigned above(const Lanes& a, const Lanes& b) {
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= bits_of(a.v[i] > b.v[i]) << (4 * i);
  return r;
}
inline unsigned different(const Lanes& a, const Lanes& b) {
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= bits_of(a.v[i] != b.v[i]) << (4 * i);
  return r;
}
// Of all lanes: first lanes i and i + 8, then i and i + 4, i + 2, i + 1. The same in every set.
inline float sum_of(const Lanes& a) {
  const Floats4 four = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
inline float largest_of(const Lanes& a) {
  float value = a.v[0][0];
  for (int i = 1; i < 16; i++) value = a.v[i / 4][i % 4] > value ? a.v[i / 4][i % 4] : value;
  return value;
}
// x where a > b, else 0.
inline Lanes where_above(const Lanes& a, const Lanes& b, const Lanes& x) {
  Lanes r;
  for (int i = 0; i < 4; i++) r.v[i] = (Floats4)((Ints4)x.v[i] & (a.v[i] > b.v[i]));
  return r;
}
// x * 2^n, with n the lowest bits of the number `raised`.
inline Lanes times_power(const Lanes& x, const Lanes& raised) {
  Lanes r;
  for (int i = 0; i < 4; i++) r.v[i] = (Floats4)((Ints4)x.v[i] + ((Ints4)raised.v[i] << 23));
  return r;
}

}  // namespace
