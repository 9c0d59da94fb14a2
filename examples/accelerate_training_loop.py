"""A training loop whose model does not use nvae_fast, and the one line that makes it faster.

    python examples/accelerate_training_loop.py                # trains on handwritten digits, with the line
    python examples/accelerate_training_loop.py --plain        # without it

Replace the model below by yours. It is plain PyTorch: inverted residual blocks with batch norm and SiLU, as in MobileNet, timm,
torchvision and NVAE. The documentation of nf.accelerate lists which parts are recognised by structure and which by class name.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

import nvae_fast as nf


class Block(nn.Module):
    """x + expand, depthwise convolution, project."""

    def __init__(self, channels: int, expansion: int = 6) -> None:
        super().__init__()
        hidden = channels * expansion
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class VAE(nn.Module):
    """An ordinary variational autoencoder for 32x32 images: one latent map of 8x8."""

    def __init__(self, channels: int, latent: int, blocks: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, 4, stride=4),
            *(Block(channels) for _ in range(blocks)),
            nn.Conv2d(channels, 2 * latent, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, channels, 1),
            *(Block(channels) for _ in range(blocks)),
            nn.ConvTranspose2d(channels, 1, 4, stride=4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The negative evidence bound of every image, (B,) in nats."""
        mu, log_sigma = self.encoder(x).chunk(2, dim=1)
        z = mu + torch.exp(log_sigma) * torch.randn_like(mu)
        kl = 0.5 * (mu**2 + torch.exp(2 * log_sigma) - 1) - log_sigma
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none")
        return reconstruction.sum((1, 2, 3)) + kl.sum((1, 2, 3))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="An existing training loop with nf.accelerate.")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: 200)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step (default: 64)")
    parser.add_argument("--channels", type=int, default=64, help="width of the model (default: 64)")
    parser.add_argument("--blocks", type=int, default=3, help="blocks in each half (default: 3)")
    parser.add_argument("--plain", action="store_true", help="leave the model as it is")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = VAE(options.channels, latent=8, blocks=options.blocks).to(
        device, memory_format=torch.channels_last
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if not options.plain:
        nf.accelerate(model)  # parameters, state_dict, optimizer and loop stay as they are
        print(nf.acceleration_report(model))

    loader = nf.data.BatchLoader(nf.data.open_dataset("digits"), options.batch_size, seed=0)
    step, start = 0, time.perf_counter()
    while step < options.steps:
        for x in loader.epoch(step // len(loader)):
            loss = model(x.to(device, memory_format=torch.channels_last)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 50 == 0 or step == options.steps:
                pace = (time.perf_counter() - start) / step
                print(f"step {step}: {loss.item():.1f} nats an image, {1000 * pace:.1f} ms a step")
            if step == options.steps:
                break
    nf.restore(model)  # the model as it was, for whoever gets it next


if __name__ == "__main__":
    main()
