"""The batch and the parameters of a config as shapes: nothing here allocates an array."""

import flax.linen as nn
import jax

from t5lab import config
from t5lab.data.batches import features
from t5lab.models.transformer import Transformer
from t5lab.parallel import sharding
from t5lab.training import steps


def batch_shapes(c) -> dict[str, jax.ShapeDtypeStruct]:
  """The model features of one row, which is all that initialization needs."""
  model = config.model_config(c)
  form = 'nsp' if model.nsp else 'mlm'      # of encoder-only models
  if model.classes:
    form = 'classes'
  row = features.build_row([], c.data.lengths.to_dict(), kind=model.kind, form=form)
  return {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in row.items()}


def boxed_params(c):
  """The parameters of the config's model, boxed with their logical axes."""
  return steps.abstract_params(Transformer(config.model_config(c)), batch_shapes(c))[0]


def abstract_params(model):
  """The parameters of a TransformerConfig, unboxed."""
  return nn.unbox(boxed_params(config.from_model(model)))


def with_shardings(boxed, mesh, rules: str):
  """Boxed abstract arrays -> the same, unboxed, with shardings."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                      nn.unbox(boxed), sharding.shardings(boxed, mesh, rules))
