"""Run by .ci/run outside the checkout: the installed package imports, has its C++ kernels, and rotates."""

import torch

import kx_kernels as kx

cos, sin = kx.rope_tables(8, 4)
q = torch.randn(1, 8, 2, 4)
outs = [kx.rope(q, None, cos, sin, backend=backend) for backend in ("cpu", "reference")]
torch.testing.assert_close(*outs)
assert not torch.equal(outs[0], q)
print(kx.explain(kx.rope, q, None, cos, sin))
