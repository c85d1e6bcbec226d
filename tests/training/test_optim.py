"""Schedules, Adafactor against T5X's in numpy (also layer by layer), AdamW, decay masks, EMA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5lab.errors import UsageError
from t5lab.training import adafactor, optim

# --- schedules ---------------------------------------------------------------------------------


def values(name, steps, **kw):
  f = jax.jit(optim.schedule(name, **kw))
  return [float(f(jnp.int32(s))) for s in steps]


@pytest.mark.parametrize('name, steps, options, expected', [
    ('rsqrt', [0, 1, 10_000, 40_000, 1_000_000], dict(lr=1e-2, warmup=10_000, total=0),
     [.01, .01, .01, .005, .001]),
    ('cosine', [0, 5, 10, 60, 110, 200], dict(lr=2., warmup=10, total=110, end=.4),
     [0., 1., 2., 1.2, .4, .4]),
    ('linear', [0, 5, 10, 60, 110, 200], dict(lr=2., warmup=10, total=110, end=1.),
     [0., 1., 2., 1.5, 1., 1.]),
    ('linear', [0, 50, 100], dict(lr=1., warmup=0, total=100), [1., .5, 0.]),
    ('constant', [0, 1, 2, 4, 99], dict(lr=3., warmup=2, total=10), [0., 1.5, 3., 3., 3.]),
    ('wsd', [0, 5, 10, 79, 80, 90, 100, 150],
     dict(lr=1., warmup=10, total=100, end=.1, decay_fraction=.2),
     [0., .5, 1., 1., 1., .55, .1, .1]),
])
def test_schedule_values(name, steps, options, expected):
  np.testing.assert_allclose(values(name, steps, **options), expected, rtol=1e-6, atol=1e-7)


def test_schedule_errors_name_the_value():
  with pytest.raises(UsageError, match="optim.schedule='cosin' is.*Did you mean 'cosine'"):
    optim.schedule('cosin', lr=1., warmup=1, total=2)
  for name in ('linear', 'wsd'):
    with pytest.raises(UsageError, match='warmup must be between 0 and total_steps=20, got 30'):
      optim.schedule(name, lr=1., warmup=30, total=20)
  with pytest.raises(UsageError, match=(
      'decay_fraction must give 1 to 80 steps with optim.warmup=20 and total_steps=100, got 0.9, '
      'which gives 90')):
    optim.schedule('wsd', lr=1., warmup=20, total=100, decay_fraction=.9)


# --- Adafactor ---------------------------------------------------------------------------------


class T5XAdafactor:
  """Adafactor of one parameter as T5X computes it, in numpy float64."""

  def __init__(self, shape, beta1=None, weight_decay=None):
    self.factored = len(shape) == 2 and min(shape) >= 128
    self.beta1, self.weight_decay = beta1, weight_decay
    self.t, self.m = 0, np.zeros(shape)
    self.v, self.row, self.col = np.zeros(shape), np.zeros(shape[:1]), np.zeros(shape[1:])

  def step(self, param, grad, lr):
    rms = lambda x: np.sqrt(np.mean(x * x))
    beta2 = 1 - (self.t + 1.) ** -.8
    self.t += 1
    square = grad * grad + 1e-30
    if self.factored:
      self.row = beta2 * self.row + (1 - beta2) * square.mean(1)
      self.col = beta2 * self.col + (1 - beta2) * square.mean(0)
      update = grad / np.sqrt(np.outer(self.row, self.col) / self.row.mean())
    else:
      self.v = beta2 * self.v + (1 - beta2) * square
      update = grad / np.sqrt(self.v)
    update /= max(1., rms(update))
    update *= lr * max(rms(param), 1e-3)
    if self.beta1:
      update = self.m = self.beta1 * self.m + (1 - self.beta1) * update
    return param * (1 - (self.weight_decay or 0.)) - update


SHAPES = {
    'embedding': (256, 512),
    'decoder': {'layers': {'mlp': (2, 128, 160), 'scale': (2, 16)}, 'scale': (16,)},
    'encoder': {'layers': {'wi': (3, 256, 512), 'scale': (3, 16)}, 'relpos': (64, 512)},
    'logits': (512, 256),
}
IS_SHAPE = lambda x: isinstance(x, tuple)


def random_tree(rng, spread):
  """Normal numbers; each layer and leaf has its own size, 10**-spread … 10**spread."""
  def leaf(shape):
    size = 10. ** rng.uniform(-spread, spread, shape[:1] if len(shape) == 3 else ())
    return (rng.randn(*shape) * np.reshape(size, (-1,) + (1,) * (len(shape) - 1))).astype('f')
  return jax.tree.map(leaf, SHAPES, is_leaf=IS_SHAPE)


def numpy_run(params, grads, lrs, **kw):
  """Yields the parameters after each step; layers are updated one by one."""
  paths = jax.tree_util.tree_leaves_with_path(params)
  stacked = ['layers' in jax.tree_util.keystr(path) for path, _ in paths]
  leaves = [list(x) if s else [x] for s, (_, x) in zip(stacked, paths)]
  leaves = [[np.float64(x) for x in leaf] for leaf in leaves]
  rules = [[T5XAdafactor(x.shape, **kw) for x in leaf] for leaf in leaves]
  for lr, grad in zip(lrs, grads):
    grad = [list(g) if s else [g] for s, g in zip(stacked, jax.tree.leaves(grad))]
    leaves = [[r.step(x, np.float64(g), lr) for r, x, g in zip(*leaf)]
              for leaf in zip(rules, leaves, grad)]
    yield jax.tree.unflatten(jax.tree.structure(params), [
        np.stack(x) if s else x[0] for s, x in zip(stacked, leaves)])


def run(tx, params, grads):
  update = jax.jit(tx.update)
  state = tx.init(params)
  for grad in grads:
    updates, state = update(grad, state, params)
    params = optax.apply_updates(params, updates)
    yield params


def problem(steps=10):
  rng = np.random.RandomState(0)
  params = random_tree(rng, 2)
  params['decoder']['layers']['scale'][0] = 1e-5  # below the floor of the parameter scale
  return params, [random_tree(rng, 3) for _ in range(steps)]


def get(tree, path):
  for key in path:
    tree = tree[key.key]
  return np.asarray(tree)


def moved(params, before):
  return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, params, before)


@pytest.mark.parametrize('options, t5x_options', [
    ({}, {}),
    (dict(momentum=.9, weight_decay=.01, decay_exclude=()), dict(beta1=.9, weight_decay=.01)),
])
def test_adafactor_equals_t5x_step_for_step(options, t5x_options):
  params, grads = problem()
  schedule = optim.schedule('rsqrt', lr=.1, warmup=4, total=10)
  lrs = [.1 * np.sqrt(4 / max(t, 4)) for t in range(10)]
  ours = run(optim.optimizer('adafactor', schedule, **options), params, grads)
  t5x = numpy_run(params, grads, lrs, **t5x_options)
  for got, expected in zip(ours, t5x, strict=True):
    for path, b in jax.tree_util.tree_leaves_with_path(expected):
      a, first_axis = get(got, path), 1 if 'layers' in jax.tree_util.keystr(path) else 0
      largest = np.abs(b).max(tuple(range(first_axis, b.ndim)), keepdims=True)  # of each layer
      assert (np.abs(a - b) <= 1e-5 * np.abs(b) + 1e-6 * largest).all(), path


def test_one_step_moves_each_layer_by_its_own_scale():
  # Compares the change: in the parameter itself a wrong one could hide.
  params, grads = problem(1)
  got, = run(optim.optimizer('adafactor', 1.), params, grads)
  expected, = numpy_run(params, grads, [1.])
  got, expected = moved(got, params), moved(expected, params)
  for a, b in zip(got['encoder']['layers']['wi'], expected['encoder']['layers']['wi']):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_plain_optax_adafactor_is_wrong_for_stacked_layers():
  params, grads = problem(1)
  got, = run(optax.adafactor(1., min_dim_size_to_factor=128), params, grads)
  expected, = numpy_run(params, grads, [1.])
  got, expected = moved(got, params), moved(expected, params)
  size = lambda x: np.sqrt(np.mean(np.square(x), (-1, -2)))
  np.testing.assert_allclose(got['embedding'], expected['embedding'],
                             rtol=1e-4, atol=1e-5 * np.abs(expected['embedding']).max())
  off = size(got['encoder']['layers']['wi']) / size(expected['encoder']['layers']['wi'])
  assert np.abs(np.log(off)).max() > np.log(2)


def test_adafactor_state_is_small_and_by_layer():
  state = jax.eval_shape(adafactor.scale_by_adafactor().init, jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=IS_SHAPE))
  wi = lambda tree: tree['encoder']['layers']['wi'].shape
  assert (wi(state.v_row), wi(state.v_col), wi(state.v)) == ((3, 256), (3, 512), (3, 1))
  assert state.v['decoder']['layers']['scale'].shape == (2, 16)
  assert state.v['encoder']['relpos'].shape == (64, 512)
  assert state.count.shape == ()


def test_experts_of_layers_are_two_stacked_axes():
  rng = np.random.RandomState(1)
  draw = lambda: rng.randn(2, 3, 128, 130).astype('f')
  params, grads = ({'layers': {'experts': {'wi': draw()}}} for _ in range(2))
  wi = lambda tree: tree['layers']['experts']['wi']
  tx = adafactor.scale_by_adafactor()
  u, state = tx.update(grads, tx.init(params), params)
  assert wi(state.v_row).shape == (2, 3, 128)
  param, grad = (np.float64(wi(x)[1, 2]) for x in (params, grads))
  expected = T5XAdafactor((128, 130)).step(param, grad, 1.)
  np.testing.assert_allclose(wi(params)[1, 2] - wi(u)[1, 2], expected, rtol=1e-5, atol=1e-5)


# --- AdamW and what all optimizers share -------------------------------------------------------

PARAMS = {
    'embedding': np.ones((4, 3), 'f'),
    'encoder': {
        'layers': {'attn': {'q': {'kernel': np.ones((2, 3, 3), 'f'), 'bias': np.ones((2, 3), 'f')}},
                   'mlp_norm': {'scale': np.ones((2, 3), 'f')}},
        'relpos': {'table': np.ones((32, 2), 'f')},
        'norm': {'scale': np.ones(3, 'f')},
    },
}


def test_decay_mask_depends_on_the_path():
  assert optim.decay_mask(PARAMS) == {
      'embedding': True,
      'encoder': {
          'layers': {'attn': {'q': {'kernel': True, 'bias': False}}, 'mlp_norm': {'scale': False}},
          'relpos': {'table': False},
          'norm': {'scale': False},
      },
  }
  assert all(jax.tree.leaves(optim.decay_mask(PARAMS, ())))


@pytest.mark.parametrize('name, shrunk', [('adamw', 1 - .1 * .5), ('adafactor', 1 - .5)])
def test_weight_decay_shrinks_only_where_the_mask_allows(name, shrunk):
  tx = optim.optimizer(name, .1, weight_decay=.5)
  updates, _ = tx.update(jax.tree.map(np.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
  new = optax.apply_updates(PARAMS, updates)
  np.testing.assert_allclose(new['embedding'], shrunk, rtol=1e-6)
  np.testing.assert_allclose(new['encoder']['layers']['attn']['q']['kernel'], shrunk, rtol=1e-6)
  for unchanged in (new['encoder']['layers']['mlp_norm']['scale'], new['encoder']['norm']['scale'],
                    new['encoder']['layers']['attn']['q']['bias'],
                    new['encoder']['relpos']['table']):
    np.testing.assert_array_equal(unchanged, 1.)


def test_an_unknown_optimizer_is_an_error():
  with pytest.raises(UsageError, match="optim.name='adamW' is unknown. Did you mean 'adamw'"):
    optim.optimizer('adamW', 1.)
  with pytest.raises(UsageError, match="optim.name='muon' is unknown. Known: adafactor, adamw."):
    optim.optimizer('muon', 1.)


def test_an_optimizer_is_one_entry_of_the_table(monkeypatch):
  def sgd(schedule, weight_decay, mask, **_):
    return [optax.scale_by_learning_rate(schedule)]
  monkeypatch.setitem(optim.OPTIMIZERS, 'sgd', sgd)
  grads = jax.tree.map(np.ones_like, PARAMS)
  new, = run(optim.optimizer('sgd', .1), PARAMS, [grads])
  jax.tree.map(lambda x: np.testing.assert_allclose(x, .9, rtol=1e-6), new)


def test_adamw_equals_optax_adamw():
  params, grads = problem(3)
  schedule = optim.schedule('constant', lr=1e-2, warmup=2, total=3)
  ours = optim.optimizer('adamw', schedule, b1=.8, b2=.95, eps=1e-6, weight_decay=.1)
  optax_adamw = optax.adamw(schedule, b1=.8, b2=.95, eps=1e-6, weight_decay=.1,
                            mask=optim.decay_mask)
  for pair in zip(run(ours, params, grads), run(optax_adamw, params, grads), strict=True):
    jax.tree.map(np.testing.assert_array_equal, *pair)


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_the_global_norm_is_clipped_first(name):
  grads = [jax.tree.map(lambda p: np.full_like(p, 7.), PARAMS)] * 3
  norm = 7. * np.sqrt(sum(p.size for p in jax.tree.leaves(PARAMS)))
  small = [jax.tree.map(lambda g: g * np.float32(2. / norm), g) for g in grads]
  eps = 1.  # with it, adamw's update depends on the size of the gradient
  *_, clipped = run(optim.optimizer(name, .1, clip=2., eps=eps), PARAMS, grads)
  *_, by_hand = run(optim.optimizer(name, .1, eps=eps), PARAMS, small)
  *_, free = run(optim.optimizer(name, .1, eps=eps), PARAMS, grads)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, by_hand)
  if name == 'adamw':
    assert np.abs(free['embedding'] - clipped['embedding']).max() > .01


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_state_is_arrays_and_can_be_donated(name):
  tx = optim.optimizer(name, optim.schedule('cosine', lr=.1, warmup=1, total=5), clip=1.,
                       weight_decay=.1, momentum=.9)
  params = jax.tree.map(jnp.array, PARAMS)
  state = jax.jit(tx.init)(params)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))

  def update(params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(update, donate_argnums=(0, 1))
  same = lambda a, b: jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), a, b)
  assert all(jax.tree.leaves(same(state, jax.eval_shape(update, params, state)[1])))
  for _ in range(2):
    params, state = step(params, state)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


# --- EMA ---------------------------------------------------------------------------------------


def test_ema_values_and_ramp():
  ema = {'w': np.float32([0., 10.])}
  new = {'w': np.float32([1., 0.])}
  # d = min(.5, 1 / 10) at step 0; min(.5, 11 / 20) at step 10.
  np.testing.assert_allclose(optim.ema_update(ema, new, 0, .5)['w'], [.9, 1.], rtol=1e-6)
  np.testing.assert_allclose(optim.ema_update(ema, new, 10, .5)['w'], [.5, 5.], rtol=1e-6)


def test_ema_of_bfloat16_parameters_moves_in_float32():
  start, target = jnp.ones(3, jnp.bfloat16), jnp.full(3, 1.5, jnp.bfloat16)
  ema, stuck = optim.ema_init(start), start
  for _ in range(10):
    ema = optim.ema_update(ema, target, 10 ** 6, .9999)
    stuck = (stuck + (1 - .9999) * (target - stuck)).astype(jnp.bfloat16)
  assert ema.dtype == jnp.float32
  np.testing.assert_allclose(ema, 1.5 - .5 * .9999 ** 10, rtol=1e-6)
  np.testing.assert_array_equal(stuck, start)  # what bfloat16 would do


def test_ema_and_parameters_can_both_be_donated():
  params = {'w': jnp.ones(3)}
  step = jax.jit(lambda p, e: (p, optim.ema_update(e, p, 0, .9)), donate_argnums=(0, 1))
  params, ema = step(params, optim.ema_init(params))
  np.testing.assert_array_equal(ema['w'], 1.)
