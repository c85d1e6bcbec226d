"""T5X <-> ours: T5 1.0, 1.1, mT5, ByT5, umT5 and T5X's decoder_only, with Adafactor's state.

Scanned is the layout of T5X's scalable_t5: one array for all layers of a stack, layers on axis 1,
and a table of relative positions for each layer. Names and shapes: google-research/t5x,
examples/{t5,decoder_only,scalable_t5}/network.py. D model, N heads, H head, F feed-forward,
L layers.
"""

from collections.abc import Callable
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np

from t5lab import trees
from t5lab.errors import UsageError
from t5lab.tools.interop import rows as tables
from t5lab.tools.interop import t5x_files as files
from t5lab.tools.interop.rows import COPY, TRANSPOSE, Op, Row
from t5lab.tools.interop.t5x_files import T5x

__all__ = ['T5x', 'config', 'is_scanned', 'read_optimizer', 'rows', 'write']

BLOCKS = {'encoder': {'attn': 'attention'},
          'decoder': {'attn': 'self_attention', 'cross': 'encoder_decoder_attention'}}
PROJECTIONS = {'q': 'query', 'k': 'key', 'v': 'value', 'o': 'out'}
NORMS = {'attn': 'attn_norm', 'cross': 'cross_norm'}
FORMS = ('t5x', 'orbax')

# What T5X's T5 computes and no parameter shows; other fields change paths, which rows.check sees.
FIXED = dict(norm='rms', norm_eps=1e-6, post_norm=False, embed_scale=False, positions='relative',
             rel_max_distance=128, scale_attn=False, enc_attention='full', pad_id=0, start_id=0)


def rows(c, scanned: bool) -> list[Row]:
  """The table for a TransformerConfig; their names without 'target/'. UsageError if it is no T5.

  Ours is T5X's joined 2-D kernel [D, N * H]; scanned, T5X has [D, L, N, H], and [N, L, H, D] for
  'out'. A model that shares its table of relative positions writes it L times when scanned, and
  such a checkpoint reads back only if its L tables are equal.
  """
  for field, value in FIXED.items():
    if getattr(c, field) != value:
      raise UsageError(f'model.{field}={getattr(c, field)!r}: the T5 of T5X has {value!r}')
  if c.tied != c.scale_logits or c.n_kv_heads not in (0, c.n_heads) or not c.dec_layers:
    raise UsageError(f'model.tied={c.tied}, scale_logits={c.scale_logits}, n_kv_heads='
                     f'{c.n_kv_heads}, dec_layers={c.dec_layers}: the T5 of T5X scales its logits '
                     'just if tied, has as many key heads as heads, and a decoder')
  if scanned and not c.enc_layers:
    raise UsageError('T5X scans the layers of encoder-decoders only: write decoder-only unscanned')
  out = [Row('embedding', ('' if c.enc_layers else 'decoder/') + 'token_embedder/embedding')]
  if not c.tied:
    out.append(Row('logits/kernel', 'decoder/logits_dense/kernel'))
  for stack, layers in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    if layers:
      out += _stack(c, stack, layers, scanned)
  return out


def _stack(c, stack, layers, scanned):
  table = f'{stack}/layers/relpos/table' if c.per_layer_bias else f'{stack}/relpos/table'
  out = [Row(f'{stack}/norm/scale', f'{stack}/{stack}_norm/scale')]
  if not c.per_layer_bias:
    name = f'{stack}/{stack}/relpos_bias' if scanned else f'{stack}/relpos_bias'
    out.append(Row(table, f'{name}/rel_embedding', op=_shared(layers) if scanned else TRANSPOSE))

  members = [(f'{stack}/layers/{ours}/{p}/kernel', f'{theirs}/{projection}/kernel',
              _heads(c, p == 'o') if scanned else COPY)
             for ours, theirs in BLOCKS[stack].items() if ours == 'attn' or c.enc_layers
             for p, projection in PROJECTIONS.items()]
  op = LAYERS_FIRST if scanned else COPY
  norms = {f'{NORMS[ours]}/scale': f'pre_{theirs.replace("encoder_decoder", "cross")}_layer_norm'
           for ours, theirs in BLOCKS[stack].items() if ours == 'attn' or c.enc_layers}
  norms['mlp_norm/scale'] = 'pre_mlp_layer_norm'
  members += [(f'{stack}/layers/{ours}', f'{theirs}/scale', op) for ours, theirs in norms.items()]
  gated = len(c.acts) > 1
  members += [(f'{stack}/layers/mlp/wi_{j}/kernel', f'mlp/wi{f"_{j}" if gated else ""}/kernel', op)
              for j in range(len(c.acts))]
  members.append((f'{stack}/layers/mlp/wo/kernel', 'mlp/wo/kernel', op))
  if c.per_layer_bias:
    members.append((table, 'relpos_bias/rel_embedding', TABLES if scanned else TRANSPOSE))
  if scanned:
    return out + [Row(ours, f'{stack}/{stack}/{theirs}', op=op) for ours, theirs, op in members]
  return out + [Row(ours, f'{stack}/layers_{i}/{theirs}', layer=i, op=op)
                for i in range(layers) for ours, theirs, op in members]


