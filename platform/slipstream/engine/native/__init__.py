"""Kernels of our own for processors: C++ with portable vectors, built at first start by the machine's compiler.

They are optional. Without a compiler the engine runs on torch's own operations, slower.
"""
