"""How fast? Native CPU functions (C++, no torch headers), each beside its torch reference.

fused     what training a small model walks over most: norm, gated activation, cross-entropy
build     compiles the C++ once, on first use; where that cannot be, torch does the work
"""