LAYERS_FIRST = Op(lambda x: np.moveaxis(x, 1, 0), lambda x: np.moveaxis(x, 0, 1))
TABLES = Op(lambda x: x.transpose(1, 2, 0), lambda x: x.transpose(2, 0, 1))   # [N, L, 32]


def _heads(c, out: bool) -> Op:
  split = (c.n_heads, c.d_head, c.d_model) if out else (c.d_model, c.n_heads, c.d_head)
  joined = (c.n_heads * c.d_head, c.d_model) if out else (c.d_model, c.n_heads * c.d_head)

  def forward(x):           # [D, L, N, H] -> [L, D, N * H], or [N, L, H, D] -> [L, N * H, D]
    x = np.moveaxis(x, 1, 0)
    if x.shape[1:] != split:
      raise UsageError(f'an attention kernel is {x.shape[1:]} in each layer, the model needs '
                       f'{split}: a config of another size')
    return x.reshape(len(x), *joined)

  return Op(forward, lambda x: np.moveaxis(x.reshape(len(x), *split), 0, 1))


def _shared(layers: int) -> Op:
  def forward(x):           # [N, L, 32] -> [32, N]
    if (x != x[:, :1]).any():
      raise UsageError('the checkpoint has relative positions for each layer: it needs a model '
                       'with per_layer_bias=True (umT5), not T5 with one table a stack')
    return x[:, 0].T
  return Op(forward, lambda x: np.repeat(x.T[:, None], layers, axis=1))


def is_scanned(reader) -> bool:
  """Whether the layers of a stack are one array, as scalable_t5 and umT5 have them."""
  return any(name.startswith('decoder/decoder/') for name in reader.shapes())


def config(reader) -> dict:
  """Fields of TransformerConfig, from names and shapes alone; UsageError if this is no T5.

  Shapes do not tell gelu from silu: gated is ('gelu', 'linear'), as all of T5X's examples have it.
  """
  shapes, scanned = reader.shapes(), is_scanned(reader)
  layer = (lambda stack: f'{stack}/{stack}') if scanned else (lambda stack: f'{stack}/layers_0')

  def shape(name, ndim):
    found = shapes.get(name)
    if found is None or len(found) != ndim:
      raise UsageError(f'not a T5 of T5X: {name} is {found or "missing"}, a T5 has {ndim} axes '
                       f'there; this has {", ".join(sorted(shapes)[:4])}, …')
    return found

  encodes = any(name.startswith('encoder/') for name in shapes)
  embedding = ('' if encodes else 'decoder/') + 'token_embedder/embedding'
  vocab_size, d_model = shape(embedding, 2)
  per_layer = f'{layer("decoder")}/relpos_bias/rel_embedding' in shapes
  table = f'{layer("decoder") if per_layer else "decoder"}/relpos_bias/rel_embedding'
  n_heads, *_, rel_buckets = shape(table, 3 if scanned else 2)
  attn = f'{layer("decoder")}/self_attention'
  if scanned:
    d_head = shape(f'{attn}/query/kernel', 4)[3]
  else:
    width = shape(f'{attn}/query/kernel', 2)[1]
    if not n_heads or width % n_heads:
      raise UsageError(f'not a T5 of T5X: {attn}/query/kernel has {width} columns, not a multiple '
                       f'of the {n_heads} heads of {table}')
    d_head = width // n_heads
  mlp = f'{layer("decoder")}/mlp'
  gated = f'{mlp}/wi_0/kernel' in shapes
  d_ff = shape(f'{mlp}/{"wi_0" if gated else "wi"}/kernel', 3 if scanned else 2)[-1]

  def layers(stack):
    if scanned:
      return shape(f'{layer(stack)}/pre_mlp_layer_norm/scale', 2)[1]
    return len({m[1] for name in shapes if (m := re.match(rf'{stack}/layers_(\d+)/', name))})

  tied = 'decoder/logits_dense/kernel' not in shapes
  out = dict(vocab_size=vocab_size, d_model=d_model, d_ff=d_ff, n_heads=n_heads, d_head=d_head,
             enc_layers=layers('encoder') if encodes else 0, dec_layers=layers('decoder'),
             acts=('gelu', 'linear') if gated else ('relu',), tied=tied, scale_logits=tied,
             rel_buckets=rel_buckets)
  return out | ({'per_layer_bias': True} if per_layer else {})


