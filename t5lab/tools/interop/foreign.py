"""A Hugging Face directory as it is found, made into one of transformers' own form.

The steps, each in its module: names without wrappers, a model type, weights multiplied by their
scales, an adapter merged, tables of the vocabulary as the tensors have them.
"""

from collections.abc import Mapping
from pathlib import Path

from t5lab.tools.interop import adapters, came_with, hf, quantised, recognise, tensor_files
from t5lab.tools.interop.tensor_map import TensorReader


def read(path, config: Mapping, *, adapter: adapters.Adapter | None = None,
         allow_pickle: bool = False) -> tuple[dict, TensorReader, list[str]]:
  """Returns config.json as the tensors of `path` say, these tensors, and notes on what was changed.

  The names of the tensors are transformers', but may lack the name of the model below the head
  (Format.canonical adds it). adapter: is merged. UsageError for what cannot be read for certain.
  """
  stored = recognise.unwrap(tensor_files.open_hf(path, allow_pickle=allow_pickle))
  notes = recognise.prefix_notes(stored)
  reader, scale_notes = quantised.dequantised(stored, config)
  config, type_notes = recognise.with_model_type(config, reader.shapes(), hf.FORMATS)
  adapter_notes = []
  if adapter:
    reader, adapter_notes = adapter.merge(reader, config, allow_pickle=allow_pickle)
  config, reader, table_notes = recognise.with_tables(config, reader)
  return config, reader, notes + scale_notes + type_notes + adapter_notes + table_notes


def tokenizer_folder(path: Path, adapter: adapters.Adapter | None) -> Path:
  """Returns the directory of the tokenizer: the adapter's if it has a vocabulary."""
  if adapter and any((adapter.path / name).is_file() for name in came_with.VOCABULARIES):
    return adapter.path
  return path
