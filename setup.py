from pathlib import Path

from setuptools import setup


setup(
    name="lrsclip",
    version="0.1.0",
    description="LRSCLIP for the HuggingFace ecosystem: a CLIP for remote sensing that reads 248 text tokens",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # The rooms training/, evaluation/ and model_cards/ are run from a clone: a global package named "training" helps nobody.
    packages=["modeling_lrsclip"],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "transformers>=5.17,<5.24",
        "huggingface_hub",
        "safetensors",
        "tokenizers",
        "numpy",
        "pillow",
        "ftfy",
    ],
    extras_require={
        "train": [
            "accelerate>=1.10",
            "datasets>=4.0",
            "matplotlib",
            "psutil",
            "pydantic>=2.7",
            "pyyaml",
            "tensorboard",
            "tqdm",
        ],
        "eval": [
            "accelerate>=1.10",
            "datasets>=4.0",
            "evaluate>=0.4.6",
            "matplotlib",
            "opencv-python-headless>=4.11",
            "rich",
            "tqdm",
        ],
        # The data set builder (training/lrs2m); it needs train and eval as well.
        "lrs2m": ["aiohttp>=3.10", "filelock", "numpy>=2", "pyshp>=3"],
        "dev": [
            "aiohttp>=3.10",
            "imagehash>=4.3",
            "parameterized",
            "peft>=0.21",
            "pyshp>=3",
            "pytest",
            "pytest-xdist",
            "regex",
            "ruff",
            "setuptools>=77",
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
