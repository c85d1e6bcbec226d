"""pip install .  |  pip install -c constraints/py311.txt '.[test]'  |  pip install '.[tpu]'

Lower bounds are the versions that the test suite runs with (constraints/ pins all of them, one file
for each Python); upper bounds are the next release in which a project may break its users.
"""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+?)'", (HERE / 't5lab/__init__.py').read_text()).group(1)

setup(
    name='t5lab',
    version=VERSION,
    description='T5, GPT, LLaMA and BERT in JAX: train, evaluate, convert, use.',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11,<3.14',
    packages=find_packages(include=['t5lab', 't5lab.*']),
    package_data={'t5lab.data': ['files/*'], 't5lab.tools.planning': ['prices.json']},
    entry_points={'console_scripts': ['t5lab = t5lab.cli:main']},
    install_requires=[
        # jax 0.11 dropped Python 3.11, and a flax release works with few jax releases.
        "jax>=0.10.2,<0.11; python_version < '3.12'",
        "flax>=0.12.8,<0.13; python_version < '3.12'",
        "jax>=0.12,<0.13; python_version >= '3.12'",
        "flax>=0.12.12,<0.13; python_version >= '3.12'",
        'optax>=0.2.8,<0.3',
        'orbax-checkpoint>=0.12.8,<0.13',
        'numpy>=2.4,<3',
        'ml-collections>=1.1,<2',
        'grain>=0.2.18,<0.3',
        'seqio>=0.0.20,<0.1',
        'tensorflow>=2.21,<2.22',            # seqio's; it never sees an accelerator
        'tensorflow-text>=2.21,<2.22',
        'tensorflow-datasets>=4.9.10,<5',
        'importlib_resources>=6',            # tensorflow-datasets uses it and does not ask for it
        'sentencepiece>=0.2.1,<0.3',
        'sacrebleu>=2.6,<3',
        'rouge-score>=0.1.2,<0.2',
        'rich>=14,<16',
        'tensorboardX>=2.6.4,<3',
        'tokenizers>=0.22,<0.24',
        'gguf>=0.17,<1',
        'jinja2>=3.1.6,<4',                  # chat templates, in its sandbox
        'array-record>=0.8.6,<0.9',          # caches of tokens
        'pyarrow>=26,<27',                   # Parquet, Arrow, zstd
        'fsspec>=2026.9',                    # files that are not local
    ],
    extras_require={
        'tpu': ['jax[tpu]'],
        'cuda': ['jax[cuda12]'],
        # Hugging Face's own code, the reference of `t5lab convert`. Plain torch would bring CUDA.
        'parity': ['torch==2.13.0', 'transformers>=5.20,<6', 'safetensors>=0.6,<1'],
        'gcs': ['gcsfs>=2026.9'],            # gs:// files
        'data': ['datasketch>=2,<3', 'py3langid>=0.4,<0.5'],   # `t5lab data dedup` and `clean`
        'plots': ['matplotlib>=3.10,<4'],    # the page of `t5lab inspect`
        'notebook': ['ipykernel>=6,<8', 'matplotlib>=3.10,<4'],
        'test': ['pytest>=9,<10', 'pytest-xdist>=3.8,<4', 'ruff>=0.17,<0.18',
                 'ty>=0.0.108,<0.0.109',
                 'nbclient>=0.10,<0.12', 'nbformat>=5.10,<6', 'ipykernel>=6,<8',
                 'datasketch>=2,<3', 'py3langid>=0.4,<0.5', 'jsonschema>=4.26,<5',
                 'matplotlib>=3.10,<4'],
    },
)
