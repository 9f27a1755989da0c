"""Kernels to measure, one topic a file: `cases(device)` makes each case when it is asked for."""
