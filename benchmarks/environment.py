"""Where the numbers come from."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import kx_kernels as kx
from kx_kernels.__main__ import environment as package_environment

ROOT = Path(__file__).parent.parent


def _output(command: list[str]) -> str | None:
    """None where there is no such command, or it fails."""
    where: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "LC_ALL": "C"}}
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, **where).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*command: str) -> str | None:
    return _output(["git", *command])


@functools.cache
def commit() -> str | None:
    return _git("rev-parse", "--short", "HEAD")


def own_version() -> str:
    return f"kx_kernels {kx.__version__}" + (f" ({commit()})" if commit() else "")


@functools.cache
def _cpu() -> dict[str, str]:
    """What lscpu knows: name, cores, caches, clocks."""
    lines = (_output(["lscpu"]) or "").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _bytes(text: str) -> int:
    """32 MiB (1 instance) -> 33554432"""
    match = re.match(r"\s*([\d.]+)\s*([KMG])iB", text)
    return int(float(match.group(1)) * 1024 ** (" KMG".index(match.group(2)))) if match else 0


def cache_bytes(device: str) -> int:
    """The last-level cache of the device, as far as it tells."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    cpu = _cpu()
    return max(_bytes(cpu.get(name, "")) for name in ("L3 cache", "L2 cache")) or 32 << 20


def multiplies_bfloat16(device: str) -> bool:
    """Whether there are instructions for it; a CPU without them converts to float32."""
    return device == "cuda" or bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", _cpu().get("Flags", "")))


def free_bytes(device: str) -> int:
    """Of the memory that tensors are in."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def clocks(device: str) -> dict[str, float | None]:
    """Megahertz as the run begins, of the median core, and at most, as far as the device tells."""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits"]
        now, most = ([*re.findall(r"[\d.]+", _output(query) or ""), None, None])[:2]
    else:
        found = re.findall(r"cpu MHz\s*:\s*([\d.]+)", _output(["cat", "/proc/cpuinfo"]) or "")
        now, most = statistics.median(map(float, found)) if found else None, _cpu().get("CPU max MHz")
    return {name: None if mhz is None else float(mhz) for name, mhz in (("now", now), ("most", most))}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = _cpu()
    name = cpu.get("Model name", "").strip() or platform.processor() or platform.machine()
    widest = torch.backends.cpu.get_cpu_capability().replace("DEFAULT", "portable").replace("_", "-")  # AVX2, AVX512
    return f"{name}, {torch.get_num_threads()} threads, {widest}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: str) -> dict[str, Any]:
    """JSON-ready facts about the machine and the software."""
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/report.png")
    facts: dict[str, Any] = dict(package_environment())
    facts |= {
        "device": device_name(device),
        "device_kind": device,
        "commit": commit(),
        "uncommitted_changes": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "clocks_mhz": clocks(device),
        "last_level_cache_bytes": cache_bytes(device),
        "kx_kernels": kx.__version__,
        "executable": f"{platform.python_implementation()} {sys.version.split()[0]}",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu_memory_bytes"] = properties.total_memory
        facts["multiprocessors"] = properties.multi_processor_count
    return facts