class _Slots(NamedTuple):
  """How Adafactor's state of one of our arrays (or of one layer of it) lies in theirs."""
  row: Row
  theirs: tuple[int, ...]                   # shape of their parameter
  row_col: tuple[str, str]                  # their names of our v_row and v_col
  shapes: dict[str, tuple[int, ...]]        # of their v_row and v_col, if factored
  forward: Callable[[str, np.ndarray], np.ndarray]
  inverse: Callable[[str, np.ndarray], np.ndarray]


def _slots(row: Row, theirs: tuple[int, ...], scanned: bool) -> _Slots:
  """T5X and optax both keep in v_row the smaller axis of a matrix, the first one of equals.

  Scanned kernels go by standard_logical_factor_rules instead: v_row keeps 'embed' (D), v_col the
  rest, each for every layer, so they are our vectors, perhaps with their names exchanged.
  [google-research/t5x, adafactor.py]
  """
  ours = row.op.forward(np.broadcast_to(np.float32(0), theirs)).shape
  inner = ours[1:] if _stacked(row) else ours
  ndim = len(theirs)
  if _stacked(row) and ndim > 2:
    embed = ndim - 1 if re.search(r'/(o|wo)/kernel', row.path) else 0
    kept = {'v_row': (embed,), 'v_col': tuple(a for a in range(ndim) if a not in (1, embed))}
    their_row = 1 if embed else 0

    def forward(slot, x):
      return (np.moveaxis(x, 1, 0) if 0 in kept[slot] else x).reshape(ours[0], -1)

    def inverse(slot, x):
      x = x.reshape(ours[0], *(theirs[a] for a in kept[slot]))
      return np.moveaxis(x, 0, 1) if 0 in kept[slot] else x

    shapes = {slot: tuple(theirs[a] for a in range(ndim) if a == 1 or a in kept[slot])
              for slot in kept}
  else:
    forward = inverse = lambda slot, x: x
    smaller = int(np.argsort(theirs)[-2]) if ndim == 2 else 0
    their_row = 1 - smaller if row.op is TRANSPOSE else smaller
    shapes = {'v_row': (theirs[smaller],), 'v_col': (theirs[1 - smaller],)} if ndim == 2 else {}
  our_row = int(np.argsort(inner)[-2]) if len(inner) == 2 else 0
  row_col = ('v_row', 'v_col') if our_row == their_row else ('v_col', 'v_row')
  return _Slots(row, theirs, row_col, shapes, forward, inverse)


def _stacked(row) -> bool:
  return row.layer is None and '/layers/' in row.path


def _is_table(row) -> bool:
  return row.path.endswith('relpos/table')


def read_optimizer(reader: T5x, c, scanned: bool, abstract):
  """Adafactor's state of the checkpoint, float32 numpy arrays in an AdafactorState like `abstract`.

  abstract: shapes. count is the checkpoint's step. UsageError if the slots are missing, come from
  another optimizer, have momentum, or are factored where ours are not (see optim.min_factored).
  """
  slots, step, what = reader.slots(), reader.step, "the checkpoint's optimizer state"
  if step is None or not (have := slots.shapes()):
    raise UsageError(f'{what} is missing (a checkpoint of parameters only); start a fresh one')
  flat = {k: trees.flatten(getattr(abstract, k)) for k in ('v_row', 'v_col', 'v')}
  out = {k: {p: np.zeros(x.shape, np.float32) for p, x in flat[k].items()} for k in flat}
  params, used = reader.shapes(), set()

  def take(row, slot, shape):
    name = f'{row.name}/{slot}'
    if have.get(name) != shape:
      raise UsageError(f'{what}: {name} has shape {have.get(name, "nothing")}, not {shape}: not '
                       'Adafactor, or other matrices are factored than ours. Take the parameters '
                       'only, or set optim.min_factored (T5X: 128)')
    value = slots.read(name)
    if not np.isfinite(value.astype(np.float32)).all():
      raise UsageError(f'{what}: {name} is not finite (NaN or infinity)')
    return value

  for row in (table := rows(c, scanned)):
    if row.name not in params or row.path not in flat['v']:
      raise UsageError(f'{what}: {row.name} or our {row.path} is missing; the parameters do not '
                       'fit this model')
    if scanned and _is_table(row) and not _stacked(row):
      raise UsageError(f'{what}: {row.name} is for each layer, our table for all: take the '
                       'parameters only')
    s = _slots(row, params[row.name], scanned)
    used |= {f'{row.name}/{slot}' for slot in ('m', 'v', 'v_row', 'v_col')}
    if _factored(out, row):
      for ours, theirs in zip(('v_row', 'v_col'), s.row_col):
        _at(out[ours], row)[...] = s.forward(theirs, take(row, theirs, s.shapes.get(theirs)))
    else:
      _at(out['v'], row)[...] = row.op.forward(take(row, 'v', s.theirs))
    if (m := have.get(f'{row.name}/m')) not in (None, (1,)) and slots.read(f'{row.name}/m').any():
      raise UsageError(f'{what} has momentum ({row.name}/m of shape {m}), ours has none: take the '
                       'parameters only')
  if extra := sorted(set(have) - used):
    raise UsageError(f'{what} has {", ".join(extra[:4])} ({len(extra)} in all), which are no slots '
                     f'of the {len(table)} parameters under Adafactor')
  state = {k: trees.unflatten(out[k], like=getattr(abstract, k)) for k in out}
  return abstract._replace(count=np.asarray(step, np.int32), **state)


