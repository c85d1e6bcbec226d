"""LongT5's attention in blocks against the same function written densely, in numpy."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from t5lab.models.families import TransformerConfig
from t5lab.models.long_attention import LongAttention, global_blocks, share
from t5lab.models.positions import RelativeBias, relative_bucket
from t5lab.models.transformer import Transformer

N, H, D, RADIUS, BLOCK = 2, 4, 8, 3, 4
LOCAL = TransformerConfig(vocab_size=32, d_model=D, n_heads=N, d_head=H, d_ff=16, enc_layers=2,
                          dec_layers=0, enc_attention='local', local_radius=RADIUS,
                          global_block=BLOCK, rel_buckets=8, rel_max_distance=16)
GLOBAL = dataclasses.replace(LOCAL, enc_attention='transient_global')


class Layer(nn.Module):
  """One attention and the tables that a stack shares."""
  config: TransformerConfig

  @nn.compact
  def __call__(self, x, segments):
    c = self.config
    near = share(c, segments, RelativeBias(c, True, name='near'), RelativeBias(c, True, name='far'))
    return LongAttention(c, False, name='attn')(x, near)


@functools.cache
def parameters(c):
  shapes = jax.eval_shape(Layer(c).init, jax.random.key(0), np.zeros((1, 8, D), np.float32),
                          np.ones((1, 8), np.int32))['params']
  r = np.random.RandomState(0)
  return jax.tree.map(lambda x: r.randn(*x.shape).astype(np.float32), nn.unbox(shapes))


bucket = jax.jit(functools.partial(relative_bucket, bidirectional=True, buckets=8, max_distance=16))


def dense(c, p, x, segments):
  """One row: scores of every pair, and of every token with every global token of its segment."""
  S = len(segments)
  bias = lambda name, relative: p[name]['table'][np.asarray(bucket(np.asarray(relative)))]
  project = lambda name, y: (y @ p['attn'][name]['kernel']).reshape(-1, N, H)
  keys, own, at = [x], [], []
  mask = [[abs(i - j) <= RADIUS and segments[i] == segments[j] > 0 for j in range(S)]
          for i in range(S)]
  if c.enc_attention == 'transient_global':
    own = [-1] * S                                     # the global token that i is part of
    for segment in sorted(set(segments) - {0}):
      tokens = [i for i in range(S) if segments[i] == segment]
      first = len(at)
      for k in range(len(tokens) // BLOCK):
        at.append(segment)
        last = k == len(tokens) // BLOCK - 1
        members = tokens[k * BLOCK:None if last else (k + 1) * BLOCK]
        for i in members:
          own[i] = first + k
        total = x[members].sum(0)
        keys.append((total / np.sqrt((total ** 2).mean() + 1e-6)
                     * p['attn']['global_norm']['scale'])[None])
    mask = [row + [segments[i] == s for s in at] for i, row in enumerate(mask)]
  y = np.concatenate(keys)
  positions = np.arange(S)
  b = bias('near', positions[None] - positions[:, None])                # [S, S, N]
  if at:
    b = np.concatenate([b, bias('far', np.arange(len(at))[None] - np.array(own)[:, None])], 1)
  scores = np.einsum('TNH,SNH->NTS', project('q', x), project('k', y)) + b.transpose(2, 0, 1)
  scores = np.where(np.array(mask)[None], scores, -1e10)
  probs = np.exp(scores - scores.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  out = np.einsum('NTS,SNH->TNH', probs, project('v', y)).reshape(S, -1)
  return out @ p['attn']['o']['kernel']


@functools.cache
def compiled(c):
  return jax.jit(Layer(c).apply)


@pytest.mark.parametrize('c', [LOCAL, GLOBAL], ids=['local', 'transient_global'])
@pytest.mark.parametrize('lengths, padding', [
    ((1,), 2), ((3,), 22), ((8,), 2), ((13,), 12), ((17, 6), 2), ((5, 3, 9, 4), 4)], ids=str)
def test_blocks_equal_the_dense_function(c, lengths, padding):
  """Rows of 3, 10 and 25 tokens, no multiples of a block of 4; several segments share a row."""
  segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
  x = np.random.RandomState(len(segments)).randn(len(segments), D).astype(np.float32)
  got = compiled(c)({'params': parameters(c)}, x[None], segments[None])[0]
  real = segments > 0
  want = dense(c, parameters(c), x, segments.tolist())
  np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=2e-5, rtol=1e-5)
  assert np.isfinite(got).all()


def test_global_blocks_by_hand():
  block, segment = jax.jit(global_blocks, static_argnums=1)(
      np.array([[1, 1, 1, 1, 1, 2, 2, 3, 0], [4] * 9, [0] * 9]), 2)
  assert block.tolist() == [[0, 0, 1, 1, 1, 2, 2, -1, -1], [0, 0, 1, 1, 2, 2, 3, 3, 3], [-1] * 9]
  assert segment.tolist() == [[1, 1, 2, 0], [4] * 4, [0] * 4]


def test_memory_grows_with_the_length_where_full_attention_squares_it():
  def temporary(c, length):
    model = Transformer(c)
    tokens = jax.ShapeDtypeStruct((1, length), np.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), {'encoder_input_tokens': tokens})
    run = jax.jit(lambda v, t: model.apply(v, t, method='encode')[0])
    return run.lower(variables, tokens).compile().memory_analysis().temp_size_in_bytes
  ratio = lambda c: temporary(c, 2048) / temporary(c, 1024)
  assert ratio(LOCAL) < 2.1
  assert ratio(dataclasses.replace(LOCAL, enc_attention='full')) > 3.5
