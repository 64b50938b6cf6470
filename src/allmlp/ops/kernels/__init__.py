"""The fused forms of operators, as Triton kernels behind custom operators of torch."""
