"""Feed-forward experts: each token goes to its best one or two, each expert takes at most C tokens.

A row of the batch is a group: its T tokens compete for the C slots of each expert, and earlier
tokens win. [Fedus et al. 2022 (Switch), 2.1-2.2; Zoph et al. 2022 (ST-MoE)]
B batch, T length, D model, F feed-forward, E experts, C capacity.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5lab.models.families import TransformerConfig
from t5lab.models.layers import dropout, gated, kernel_init, up_init
from t5lab.parallel.sharding import constrain, product

# The statistics that `sow` collects in each layer; training adds the first two to the loss.
STATISTICS = ('balance', 'router_z', 'dropped')


def route(probs, is_token, top_k: int, capacity: int):
  """Assigns tokens to the slots of experts.

  probs float32[B, T, E], is_token bool[B, T] -> (combine float32[B, T, E, C], dropped[B, T, k]).
  combine holds the gate of each token at its slot; padding takes none. All first choices are placed
  before any second. Two gates are rescaled to sum to 1; a single one keeps its probability.
  """
  E = probs.shape[-1]
  gates, experts = jax.lax.top_k(probs, top_k)                 # [B, T, k]
  if top_k > 1:
    gates /= jnp.sum(gates, axis=-1, keepdims=True) + 1e-9
  combine = jnp.zeros((*probs.shape, capacity), jnp.float32)
  used = jnp.zeros((probs.shape[0], 1, E), jnp.int32)          # slots taken by earlier choices
  dropped = []
  for i in range(top_k):
    chosen = jax.nn.one_hot(experts[..., i], E, dtype=jnp.int32) * is_token[..., None]
    slot = jnp.cumsum(chosen, axis=1) - 1 + used               # [B, T, E]
    used += jnp.sum(chosen, axis=1, keepdims=True)
    fits = (chosen > 0) & (slot < capacity)
    slot = jnp.sum(jnp.where(chosen > 0, slot, 0), axis=-1)    # [B, T]
    combine += ((gates[..., i, None] * fits)[..., None]
                * jax.nn.one_hot(slot, capacity)[:, :, None, :])
    dropped.append(is_token & ~jnp.any(fits, axis=-1))
  return combine, jnp.stack(dropped, axis=-1)


class Experts(nn.Module):
  """E feed-forward networks with kernels [E, D, F] and [E, F, D], without biases."""
  config: TransformerConfig
  train: bool

  @nn.compact
  def __call__(self, x):                                       # [E, B, C, D]
    c = self.config

    def dense(name, h, features, axes):
      init = up_init(c, batch_axis=(0,))                       # by the fan-in of one expert
      w = self.param(name, nn.with_logical_partitioning(init, ('expert', *axes)),
                     (c.experts, h.shape[-1], features), jnp.float32)
      return product(functools.partial(jnp.einsum, 'EBCI,EIO->EBCO'), h, w, 'expert', *axes,
                     dtype=c.dtype)

    h = gated(c, lambda i: dense(f'wi_{i}', x, c.d_ff, ('embed', 'mlp')))  # [E, B, C, F]
    h = constrain(h, 'expert', 'batch', 'capacity', 'act_mlp')
    h = dropout(self, h, c.dropout, self.train)
    return dense('wo', h, c.d_model, ('mlp', 'embed'))


class Moe(nn.Module):
  """A mixture of experts in place of an Mlp. The router has a kernel [D, E] and uses float32."""
  config: TransformerConfig
  train: bool

  @nn.compact
  def __call__(self, x, is_token):                             # [B, T, D], bool[B, T]
    c = self.config

    # Route.
    E, T = c.experts, x.shape[1]
    factor = c.capacity_factor if self.train else c.eval_capacity_factor
    capacity = min(T, max(1, math.ceil(T * c.expert_top_k / E * factor)))
    router = self.param('router', nn.with_logical_partitioning(
        kernel_init(c, c.d_model ** -0.5), ('norm', None)), (c.d_model, E), jnp.float32)
    logits = x.astype(jnp.float32) @ router                    # [B, T, E]
    probs = jax.nn.softmax(logits)
    combine, dropped = route(probs, is_token, c.expert_top_k, capacity)
    self._sow(logits, probs, dropped, is_token)

    # Dispatch, compute, combine.
    combine = constrain(combine, 'batch', 'length', None, None)
    inputs = jnp.einsum('BTEC,BTD->EBCD', (combine > 0).astype(c.dtype), x)
    # First sharded like the tokens, then like the experts, and back: each pair of constraints is
    # one all-to-all, and its gradient another. With one alone the compiler replicates all tokens.
    inputs = constrain(inputs, None, 'batch', 'capacity', None)
    inputs = constrain(inputs, 'expert', 'batch', 'capacity', None)
    out = Experts(c, self.train, name='experts')(inputs)
    out = constrain(out, 'expert', 'batch', 'capacity', None)
    out = constrain(out, None, 'batch', None, None)
    return jnp.einsum('BTEC,EBCD->BTD', combine.astype(c.dtype), out)

  def _sow(self, logits, probs, dropped, is_token):
    """Sows statistics, float32[B] each, means over the tokens of each row that are not padding.

    Because they are per row, microbatches have the statistics of the whole batch.
    balance: E * sum over experts of (fraction of tokens that chose it) * (mean probability); it is
      top_k if the load is even. [Fedus et al. 2022, 2.2]
    router_z: mean of log(sum exp logits)^2. [Zoph et al. 2022, 3.3]
    dropped: fraction of the tokens' choices that got no slot.
    """
    E, k = self.config.experts, self.config.expert_top_k
    weight = is_token.astype(jnp.float32)
    weight /= jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1.)
    mean = lambda values: jnp.einsum('BT,BT...->B...', weight, values)
    chosen = jnp.max(jax.nn.one_hot(jax.lax.top_k(probs, k)[1], E), axis=-2)
    self.sow('router', 'balance', E * jnp.sum(mean(chosen) * mean(probs), axis=-1))
    self.sow('router', 'router_z', mean(jnp.square(jax.nn.logsumexp(logits, axis=-1))))
    self.sow('router', 'dropped', jnp.mean(mean(dropped.astype(jnp.float32)), axis=-1))
