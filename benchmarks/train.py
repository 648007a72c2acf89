"""Trains the small models of `benchmarks.models` and keeps their weights, and how the training went, beside it.

`python -m benchmarks.train [NAME ...]`. About 10 minutes each on one core; those that copy a few.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator

import safetensors.torch
import torch
from tqdm import tqdm

import kx_kernels as kx

from . import models
from .environment import environment

STEPS, BATCH, RATE, WARMUP = 1000, 16, 3e-3, 100


def texts(
    config: models.Config, held_out: bool, size: int, length: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """What a model reads, [size, length] bytes at a time; or what it copies, as long as that is."""
    source = models.text(held_out)
    while True:
        yield models.copies(size, generator) if config.copies else models.batch(source, size, length, generator)


def held_out_loss(model: models.Model, length: int = models.CONTEXT, batches: int = 16) -> float:
    """Nats per byte on text the model has not seen; the same bytes for every model."""
    generator = torch.Generator().manual_seed(1)
    drawn = texts(model.config, True, 8, length, generator)
    with torch.no_grad():
        losses = [models.loss(model, next(drawn), generator).item() for _ in range(batches)]
    return sum(losses) / batches


def train(name: str, steps: int) -> dict:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = models.Model((models.MODELS | models.COPYING)[name])
    drawn = texts(model.config, False, BATCH, models.CONTEXT, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    curve, begun, recent = [], time.time(), 0.0
    with tqdm(range(steps), desc=name, dynamic_ncols=True) as progress:
        for step in progress:
            rate = RATE * min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            found = models.loss(model, next(drawn), generator)
            optimizer.zero_grad()
            found.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            recent += found.item()
            if (step + 1) % 50 == 0:
                curve.append(
                    {"step": step + 1, "loss": round(recent / 50, 4), "seconds": round(time.time() - begun, 1)}
                )
                progress.set_postfix(loss=curve[-1]["loss"])
                recent = 0.0
    models.WEIGHTS.mkdir(exist_ok=True)
    weights = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    safetensors.torch.save_file(weights, models.WEIGHTS / f"{name}.safetensors")
    kept = models.load(name)
    losses = {"ours": held_out_loss(kept)}
    with kx.backend("reference"):
        losses["reference"] = held_out_loss(kept)
    return {
        "name": name, "steps": steps, "batch": BATCH, "context": models.CONTEXT, "held_out": losses, "curve": curve,
        "parameters": sum(p.numel() for p in model.parameters()), "environment": environment("cpu"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*models.MODELS, *models.COPYING, []], help="all of them")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    for name in options.names or (*models.MODELS, *models.COPYING):
        log = train(name, options.steps)
        (models.WEIGHTS / f"{name}.json").write_text(json.dumps(log, indent=1) + "\n")
        print(f"{name}: {log['parameters']:,} parameters, {log['held_out']['ours']:.3f} nats per byte held out")


if __name__ == "__main__":
    main()