def _at(flat, row):
  return flat[row.path] if row.layer is None else flat[row.path][row.layer]


def _factored(state, row) -> bool:
  """Whether Adafactor keeps v_row and v_col of our array: v is then a single unused number."""
  v, v_row = state['v'][row.path], state['v_row'][row.path]
  inner = 1 if '/layers/' in row.path else 0
  return v.shape[inner:] == (1,) and v_row.shape[inner:] != (1,)


def write(folder, c, params, step: int, scanned: bool = False, form: str = 't5x',
          optimizer=None) -> None:
  """A checkpoint in the new folder `folder` that T5X reads: float32, from jax or numpy arrays.

  form 't5x' is what T5X's Checkpointer.save writes and its restore and load_t5x_checkpoint read;
  'orbax' what OrbaxCheckpointManagerInterface.save writes. As there, parameters and Adafactor's v
  are zarr directories, the other slots and the step lie in the msgpack (derive_logical_axes in
  T5X's adafactor.py gives those no axes). The caller names the folder checkpoint_<step>.

  optimizer: our AdafactorState, or None. Then there is no 'param_states': T5X's inference and
  evaluation read only the rest, its trainer fills the gap when it has a fallback_init_rng. Slots
  of zeros would be read without a word, and their first updates would be wild.
  """
  if form not in FORMS:
    raise UsageError(f'form {form!r} of a T5X checkpoint is unknown; known: {", ".join(FORMS)}')
  folder, flat, table = Path(folder), trees.flatten(params), rows(c, scanned)
  tables.check(table, dict.fromkeys(row.name for row in table), flat, what='the T5X checkpoint')
  if form == 'orbax':
    folder = folder / 'state'
  folder.mkdir(parents=True, exist_ok=True)
  tree = {}

  def put(name, array, inline=False):
    array = np.ascontiguousarray(array, np.float32).reshape(np.shape(array))
    if not inline:
      spec = files.write_zarr(folder, name, array)
      array = spec if form == 't5x' else files.PLACEHOLDER + name.replace('/', '.')
    tree[name] = array

  slots = list(_their_slots(table, flat, optimizer, scanned)) if optimizer is not None else ()
  for name, array in tables.write(table, params):
    put(f'{files.TARGET}{name}', array)
  for name, array in slots:
    array = array()
    put(f'{files.SLOTS}{name}', array, inline=not name.endswith('/v') or array.shape == (1,))
  tree['state/step'] = np.asarray(step, np.int32)
  nested = trees.unflatten(tree)
  files.write_tree(folder, nested if form == 'orbax' else {'version': 3, 'optimizer': nested})


def _their_slots(table, params, state, scanned):
  """(their name, function that gives the slot) for m, v, v_row and v_col of each parameter."""
  flat = {k: trees.flatten(getattr(state, k)) for k in ('v_row', 'v_col', 'v')}
  unused = lambda: np.zeros((1,), np.float32)
  for row in table:
    if scanned and _is_table(row) and not _stacked(row):
      raise UsageError('the optimizer state of a table of relative positions that all layers share '
                       'has no place in a scanned T5X checkpoint: write the parameters only')
    pick = lambda slot, row=row: np.asarray(_at(flat[slot], row), np.float32)
    shape = np.shape(params[row.path])[0 if row.layer is None else 1:]
    theirs = row.op.inverse(np.broadcast_to(np.float32(0), shape)).shape
    s = _slots(row, theirs, scanned)
    slots = dict.fromkeys(('m', 'v', 'v_row', 'v_col'), unused)
    if _factored(flat, row):
      for ours, slot in zip(('v_row', 'v_col'), s.row_col):
        slots[slot] = lambda pick=pick, s=s, ours=ours, slot=slot: s.inverse(slot, pick(ours))
    else:
      if _stacked(row) and len(theirs) > 2 and not _is_table(row):
        raise UsageError(f'{row.path} {shape} is not factored in our optimizer state, but in any '
                         'scanned T5X checkpoint: write the parameters only')
      slots['v'] = lambda pick=pick, row=row: row.op.inverse(pick('v'))
    for slot, value in slots.items():
      yield f'{row.name}/{slot}', value
