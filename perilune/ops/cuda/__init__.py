"""CUDA C++ kernels, compiled at their first launch: the same way of launching them for every op."""

from perilune.ops.cuda.launch import Argument, CudaKernel, cuda_obstacle

__all__ = ["Argument", "CudaKernel", "cuda_obstacle"]
