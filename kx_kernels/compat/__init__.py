"""Drop-ins: modules with the names, signatures and conventions of other libraries, over the operators of this package.

They translate arguments and results and hold no mathematics of their own. Import the one that is needed:
`from kx_kernels.compat import fla`.
"""
