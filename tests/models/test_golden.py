"""Logits, loss and gradient norm of each family, frozen: a change in any changes what is trained.

Parameters and batches come from numpy streams. Written by this code on 2026-11-23 and, what is not
T5, 2026-11-24 (Gemma and M2M100: 2026-12-01), after the golden vectors of others
(test_reference_goldens.py) and the laws held.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from small_models import CONFIGS, random_params

from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.training import losses

T5_1_0 = TransformerConfig(vocab_size=48, d_model=16, d_ff=32, n_heads=2, d_head=8, enc_layers=2,
                           dec_layers=2)
T5_1_1 = dataclasses.replace(T5_1_0, acts=('gelu', 'linear'), tied=False, scale_logits=False)
DECODER = dataclasses.replace(T5_1_1, enc_layers=0, tied=True, scale_logits=True)
FAMILIES = {'t5_1_0': T5_1_0, 't5_1_1': T5_1_1, 'decoder': DECODER,
            't5_1_1_scaled': dataclasses.replace(T5_1_1, scale_attn=True),
            **{name: CONFIGS[name] for name in (
                'umt5', 'longt5_local', 'longt5_tglobal', 'switch', 'st_moe', 't5gemma', '2017',
                'bart', 'gpt2', 'llama3_1', 'bert', 'm2m100', 'gemma3')}}
# sum |logits|, mean loss, gradient norm
GOLDEN = {
    't5_1_0': [98.4744263, 3.93201542, 0.94915688],
    't5_1_1': [616.341675, 4.70940495, 7.01679134],
    'decoder': [96.5023346, 3.91733313, 0.667500854],
    't5_1_1_scaled': [607.092163, 4.66727304, 6.21202183],
    'umt5': [633.198608, 4.86971045, 8.68719196],
    'longt5_local': [620.772583, 4.74617767, 6.09019232],
    'longt5_tglobal': [622.393921, 4.6203618, 7.28357887],
    'switch': [622.583862, 3.70337439, 8.95280743],
    'st_moe': [627.780518, 3.60609913, 11.0493717],
    't5gemma': [734.714111, 4.22849131, 38.4407883],
    '2017': [486.556213, 3.9072237, 1.74581158],
    'bart': [854.40332, 4.39470196, 1.94473696],
    'gpt2': [778.385132, 4.56688261, 3.19277692],
    'llama3_1': [672.764648, 4.02858305, 8.30060005],
    'bert': [772.757751, 4.6573348, 2.28067732],
    'm2m100': [575.15625, 4.19338369, 2.89174771],
    'gemma3': [769.249146, 4.50173855, 15.9161463],
}


def measured(config):
  r = np.random.RandomState(7)
  tokens = lambda n: r.randint(2, 48, (3, n)).astype(np.int32)
  targets = tokens(6)
  batch = {'encoder_input_tokens': tokens(9), 'decoder_target_tokens': targets,
           'decoder_input_tokens': np.roll(targets, 1, 1) * (np.arange(6) > 0),
           'decoder_loss_weights': (np.arange(6) < np.array([[6], [4], [2]])).astype(np.int32)}
  if config.kind == 'encoder':
    batch = {name.replace('decoder', 'encoder'): x for name, x in batch.items()}
    batch['encoder_token_types'] = batch['encoder_loss_weights']
  model, params = Transformer(config), random_params(config)

  side = 'decoder' if config.dec_layers else 'encoder'

  @jax.jit
  def run(params):
    def loss(params):                  # one pass: compiling another one would take as long again
      logits = model.apply({'params': params}, batch)
      sums = losses.cross_entropy(
          logits, batch[f'{side}_target_tokens'], batch[f'{side}_loss_weights'], z_loss=1e-4)
      return sums['loss'] / 12, abs(logits).sum()
    (mean, size), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return size, mean, optax.tree.norm(grads)
  return [float(x) for x in run(params)]


@pytest.mark.parametrize('family', FAMILIES)
def test_logits_loss_and_gradient_norm(family):
  np.testing.assert_allclose(measured(FAMILIES[family]), GOLDEN[family], rtol=1e-5)
