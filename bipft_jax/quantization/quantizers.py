"""The table of quantizers: every function of this project from float arrays to few-bit codes.

========================  ==========================  =======================  ====================
quantizer (paper)         q(x) = codes * scale        dq/dx, dq/dscale          scale
========================  ==========================  =======================  ====================
`MeanBinarizer`           sgn(x - mean(x)) * m        1; no gradient to m       m = mean|x|, of the
(BWN, XNOR-Net; BiT;      codes in {-1, 0, 1}                                   tensor, of a row or
BitNet b1)                                                                      of a group
`TernaryMean`             clip(rnd(x/m), -1, 1) * m   1; no gradient to m       m = mean|x|, of the
(BitNet b1.58)                                                                  tensor or of a group
`AbsMax`                  a * clip(rnd(x/a), -Qp-1,   1; no gradient to a       a = max|x| / Qp, of
(BitNet)                  Qp); shifted: z = x - min x                           a token, a group of
                          instead of x, and + min x                             features, the tensor
`ElasticSigned`           b=1: a * sgn(x)             1[Qn <= x/a <= Qp];       learned a; starts at
(BiT eq. 5-7; LSQ)        b>1: a * clip(rnd(x/a),     see `pullback`            2 mean|x| /
                          Qn, Qp)                                               sqrt(max(Qp, 1))
`ElasticUnsigned`         b=1: a * 1[x > a/2]         1[0 <= z/a <= Qp];        learned a; starts at
(BiT eq. 5-7; LSQ)        b>1: a * clip(rnd(z/a),     see `pullback`            4 mean|x| / sqrt(Qp)
                          0, Qp) + min x,
                          z = x - min x
`RowBinarizer`            sgn(x - c) * m,             t - mean of t over the   m = mean|x| and
(BiBERT sec. 3)           codes in {-1, 0, 1}         row, t = 1[|x - c| <=    c = mean(x), of a row
                                                      1]; no gradient to m
`SignBinarizer`           sgn(x)                      1[|x| <= 1] or           1
(BiBERT)                                              1[|x| < 1]
`StepBinarizer`           1[x > 0]                    1[|x| < 1]               1
(BiBERT, "bool")
========================  ==========================  =======================  ====================

`b` is the number of bits, Qn..Qp the integer range. sgn(0) = 0, rnd rounds half to even. The
gradient of a learned scale is multiplied by 1 / sqrt(N * Qp), N the number of elements of x (of the
*global* array under `jax.jit`). A learned scale at or below `SMALLEST_SCALE` acts as
`SMALLEST_SCALE`. SPEC sections 1.1 to 1.4 and 4.1 give the same in the references' terms.

"BitNet SPEC" means the section of BitNet's mathematics. A group is an index of an axis into which
a caller has split an axis of the array: in a tensor-parallel layer every device holds whole groups,
so that it needs no other device's statistics.

A quantizer is a frozen dataclass (hashable: it can be a static argument) with `learned_scale` and
`has_offset` (whether its values can have an offset) and these methods:
`encode` (forward); for the backward pass `residual` (the array to keep), `restore` (from it, the
codes) and `pullback` (the straight-through rule: from the cotangent g of the values and `inner`,
the sum of g * codes, to the cotangents of x and scale); `initial_scale` if its scale is learned;
`lookup` if it quantises embedding tables. `None` instead of a quantizer means "not quantised".
"""

from __future__ import annotations

from bipft_jax.quantization.binarizers import (
    MeanBinarizer,
    RowBinarizer,
    SignBinarizer,
    StepBinarizer,
)
from bipft_jax.quantization.bitnet import AbsMax, TernaryMean
from bipft_jax.quantization.elastic import ElasticSigned, ElasticUnsigned

Quantizer = (
    MeanBinarizer
    | TernaryMean
    | AbsMax
    | ElasticSigned
    | ElasticUnsigned
    | RowBinarizer
    | SignBinarizer
    | StepBinarizer
)
