"""`t5lab convert --explain`: what was recognised in a checkpoint, before anything is converted."""

import dataclasses
import json
import math
from pathlib import Path

import jax

from t5lab import files
from t5lab.data import vocab
from t5lab.decoding import options
from t5lab.errors import DataError, UsageError
from t5lab.models import families
from t5lab.models.families import TransformerConfig
from t5lab.programs import shapes
from t5lab.tools.interop import hf, sentence, t5x
from t5lab.tools.interop.convert import Source


def guess_format(path) -> str:
  """Returns the --from of a path: gguf, t5lab, t5x or hf."""
  path = Path(path)
  if path.suffix == '.gguf':
    return 'gguf'
  if (path / 'checkpoints').is_dir():
    return 't5lab'
  names = ('checkpoint', '_METADATA', 'manifest.ocdbt')
  return 't5x' if path.is_file() or any((path / name).exists() for name in names) else 'hf'


def declared(path) -> list[tuple[str, str]]:
  """Returns what the files of a Hugging Face directory say, whether or not it converts."""
  out, folder = [], sentence.transformer_folder(Path(path))
  for name, keys in (('config.json', ('model_type', 'architectures', 'transformers_version',
                                      'tie_word_embeddings', 'quantization_config')),
                     ('tokenizer_config.json', ('tokenizer_class',)),
                     ('adapter_config.json', ('peft_type', 'base_model_name_or_path'))):
    if not (folder / name).is_file():
      continue
    settings = files.read_json(folder / name, limit=64 << 20)
    out += [(name, f'{key} = {json.dumps(settings[key])[:200]}') for key in keys if key in settings]
  return out


def lines(source: Source) -> list[tuple[str, str]]:
  """Returns (what, text) pairs about an opened source."""
  c, e = source.model, source.config.eval
  sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.abstract_params(c))]
  out = [('architecture', _architecture(c)), ('row', _row(c)),
         ('parameters', f'{sum(sizes):,} in {len(sizes)} arrays'),
         ('attention', _attention(c)), ('embeddings', _embeddings(c)), ('heads', _heads(c, e))]
  out.append(('tokenizer', _tokenizer(source)))
  if c.dec_layers:
    out.append(('generation', _generation(source)))
  else:
    out.append(('pooling', c.pool))
  out += [('note', note) for note in source.notes]
  return out + _destinations(c)


def _architecture(c: TransformerConfig) -> str:
  stacks = [f'{layers} {name} layers' for name, layers in (('encoder', c.enc_layers),
                                                              ('decoder', c.dec_layers)) if layers]
  norm = {'rms': 'RMSNorm', 'layer': 'LayerNorm'}[c.norm]
  place = 'after' if c.post_norm else 'around' if c.sandwich_norm else 'before'
  kind = 'encoder-decoder' if c.kind == 'encoder_decoder' else f'{c.kind}-only'
  return (f'{kind}, {" and ".join(stacks)}, width {c.d_model}, feed-forward '
          f'{c.d_ff} ({" × ".join(c.acts)}), {norm} {place} each sublayer')


def _attention(c: TransformerConfig) -> str:
  heads = f'{c.n_heads} heads of {c.d_head}'
  if c.kv_heads != c.n_heads:
    heads += f', {c.kv_heads} for keys and values'
  positions = {
      'relative': f'relative positions in {c.rel_buckets} buckets'
                  + ', a table in every layer' * c.per_layer_bias,
      'learned': f'{c.max_length} learned positions', 'sinusoid': f'{c.sinusoids} sinusoids',
      'rope': f'rotary positions, theta {c.rope_theta:g}'}[c.positions]
  if c.rope_scaling:
    positions += f', {c.rope_type} scaling {c.rope_scaling}'
  extras = [name for name, has in (
      (f'window of {c.window} in {sum(c.window_pattern)} of {len(c.window_pattern)} layers',
       c.window), ('norms on queries and keys', c.qk_norm),
      (f'scores capped at {c.attn_softcap:g}', c.attn_softcap),
      (f'{c.enc_attention} encoder', c.enc_attention != 'full')) if has]
  return ', '.join([heads, positions, *extras])


def _embeddings(c: TransformerConfig) -> str:
  tables = 'one table' if c.shared_embedding else 'a table for each stack'
  if not (c.dec_layers or c.mlm_head):
    return f'{tables} of {c.vocab_size:,} rows'
  head = 'the softmax matrix is the embedding' if c.tied else 'the softmax matrix is separate'
  if c.tied and c.scale_logits and c.dec_layers:
    head += ', its input scaled by 1 / sqrt(D)'
  return f'{tables} of {c.vocab_size:,} rows; {head}'


def _heads(c: TransformerConfig, e) -> str:
  heads = ['language model'] * (c.dec_layers > 0) + ['masked tokens'] * c.mlm_head + [
      'pooler'] * c.pooler + ['next sentence'] * c.nsp
  if c.classes:
    names = f' ({", ".join(e.labels)})' if e.labels else ''
    of = {'input': 'whole inputs', 'token': 'tokens', 'span': 'the ends of an answer'}[c.class_of]
    heads.append(f'classifier of {of}: {c.classes} classes{names}'
                 + (f', {e.problem_type}' if e.problem_type else ''))
  return ', '.join(heads) or 'none'


def _tokenizer(source: Source) -> str:
  spec = source.config.data.vocab
  if not spec:
    return 'none was found; generation from texts needs data.vocab'
  try:
    v = vocab.load(spec)
  except DataError as e:
    return f'unreadable: {e}'
  special = ', '.join(f'{role} {i}' for role, i in (
      ('pad', v.pad_id), ('eos', v.eos_id), ('unk', v.unk_id), ('bos', v.bos_id)) if i is not None)
  chat = ', a chat template' if v.chat_template else ''
  return f'{spec}: {v.size:,} ids with {v.num_sentinels} sentinels; {special}{chat}'


def _generation(source: Source) -> str:
  e, defaults = source.config.eval, options.defaults()
  changed = [f'{name}={e[name]!r}' for name in defaults if e[name] != defaults[name]]
  return f'start {source.model.start_id}, end {source.model.eos_id}' + ''.join(
      f', {text}' for text in changed)


def _row(c: TransformerConfig) -> str:
  """Returns the rows of families.py with these sizes, or else those of this kind."""
  free = hf.FREE | {'vocab_size'}
  formula = lambda other: [value for name, value in dataclasses.asdict(other).items()
                           if name not in free]
  same = [name for name in families.ROWS
          if formula(TransformerConfig(**families.row(name))) == formula(c)]
  return ', '.join(same) if same else 'none has these sizes'


def _destinations(c: TransformerConfig) -> list[tuple[str, str]]:
  out = []
  try:
    out.append(('writes to', f'hf, as {hf.format_for(c).config(c)["architectures"][0]}'))
  except UsageError as e:
    out.append(('does not write to', f'hf: {e}'))
  try:
    t5x.tensor_rows(c, scanned=False)
    out.append(('writes to', 't5x'))
  except UsageError as e:
    out.append(('does not write to', f't5x: {e}'))
  return out
