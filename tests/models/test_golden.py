"""Logits, loss and gradient norm of each family, frozen: a change in any changes what is trained.

Parameters and batches come from numpy streams. Written by this code on 2026-11-23, after the golden
vectors of T5X held (test_transformer.py).
"""

import dataclasses

import jax
import numpy as np
import pytest
from test_transformer import DECODER, T5_1_0, T5_1_1, random_params

from t5lab.models.transformer import Transformer
from t5lab.training import step as steps

FAMILIES = {'t5_1_0': T5_1_0, 't5_1_1': T5_1_1, 'decoder': DECODER,
            't5_1_1_scaled': dataclasses.replace(T5_1_1, scale_attn=True)}
# sum |logits|, mean loss, gradient norm
GOLDEN = {
    't5_1_0': [98.4744263, 3.93201542, 0.94915688],
    't5_1_1': [616.341675, 4.70940495, 7.01679134],
    'decoder': [96.5023346, 3.91733313, 0.667500854],
    't5_1_1_scaled': [607.092163, 4.66727304, 6.21202183],
}


def measured(config):
  r = np.random.RandomState(7)
  tokens = lambda n: r.randint(2, 48, (3, n)).astype(np.int32)
  targets = tokens(6)
  batch = {'encoder_input_tokens': tokens(9), 'decoder_target_tokens': targets,
           'decoder_input_tokens': np.roll(targets, 1, 1) * (np.arange(6) > 0),
           'decoder_loss_weights': (np.arange(6) < np.array([[6], [4], [2]])).astype(np.int32)}
  model, params = Transformer(config), random_params(config)

  @jax.jit
  def run(params):
    f = lambda p: steps.loss_sums(model, p, batch, steps.Loss(1e-4))['loss'] / 12
    loss, grads = jax.value_and_grad(f)(params)
    norm = sum(jax.numpy.sum(jax.numpy.square(g)) for g in jax.tree.leaves(grads)) ** 0.5
    return abs(model.apply({'params': params}, batch)).sum(), loss, norm
  return [float(x) for x in run(params)]


@pytest.mark.parametrize('family', FAMILIES)
def test_logits_loss_and_gradient_norm(family):
  np.testing.assert_allclose(measured(FAMILIES[family]), GOLDEN[family], rtol=1e-5)
