"""Packages, dependencies (from requirements/pins.txt) and entry points; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup


def read_requirements(name: str) -> list[str]:
    lines = (Path(__file__).parent / "requirements" / name).read_text().splitlines()
    return [stripped for line in lines if (stripped := line.split("#")[0].strip())]


setup(
    name="megatron-hapo",
    version="0.1.0",
    description="Entropy-controlled reinforcement learning (HAPO) of language models on Megatron-Core and SGLang",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.12,<3.13",
    packages=find_packages(include=["megatron_hapo*", "sglang_ext*"]),
    package_data={"megatron_hapo.observe.view": ["assets/*"]},
    install_requires=read_requirements("pins.txt"),
    extras_require={
        "dev": read_requirements("dev.txt"),
        "te": ["transformer-engine[pytorch]==2.20.2"],  # resolves with the pinned torch; build without isolation
        "wandb": ["wandb"],
    },
    entry_points={
        "console_scripts": ["megatron-hapo = megatron_hapo.cli:main"],
        # SGLang loads this in its main process and in every scheduler process.
        "sglang.srt.plugins": ["megatron_hapo = sglang_ext.plugin:register"],
    },
)
