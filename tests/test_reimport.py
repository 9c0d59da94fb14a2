"""A second import after the modules were removed from ``sys.modules``, as some test runners and notebooks do."""

from __future__ import annotations

import subprocess
import sys

from processes import environment

TWICE = """
import importlib, sys, torch
import nvae_fast as nf

def use(nf):
    posterior = torch.ones(1, 4, 2, 2, requires_grad=True)
    out = nf.residual_normal(posterior, seed=3)
    (out.z.sum() + out.kl.sum()).backward()
    model = nf.NVAE(nf.NVAEConfig(dataset="digits", num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=1))
    torch.nn.init.ones_(model.top_feature)
    return [out.z, out.kl, posterior.grad, nf.freeze(model).sample(1, seed=0).shape], nf.backends()

first = use(nf)
old = nf
for removed in ("nvae_fast", "nvae_fast.nn"):
    for name in [n for n in sys.modules if n == "nvae_fast" or n.startswith(removed)]:
        del sys.modules[name]
    import nvae_fast as nf
    assert nf is not old
    if removed == "nvae_fast":
        ops, distributed = nf.ops, nf.distributed
    for module in (nf, old):
        values, backends = use(module)
        assert backends == first[1]
        assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(values, first[0])), values
importlib.reload(nf)
try:
    importlib.reload(ops.philox)
except RuntimeError as error:
    assert "nvae_fast::philox_normal is defined already" in str(error), error
else:
    raise AssertionError("philox was defined twice")
print(ops.__name__, distributed.__name__)
"""


def test_a_second_import_uses_the_operators_there_are() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["nvae_fast.ops", "nvae_fast.distributed"]
