"""The proof that goes with converted weights: ours and a reference on the same inputs.

The reference is Hugging Face's implementation where [parity] is installed; elsewhere the golden
vectors of golden.py, which hold for this code and this machine, and the bit-equal round trip, which
holds for these weights. Which one it was stands in certificate.json.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import platform

import jax
import numpy as np

from t5lab import __version__, trees
from t5lab.decoding.engine import Decoding, Engine
from t5lab.errors import UsageError
from t5lab.models.cache import decoding
from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.tools.interop import golden

TOLERANCE = 1e-4       # of the largest difference of logits, relative to the largest logit
LENGTH = 12            # tokens of the random inputs
GREEDY = 8             # tokens generated
NAME = 'certificate.json'


@dataclasses.dataclass(frozen=True)
class Outputs:
  """logits: float[positions, V] that are not padding; tokens: int[rows, GREEDY] or None."""
  logits: np.ndarray
  tokens: np.ndarray | None
  gaps: np.ndarray | None = None     # [rows, GREEDY], best minus second logit, of the reference


def features(c: TransformerConfig) -> dict[str, np.ndarray]:
  """Two rows of random ids, the second encoder input shorter, the same for every run."""
  stream = np.random.RandomState(2026)
  ids = np.array([i for i in range(min(c.vocab_size, 1 << 20)) if i != c.pad_id])
  draw = lambda: ids[stream.randint(0, len(ids), (2, LENGTH))].astype(np.int32)
  out = {}
  if c.enc_layers:
    out['encoder_input_tokens'] = draw()
    out['encoder_input_tokens'][1, LENGTH - 3:] = c.pad_id
    if c.types:
      second = np.arange(LENGTH) >= LENGTH // 2
      out['encoder_token_types'] = np.tile(second, (2, 1)).astype(np.int32)
  if c.dec_layers:
    out['decoder_input_tokens'] = draw()
    out['decoder_input_tokens'][:, 0] = c.start_id
  return out


def _real(c, batch, logits):
  """The positions that are not padding: implementations differ on the others, and may."""
  if c.kind == 'encoder' and not c.classes:
    return logits[batch['encoder_input_tokens'] != c.pad_id]
  return logits.reshape(-1, logits.shape[-1])


def of_reference(c: TransformerConfig, reference) -> Outputs:
  """Teacher-forced logits, and greedy decoding by whole forward passes: no cache, no shortcut."""
  batch = features(c)
  logits = _real(c, batch, np.asarray(reference.logits(batch), np.float32))
  if not c.dec_layers:
    return Outputs(logits, None)
  tokens = batch['decoder_input_tokens'] if c.kind == 'decoder' else (
      np.full((2, 1), c.start_id, np.int32))
  gaps, first = [], tokens.shape[1]
  for _ in range(GREEDY):
    last = reference.logits({**batch, 'decoder_input_tokens': tokens})[:, -1]
    best = np.sort(last, axis=-1)[:, -2:]
    gaps.append(best[:, 1] - best[:, 0])
    tokens = np.concatenate([tokens, last.argmax(-1).astype(np.int32)[:, None]], axis=1)
  return Outputs(logits, tokens[:, first:], np.stack(gaps, axis=1))


def of_ours(c: TransformerConfig, params) -> Outputs:
  """The same of our model in float32, greedy decoding through the engine and its cache."""
  c = dataclasses.replace(c, dtype='float32')
  batch, model = features(c), Transformer(c)
  headless = c.kind == 'encoder' and not (c.mlm_head or c.classes)
  # aligned numpy arrays become jax's without a copy: jnp.asarray would make one
  params = jax.tree.map(lambda x: jax.device_put(x, may_alias=True), params)
  with jax.default_matmul_precision('highest'):
    run = jax.jit(model.apply, static_argnames='method')
    logits = run({'params': params}, batch, method='hidden' if headless else '__call__')
    logits = _real(c, batch, np.asarray(logits))
    if not c.dec_layers:
      return Outputs(logits, None)
    alone = c.kind == 'decoder'
    start, step, prefill = decoding(c)
    engine = Engine(start, step, prefill if alone else None, eos=-1,
                    begin=None if alone else c.start_id, batch_size=2)
    rows = batch['decoder_input_tokens' if alone else 'encoder_input_tokens']
    asked = [row if alone else row[row != c.pad_id] for row in rows]
    return Outputs(logits, engine.generate(params, asked, Decoding(length=GREEDY)))


def compare(ours: Outputs, theirs: Outputs, what: str) -> dict:
  """What the certificate says of two outputs; UsageError if they are not the same model's."""
  scale = float(np.abs(theirs.logits).max())
  off = float(np.abs(ours.logits - theirs.logits).max()) / max(scale, 1e-30)
  if not off <= TOLERANCE:
    raise UsageError(f'not written: logits differ from those of {what} by {off:.1e} of the '
                     f'largest, the limit is {TOLERANCE:.0e}')
  report = {'positions': len(ours.logits), 'largest_relative_difference': off,
            'tolerance': TOLERANCE}
  if theirs.tokens is None:
    return {'logits': report, 'greedy': None}
  compared = 0
  for mine, other, gaps in zip(ours.tokens, theirs.tokens, theirs.gaps):
    for a, b, gap in zip(mine, other, gaps):
      if a != b and gap > 2 * TOLERANCE * scale:
        raise UsageError(f'not written: greedy decoding gives {mine.tolist()}, that of {what} '
                         f'{other.tolist()}')
      if a != b:
        break                # a tie within the tolerance: what follows is another text
      compared += 1
  return {'logits': report, 'greedy': {'tokens': int(theirs.tokens.size), 'equal': compared}}


def golden_vectors(c: TransformerConfig) -> dict:
  """What the certificate says of this code's golden vectors; UsageError if they do not hold."""
  name = golden.name_of(c)
  if name is None:
    raise UsageError(f'no golden vectors for a {c.kind.replace("_", "-")} like this: install '
                     "t5lab[parity] to certify against Hugging Face's own code")
  off = golden.difference(name)
  if not off <= TOLERANCE:
    raise UsageError(f'not written: the golden vectors of {name} differ by {off:.1e}, the limit is '
                     f'{TOLERANCE:.0e}; this installation computes something else')
  return {'architecture': name, 'largest_relative_difference': off, 'tolerance': TOLERANCE}


def digest(params) -> str:
  """SHA-256 of all parameters, by path, as float32 bytes."""
  found = hashlib.sha256()
  for path, x in sorted(trees.flatten(params).items()):
    found.update(f'{path} {x.shape}'.encode())
    found.update(np.ascontiguousarray(np.asarray(x, np.float32)).reshape(-1).view(np.uint8).data)
  return found.hexdigest()


def write(path, body: Mapping) -> dict:
  body = {**body, 'versions': {'t5lab': __version__, 'jax': jax.__version__,
                               'numpy': np.__version__, 'python': platform.python_version()}}
  with open(path, 'w', encoding='utf-8') as f:
    json.dump(body, f, indent=1)
    f.write('\n')
  return body
