"""Triton kernels, one file per op family, installed as t2ct.kernels; they import only torch and triton."""
