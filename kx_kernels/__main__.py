"""`python -m kx_kernels`: what this machine has, and which backend serves each operator."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from tabulate import tabulate

import kx_kernels as kx

from ._core import native
from ._core.spec import all_specs


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> list[tuple[str, str]]:
    """What decides which kernels run here, as (name, value) rows."""
    extension = native.load()
    if extension is None:
        built = "not built"
    else:
        cuda = extension.cuda_architectures
        built = f"CPU ({extension.cpu_isa}), " + (f"CUDA ({cuda})" if extension.has_cuda else "no CUDA")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        ("kx_kernels", kx.__version__),
        ("extension", built),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("platform", platform.platform()),
        ("threads", str(torch.get_num_threads())),
        ("GPU", ", ".join(gpus) or "none"),
    ]


def main() -> None:
    print(tabulate(environment(), tablefmt="plain"))
    for spec in all_specs():
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            call = spec.call(spec.example, torch.float32, device)
            print(f"\n{spec.name} on {device}\n{kx.explain(spec.function, **call)}")


if __name__ == "__main__":
    main()
