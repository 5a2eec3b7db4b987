"""`python llama_q4.py FROM TO`, in llama.cpp's environment: the same model as Q4_0, whose rows llama.cpp repacks for the
processor; measured half again as fast as the Q4_1 that the model comes in."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as ll

Q4_0 = 2  # LLAMA_FTYPE_MOSTLY_Q4_0

if __name__ == "__main__":
    options = ll.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = Q4_0, True
    sys.exit(ll.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
