"""The proof that accompanies converted weights: our model and a reference on the same inputs.

Where [parity] is installed the reference is Hugging Face's implementation. Elsewhere it is the
golden vectors of golden.py, which verify this code on this machine, together with the bit-equal
round trip, which verifies these weights. certificate.json records which of the two it was.
"""

import dataclasses
import hashlib
import re

import jax
import numpy as np

from t5lab import trees
from t5lab.decoding.engine import Engine
from t5lab.decoding.options import Decoding
from t5lab.errors import UsageError
from t5lab.models.cache import decoding
from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.tools.interop import golden, tensor_map
from t5lab.tools.interop.tensor_map import TensorReader

TOLERANCE = 1e-4       # of the largest difference of logits, relative to the largest logit
LENGTH = 12            # tokens of the random inputs
GREEDY = 8             # tokens generated
NAME = 'certificate.json'


@dataclasses.dataclass(frozen=True)
class Outputs:
  """Outputs of a model on `features`; tokens and gaps are None for an encoder."""
  logits: np.ndarray                 # float[positions, V], without padding
  tokens: np.ndarray | None          # int[2, GREEDY], decoded greedily
  gaps: np.ndarray | None = None     # float[2, GREEDY], best minus second logit, of a reference


def features(c: TransformerConfig) -> dict[str, np.ndarray]:
  """Returns two rows of random ids, the second encoder input shorter; the same in every run."""
  stream = np.random.RandomState(2026)
  ids = np.array([i for i in range(min(c.vocab_size, 1 << 20)) if i != c.pad_id])
  draw = lambda: ids[stream.randint(0, len(ids), (2, LENGTH))].astype(np.int32)
  batch = {}
  if c.enc_layers:
    batch['encoder_input_tokens'] = draw()
    batch['encoder_input_tokens'][1, LENGTH - 3:] = c.pad_id
    if c.types > 1:
      types = np.arange(LENGTH) >= LENGTH // 2
      batch['encoder_token_types'] = np.tile(types, (2, 1)).astype(np.int32)
  if c.dec_layers:
    batch['decoder_input_tokens'] = draw()
    batch['decoder_input_tokens'][:, 0] = c.start_id
  return batch


def _drop_padding(c, batch, logits):
  """Returns the logits at real positions; at padding, implementations may differ."""
  if c.kind == 'encoder' and not (c.classes and c.class_of == 'input'):
    return logits[batch['encoder_input_tokens'] != c.pad_id]
  return logits.reshape(-1, logits.shape[-1])


def reference_outputs(c: TransformerConfig, reference) -> Outputs:
  """Runs a Reference: teacher-forced logits, and greedy decoding by whole forward passes."""
  batch = features(c)
  logits = _drop_padding(c, batch, np.asarray(reference.logits(batch), np.float32))
  if not c.dec_layers:
    return Outputs(logits, None)
  start = np.full((2, 1), c.start_id, np.int32)
  tokens = batch['decoder_input_tokens'] if c.kind == 'decoder' else start
  gaps, prompt = [], tokens.shape[1]
  for _ in range(GREEDY):
    last = reference.logits({**batch, 'decoder_input_tokens': tokens})[:, -1]
    best = np.sort(last, axis=-1)[:, -2:]
    gaps.append(best[:, 1] - best[:, 0])
    tokens = np.concatenate([tokens, last.argmax(-1).astype(np.int32)[:, None]], axis=1)
  return Outputs(logits, tokens[:, prompt:], np.stack(gaps, axis=1))


def model_outputs(c: TransformerConfig, params) -> Outputs:
  """Runs our model in float32; greedy decoding uses the engine and its cache."""
  c = dataclasses.replace(c, dtype='float32')
  batch, model = features(c), Transformer(c)
  headless = c.kind == 'encoder' and not (c.mlm_head or c.classes)
  # jax uses aligned numpy arrays without a copy; jnp.asarray would make one.
  params = jax.tree.map(lambda x: jax.device_put(x, may_alias=True), params)
  with jax.default_matmul_precision('highest'):
    run = jax.jit(model.apply, static_argnames='method')
    logits = run({'params': params}, batch, method='hidden' if headless else '__call__')
    logits = _drop_padding(c, batch, np.asarray(logits))
    if not c.dec_layers:
      return Outputs(logits, None)
    start, step, prefill = decoding(c)
    if c.kind == 'decoder':
      engine = Engine(start, step, prefill, eos=-1, start_id=None, batch_size=2)
      requests = list(batch['decoder_input_tokens'])
    else:
      engine = Engine(start, step, None, eos=-1, start_id=c.start_id, batch_size=2)
      requests = [row[row != c.pad_id] for row in batch['encoder_input_tokens']]
    return Outputs(logits, engine.generate(params, requests, Decoding(length=GREEDY)))


