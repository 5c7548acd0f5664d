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
    packages=[
        "modeling_lrsclip",
        "modeling_lrsclip.encoding",
        "modeling_lrsclip.files",
        "modeling_lrsclip.published",
        "geosearch",
    ],
    entry_points={
        "console_scripts": [
            "geosearch = geosearch.__main__:main",
            "lrsclip-convert = modeling_lrsclip.convert:main",
            "lrsclip-evaluate = modeling_lrsclip.commands:evaluate",
            "lrsclip-train = modeling_lrsclip.commands:train",
        ]
    },
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
            "ijson",
            "matplotlib",
            "psutil",
            "pydantic>=2.7",
            "pyyaml",
            "scipy",
            "tensorboard",
            "tqdm",
        ],
        "eval": [
            "accelerate>=1.10",
            "datasets>=4.0",
            "evaluate>=0.4.6",
            "ijson",
            "matplotlib",
            "opencv-python-headless>=4.11",
            "rich",
            "tqdm",
        ],
        # The data set builder (training/lrs2m); it needs train and eval as well.
        "lrs2m": ["datasketch", "filelock", "ijson", "numpy>=2", "openai", "pyogrio", "rasterio>=1.4", "shapely>=2"],
        # Search over georeferenced imagery; `map` adds its page in the browser, `ray` its run on a cluster.
        "geosearch": [
            "accelerate>=1.10",
            "filelock",
            "pyarrow",
            "pyogrio",
            "pyproj",
            "rasterio>=1.4",
            "rich",
            "shapely>=2.1",
            "tqdm",
        ],
        "map": ["gradio>=6"],
        "ray": ["ray>=2.40"],
        "onnx": ["onnx", "onnxruntime", "onnxscript"],
        "dev": [
            "aiohttp>=3.10",
            "duckdb",
            "geopandas",
            "hypothesis",
            "imagehash>=4.3",
            "ipykernel",
            "nbclient",
            "parameterized",
            "peft>=0.21",
            "pytest",
            "pytest-xdist",
            "regex",
            "ruff",
            "selenium>=4.30",
            "sentence-transformers>=6",
            "setuptools>=77",
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
