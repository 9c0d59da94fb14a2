"""One's own hierarchical VAE in a page, with residual_normal and the cells of NVAE.

    python examples/own_hierarchical_vae.py --out samples.png     # a minute or two on two CPU cores

Bottom-up, three features; top-down, a latent group at each resolution, coarsest first. The posterior head of a group emits
changes of its prior's raw parameters, so that zeros mean "as the prior says", at no KL. All the arithmetic between the heads'
convolutions and the loss (squashing, sampling, KL) is nf.residual_normal, one kernel.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import nvae_fast as nf


def cell(channels: int, out_channels: int, stride: int = 1) -> nn.Module:
    return nf.nn.InvertedResidualCell(
        channels, out_channels, expansion=3, kernel_size=5, stride=stride, squeeze_excite=True
    )


class HierarchicalVAE(nn.Module):
    """p(x, z) = p(x | z) p(z_1) p(z_2 | z_1) p(z_3 | z_1, z_2) for gray images of 32x32; z_1 is 4x4, z_3 16x16."""

    groups_per_scale = (1, 1, 1)  # coarsest first; what balanced_kl asks of a model or its configuration

    def __init__(self, width: int = 16, latent: int = 4) -> None:
        super().__init__()
        # At 16x16, 8x8, 4x4 the towers are width, 2 width and 4 width channels wide.
        widths = [width, 2 * width, 4 * width]
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.up = nn.ModuleList(
            [cell(width, width), cell(widths[0], widths[1], 2), cell(widths[1], widths[2], 2)]
        )
        top_down = widths[::-1]
        self.top = nn.Parameter(torch.zeros(1, top_down[0], 4, 4))
        self.prior = nn.ModuleList(
            nn.Conv2d(w, 2 * latent, 1) for w in top_down[1:]
        )  # the first group has none
        self.posterior = nn.ModuleList(nn.Conv2d(2 * w, 2 * latent, 3, padding=1) for w in top_down)
        self.combine = nn.ModuleList(nf.nn.DecoderCombiner(w, latent, w) for w in top_down)
        self.down = nn.ModuleList(cell(w, w // 2, -1) for w in top_down)
        self.image = nn.Conv2d(width // 2, 1, 3, padding=1)
        self.latent = latent

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the pixels (B, 1, 32, 32), and the KL of every group (B, 3) in nats."""
        features = []
        h = self.stem(2 * x - 1)
        for up in self.up:
            h = up(h)
            features.append(h)
        s = self.top.expand(x.shape[0], -1, -1, -1)
        kl = []
        for group, down in enumerate(self.down):
            prior = self.prior[group - 1](s) if group else None
            posterior = self.posterior[group](torch.cat([s, features.pop()], dim=1))
            out = nf.residual_normal(posterior, prior)
            kl.append(out.kl.sum(1))
            s = down(self.combine[group](s, out.z))
        return self.image(s), torch.stack(kl, dim=1)

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0) -> torch.Tensor:
        """Images (n, 1, 32, 32) in [0, 1] from the prior."""
        s = self.top.expand(n, -1, -1, -1)
        for group, down in enumerate(self.down):
            prior = self.prior[group - 1](s) if group else s.new_zeros(n, 2 * self.latent, *s.shape[2:])
            s = down(self.combine[group](s, nf.normal_sample(prior, temperature=temperature)))
        return torch.sigmoid(self.image(s))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="A small hierarchical VAE of one's own on handwritten digits."
    )
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps (default: 1000)")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step (default: 32)")
    parser.add_argument("--width", type=int, default=16, help="channels at 16x16 (default: 16)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the samples (default: 0.8)")
    parser.add_argument(
        "--out", type=Path, default=Path("samples.png"), help="samples (default: samples.png)"
    )
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = HierarchicalVAE(options.width).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adamax(model.parameters(), lr=3e-3)
    loader = nf.data.BatchLoader(nf.data.open_dataset("digits"), options.batch_size, seed=0)
    for step in range(options.steps):
        epoch, batch = divmod(step, len(loader))
        if batch == 0:
            batches = loader.epoch(epoch)
        x = next(batches).to(device, memory_format=torch.channels_last)
        logits, kl = model(x)
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3))
        # The KL counts little at first, and less for a group that holds little yet; else the coarse ones stay unused.
        coefficient = nf.training.kl_coefficient(step, options.steps)
        loss = (reconstruction + nf.training.balanced_kl(kl, coefficient, model)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            groups = ", ".join(f"{value:.1f}" for value in kl.mean(0).tolist())
            bound = (reconstruction + kl.sum(1)).mean().item()
            print(f"step {step + 1}: negative bound {bound:.1f} nats an image, KL of the groups {groups}")
    model.eval()
    nf.data.save_grid(model.sample(64, options.temperature).cpu(), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
