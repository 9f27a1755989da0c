"""Triton and Gluon kernels: one operation a file, its reference of the same name in benthic.numerics.reference."""