def compare(ours: Outputs, reference: Outputs, name: str) -> dict:
  """Returns the certificate's entries on two outputs; UsageError if the models differ.

  name: of the reference, for messages.
  """
  scale = float(np.abs(reference.logits).max())
  difference = float(np.abs(ours.logits - reference.logits).max()) / max(scale, 1e-30)
  if not difference <= TOLERANCE:          # also for NaN
    raise UsageError(f'not written: logits differ from those of {name} by {difference:.1e} of the '
                     f'largest, the limit is {TOLERANCE:.0e}')
  logits = {'positions': len(ours.logits), 'largest_relative_difference': difference,
            'tolerance': TOLERANCE}
  if reference.tokens is None:
    return {'logits': logits, 'greedy': None}
  equal = 0
  for our_row, their_row, gaps in zip(ours.tokens, reference.tokens, reference.gaps):
    first = int(np.append(our_row == their_row, False).argmin())     # difference, or the end
    # After a tie within the tolerance the texts may differ.
    if first < len(gaps) and gaps[first] > 2 * TOLERANCE * scale:
      raise UsageError(f'not written: greedy decoding gives {our_row.tolist()}, that of {name} '
                       f'{their_row.tolist()}')
    equal += first
  return {'logits': logits, 'greedy': {'tokens': int(reference.tokens.size), 'equal': equal}}


# Our arrays that are tables of embeddings, and heads; the rest are the layers of the stacks.
TABLES = r'(target_)?embedding|(encoder|decoder)/(positions|types)'
HEADS = r'(logits|classifier|pooler|nsp|mlm_dense|mlm_norm)/.*|logit_bias'


def tensor_entries(rows, reader: TensorReader) -> dict:
  """Returns the certificate's entries on the tensors of a source.

  bit_equal: the names of the embedding tables and of the heads, and the number of other tensors
  that are compared. copies: {name: [name of the original, where the copy is]}. ignored: names.
  """
  names, others = {'embeddings': [], 'heads': []}, 0
  for name, its_rows in tensor_map.group(rows).items():
    paths = [row.path for row in its_rows]
    kinds = [kind for kind, pattern in (('embeddings', TABLES), ('heads', HEADS))
             if any(re.fullmatch(pattern, path) for path in paths)]
    others += not kinds
    for kind in kinds:
      names[kind].append(name)
  read = {row.name for row in rows}
  return {'bit_equal': {**names, 'others': others},
          'copies': reader.copies,
          'ignored': [name for name in reader.shapes() if name not in read]}


def check_golden_vectors(c: TransformerConfig) -> dict:
  """Returns the certificate's entries on the golden vectors of c's architecture.

  UsageError if it has none, or if this installation does not reproduce them.
  """
  name = golden.matching_name(c)
  if name is None:
    raise UsageError(f'there are no golden vectors for a {c.kind.replace("_", "-")} like this: '
                     "install t5lab[parity] to certify against Hugging Face's own code")
  difference = golden.relative_difference(name)
  if not difference <= TOLERANCE:
    raise UsageError(f'not written: the golden vectors of {name} differ by {difference:.1e}, the '
                     f'limit is {TOLERANCE:.0e}; this installation computes something else')
  return {'architecture': name, 'largest_relative_difference': difference,
          'tolerance': TOLERANCE}


def digest(params) -> str:
  """Returns the SHA-256 of all parameters, by path, as float32 bytes."""
  sha256 = hashlib.sha256()
  for path, x in sorted(trees.flatten(params).items()):
    sha256.update(f'{path} {x.shape}'.encode())
    sha256.update(np.ascontiguousarray(np.asarray(x, np.float32)).reshape(-1).view(np.uint8).data)
  return sha256.hexdigest()
