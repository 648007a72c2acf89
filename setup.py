"""Builds the extension through CMake and ninja; everything else about the package is in pyproject.toml.

Environment: KX_NATIVE=auto|on|off (off installs the Python package alone), KX_CUDA=auto|on|off, KX_EMULATION=on to
build the emulation of the CUDA kernels as well, KX_CUDA_ARCHITECTURES="80;90a-real", KX_CPU_ISAS="avx2;avx512".
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def switch(name, default):
    value = os.environ.get(name, default).lower()
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"{name} is {value!r}; expected auto, on or off")
    return value


class CMakeBuild(build_ext):
    """One CMake run serves every extension module."""

    def run(self):
        import pybind11

        destination = Path(self.get_ext_fullpath("kx_kernels._C")).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        destination.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            str(Path(__file__).resolve().parent),
            "-B",
            str(build),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DKX_CUDA={switch('KX_CUDA', 'auto').upper()}",
            f"-DKX_EMULATION={switch('KX_EMULATION', 'off').upper()}",
        ]
        lists = [name for name in ("KX_CUDA_ARCHITECTURES", "KX_CPU_ISAS") if name in os.environ]
        configure += [f"-D{name}={os.environ[name]}" for name in lists]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)

    def get_outputs(self):
        return [self.get_ext_fullpath(extension.name) for extension in self.extensions]


def modules():
    native = switch("KX_NATIVE", "auto")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if native == "off" or (native == "auto" and compiler is None):
        reason = "KX_NATIVE=off" if native == "off" else "no C++ compiler was found"
        print(f"kx_kernels: {reason}; installing without compiled kernels, the PyTorch reference and Triton remain")
        return []
    names = ["kx_kernels._C"]
    if switch("KX_EMULATION", "off") == "on":
        names.append("kx_kernels._emulation")
    return [Extension(name, sources=[]) for name in names]


setup(ext_modules=modules(), cmdclass={"build_ext": CMakeBuild})
