"""Operations that families compute their kernels with."""

CONTRACTIONS = {"einsum", "matmul", "bmm", "mm", "tensordot", "rmatmul"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
DIFFERENCES = {"sub", "isub", "rsub", "neg"}
NORMS = {"normalize", "norm", "vector_norm", "linalg_vector_norm", "linalg_norm", "rsqrt", "sqrt"}
SUMS = {"add", "iadd", "radd"}
