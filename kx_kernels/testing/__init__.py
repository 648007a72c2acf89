"""What the package's tests are made of, for those who test kernels of their own or on another GPU.

budget: the one tolerance. poison: memory that shows what was not written. emulation: CUDA kernels on the CPU.
codegen: what the compilers made of the kernels. metering: what a Triton kernel moves.
"""
