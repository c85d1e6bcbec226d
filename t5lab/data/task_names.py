"""The name of every task and mixture of ours: a typo is told before TensorFlow is imported."""

import pathlib

NAMES = tuple((pathlib.Path(__file__).parent / 'files' / 'task_names.txt').read_text().split())
