"""What is known of ONNX's operators, in one place: each is of one kind, and rules are sets of kinds.

An operator that is of no kind here is treated with the least trust: it keeps no rows apart, it is not moved, and it
costs one operation for each element it writes. `UNKNOWN` lists those of the ONNX opset for which that is meant.
"""

from __future__ import annotations

from typing import Final

# -- Kinds. An element of the result comes from the elements in its place, after broadcasting. ---
ARITHMETIC: Final = frozenset((
    "Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Where", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual",
))  # fmt: skip
FUNCTIONS: Final = frozenset((
    "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp", "Gelu", "HardSwish",
    "Log", "Mish", "Pow", "Selu", "Sigmoid", "Sin", "Sinh", "Softplus", "Sqrt", "Swish", "Tan", "Tanh",
))  # fmt: skip
SIMPLE: Final = frozenset((
    "Abs", "And", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "Ceil", "Clip", "Floor",
    "HardSigmoid", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Mean", "Neg", "Not", "Or", "PRelu", "Reciprocal", "Relu",
    "Round", "Shrink", "Sign", "Softsign", "Sum", "ThresholdedRelu", "Xor",
))  # fmt: skip
# The same numbers in the same order, under another shape; the same numbers elsewhere.
VIEWS: Final = frozenset(("Flatten", "Reshape", "Squeeze", "Unsqueeze"))
MOVES: Final = frozenset((
    "Concat", "DepthToSpace", "Dropout", "Expand", "Gather", "GatherElements", "GatherND", "Pad", "ReverseSequence",
    "Slice", "SpaceToDepth", "Split", "Tile", "Transpose", "Trilu",
))  # fmt: skip
# Along one axis, or from it on to the last; of each sample, in evaluation mode; over some axes.
ALONG_AXIS: Final = frozenset((
    "Hardmax", "LayerNormalization", "LogSoftmax", "LpNormalization", "RMSNormalization", "Softmax",
))  # fmt: skip
PER_SAMPLE: Final = frozenset(("BatchNormalization", "GroupNormalization", "InstanceNormalization"))
REDUCTIONS: Final = frozenset((
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
))  # fmt: skip
CHOICES: Final = frozenset(("ArgMax", "ArgMin", "NonZero", "TopK", "Unique"))
PRODUCTS: Final = frozenset(("Einsum", "Gemm", "MatMul"))
RECURRENT: Final = frozenset(("GRU", "LSTM", "RNN"))
RANDOM: Final = frozenset((
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
))  # fmt: skip
SIZES: Final = frozenset(("Shape", "Size"))
MAKERS: Final = frozenset(("Constant", "ConstantOfShape", "EyeLike", "OneHot", "Range"))
RUNNING: Final = frozenset(("CumProd", "CumSum"))
CONTROL: Final = frozenset(("If", "Loop", "Scan"))

KINDS: Final = {
    "arithmetic": ARITHMETIC, "function": FUNCTIONS, "simple": SIMPLE, "view": VIEWS, "move": MOVES,
    "along axis": ALONG_AXIS, "per sample": PER_SAMPLE, "reduction": REDUCTIONS, "choice": CHOICES,
    "product": PRODUCTS, "recurrent": RECURRENT, "random": RANDOM, "size": SIZES, "maker": MAKERS, "running": RUNNING,
    "control": CONTROL,
}  # fmt: skip

# -- Rules, as sets of kinds. --------------------------------------------------------------
ELEMENTWISE: Final = ARITHMETIC | FUNCTIONS | SIMPLE
# Exponentials and squares: their range, not their rounding, is what float16 lacks.
WIDE_RANGE: Final = frozenset((
    "Exp", "Log", "LogSoftmax", "Pow", "ReduceL2", "ReduceLogSumExp", "ReduceSumSquare", "Resize", "Softmax",
))  # fmt: skip
# What goes on in float32 when an operand is float32.
SPREADS_FLOAT32: Final = ARITHMETIC | VIEWS | {
    "Abs", "Cast", "Ceil", "Clip", "Concat", "Cos", "CumSum", "Expand", "Floor", "Gather", "Identity", "Neg",
    "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Round", "Sin", "Slice", "Sqrt", "Transpose",
}  # fmt: skip
# What may lie between the last matrix product and an output.
HEAD: Final = VIEWS | {
    "Add", "Clip", "Concat", "Div", "Identity", "LogSoftmax", "Mul", "Neg", "Sigmoid", "Slice", "Softmax", "Split",
    "Sub", "Tanh", "Transpose",
}  # fmt: skip
# What hands on its first input's numbers, in another shape or type, scaled or masked.
CARRIES_A_MASK: Final = VIEWS | {
    "Add", "Cast", "CastLike", "Clip", "Div", "Dropout", "Expand", "Identity", "Mul", "Slice", "Sub", "Tile",
    "Transpose", "Where",
}  # fmt: skip
# Floating-point operations for each element written. Whole views cost 1, so that a shorter graph wins a tie; what is
# not listed costs 1 for each element, which is also the price of moving it.
COSTS_NOTHING: Final = VIEWS | SIZES | {"Identity", "Constant"}
OPERATIONS_PER_OUTPUT: Final = dict.fromkeys(
    FUNCTIONS | PER_SAMPLE | (ALONG_AXIS - {"Hardmax"}) | {"MeanVarianceNormalization", "RotaryEmbedding"}, 8
)
# For each element read.
OPERATIONS_PER_INPUT: Final = {**dict.fromkeys(REDUCTIONS | CHOICES, 1), "TopK": 8, "Unique": 8}

# Of no kind on purpose: images, audio, strings, sequences, quantized products and what no ranker was seen to use.
UNKNOWN: Final = frozenset((
    "AffineGrid", "Attention", "AveragePool", "BitCast", "BlackmanWindow", "CastLike", "CausalConvWithState",
    "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "Conv", "ConvInteger", "ConvTranspose", "DFT",
    "DeformConv", "DequantizeLinear", "Det", "DynamicQuantizeLinear", "GlobalAveragePool", "GlobalLpPool",
    "GlobalMaxPool", "GridSample", "HammingWindow", "HannWindow", "ImageDecoder", "LRN", "LinearAttention", "LpPool",
    "MatMulInteger", "MaxPool", "MaxRoiPool", "MaxUnpool", "MeanVarianceNormalization", "MelWeightMatrix",
    "NegativeLogLikelihoodLoss", "NonMaxSuppression", "Optional", "OptionalGetElement", "OptionalHasElement",
    "QLinearConv", "QLinearMatMul", "QuantizeLinear", "RegexFullMatch", "Resize", "RoiAlign", "RotaryEmbedding", "STFT",
    "ScatterElements", "ScatterND", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
    "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat",
    "StringNormalizer", "StringSplit", "SwiGLU", "TensorScatter", "TfIdfVectorizer",
))  # fmt: skip
