"""T5X's parameters and Adafactor state, mapped to ours: T5 1.0, 1.1, mT5, ByT5, umT5, decoder_only.

"Scanned" is the layout of T5X's scalable_t5: one array for all layers of a stack with the layers on
axis 1, and a table of relative positions for each layer. Names and shapes: google-research/t5x,
examples/{t5,decoder_only,scalable_t5}/network.py. D model, N heads, H head, F feed-forward,
L layers.
"""

from pathlib import Path
import re

from flax import serialization
import numpy as np

from t5lab import trees
from t5lab.errors import UsageError
from t5lab.tools.interop import t5x_files, tensor_map
from t5lab.tools.interop.t5x_files import T5x
from t5lab.tools.interop.tensor_map import COPY, TRANSPOSE, Op, TensorRow

BLOCKS = {'encoder': {'attn': 'attention'},
          'decoder': {'attn': 'self_attention', 'cross': 'encoder_decoder_attention'}}
PROJECTIONS = {'q': 'query', 'k': 'key', 'v': 'value', 'o': 'out'}
FORMS = ('t5x', 'orbax')
SLOTS = ('m', 'v', 'v_row', 'v_col')     # of each parameter in T5X's Adafactor
FACTORS = ('v_row', 'v_col')

# Fields that T5X's T5 fixes and that no parameter shows. Other fields change the paths of
# parameters, so tensor_map.check sees them.
FIXED = dict(norm='rms', norm_eps=1e-6, post_norm=False, embed_scale=False, positions='relative',
             rel_max_distance=128, scale_attn=False, enc_attention='full', pad_id=0, start_id=0,
             zero_centered_norm=False, attn_softcap=0., logit_softcap=0., window=0)


# --- parameters --------------------------------------------------------------------------------


def tensor_rows(c, scanned: bool) -> list[TensorRow]:
  """Returns the rows for a TransformerConfig; UsageError if it is not a T5 of T5X.

  Their names lack 'target/'. Unscanned, T5X has our joined 2-D kernels [D, N * H]; scanned it has
  [D, L, N, H], and [N, L, H, D] for 'out'. A stack that shares its table of relative positions
  writes it L times when scanned, and such a checkpoint reads back only if its L tables are equal.
  """
  for field, value in FIXED.items():
    if getattr(c, field) != value:
      raise UsageError(f'model.{field}={getattr(c, field)!r}: the T5 of T5X has {value!r}')
  if c.tied != c.scale_logits or c.n_kv_heads not in (0, c.n_heads) or not c.dec_layers:
    raise UsageError(f'model.tied={c.tied}, scale_logits={c.scale_logits}, n_kv_heads='
                     f'{c.n_kv_heads}, dec_layers={c.dec_layers}: the T5 of T5X scales its logits '
                     'if and only if tied, has as many key heads as heads, and a decoder')
  if scanned and not c.enc_layers:
    raise UsageError('T5X scans the layers of encoder-decoders only: write decoder-only unscanned')
  embedding = 'token_embedder/embedding' if c.enc_layers else 'decoder/token_embedder/embedding'
  rows = [TensorRow('embedding', embedding)]
  if not c.tied:
    rows.append(TensorRow('logits/kernel', 'decoder/logits_dense/kernel'))
  for stack, layers in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    if layers:
      rows += _stack_rows(c, stack, layers, scanned)
  return rows


def _stack_rows(c, stack, layers, scanned):
  rows = [TensorRow(f'{stack}/norm/scale', f'{stack}/{stack}_norm/scale')]
  if not c.per_layer_bias:
    name, op = f'{stack}/relpos_bias/rel_embedding', TRANSPOSE
    if scanned:
      name, op = f'{stack}/{stack}/relpos_bias/rel_embedding', _repeated_table(layers)
    rows.append(TensorRow(f'{stack}/relpos/table', name, op=op))

  # (our path, their name, op) of the arrays of one layer. Scanned, attention kernels are
  # [D, L, N, H], and those of 'out' [N, L, H, D].
  layers_first = LAYERS_FIRST if scanned else COPY
  blocks = {block: name for block, name in BLOCKS[stack].items()
            if block == 'attn' or c.enc_layers}
  d, heads, width = c.d_model, (c.n_heads, c.d_head), c.n_heads * c.d_head
  arrays = []
  for block, name in blocks.items():
    for p, projection in PROJECTIONS.items():
      split, joined = ((*heads, d), (width, d)) if p == 'o' else ((d, *heads), (d, width))
      op = _joined_axes(split, joined) if scanned else COPY
      arrays.append((f'{block}/{p}/kernel', f'{name}/{projection}/kernel', op))
  for block, name in blocks.items():
    norm = name.replace('encoder_decoder', 'cross')
    arrays.append((f'{block}_norm/scale', f'pre_{norm}_layer_norm/scale', layers_first))
  arrays.append(('mlp_norm/scale', 'pre_mlp_layer_norm/scale', layers_first))
  for j in range(len(c.acts)):
    up = f'wi_{j}' if len(c.acts) > 1 else 'wi'
    arrays.append((f'mlp/wi_{j}/kernel', f'mlp/{up}/kernel', layers_first))
  arrays.append(('mlp/wo/kernel', 'mlp/wo/kernel', layers_first))
  if c.per_layer_bias:
    op = LAYER_TABLES if scanned else TRANSPOSE
    arrays.append(('relpos/table', 'relpos_bias/rel_embedding', op))

  places = [(f'{stack}/layers_{i}', i) for i in range(layers)]
  return rows + [TensorRow(f'{stack}/layers/{path}', f'{place}/{name}', layer, op)
                 for place, layer in ([(f'{stack}/{stack}', None)] if scanned else places)
                 for path, name, op in arrays]


LAYERS_FIRST = Op(lambda x: np.moveaxis(x, 1, 0), lambda x: np.moveaxis(x, 0, 1))
LAYER_TABLES = Op(lambda x: x.transpose(1, 2, 0), lambda x: x.transpose(2, 0, 1))   # [N, L, 32]


def _joined_axes(split: tuple[int, ...], joined: tuple[int, ...], layer_axis: int = 1) -> Op:
  """Maps arrays of shape `split` in each layer, the layers on `layer_axis`, to our [L, *joined]."""
  def forward(x):
    x = np.moveaxis(x, layer_axis, 0)
    if x.shape[1:] != split:
      raise UsageError(f'an attention kernel is {x.shape[1:]} in each layer, the model needs '
                       f'{split}: the config is of another size')
    return x.reshape(len(x), *joined)

  return Op(forward, lambda x: np.moveaxis(x.reshape(len(x), *split), 0, layer_axis))


def _repeated_table(layers: int) -> Op:
  """Maps [N, L, 32], L equal tables of relative positions, to our one table [32, N]."""
  def forward(x):
    if (x != x[:, :1]).any():
      raise UsageError('the checkpoint has relative positions for each layer: it needs a model '
                       'with per_layer_bias=True (umT5), not T5 with one table per stack')
    return x[:, 0].T
  return Op(forward, lambda x: np.repeat(x.T[:, None], layers, axis=1))


def is_scanned(reader) -> bool:
  """Returns whether the layers of a stack are one array, as in scalable_t5 and umT5."""
  return any(name.startswith('decoder/decoder/') for name in reader.shapes())


def fields(reader) -> dict:
  """Returns the fields of a TransformerConfig from names and shapes; UsageError if it is not a T5.

  Shapes cannot distinguish gelu from silu: gated is ('gelu', 'linear'), as in all of T5X's
  examples.
  """
  shapes, scanned = reader.shapes(), is_scanned(reader)
  layer = 'decoder/decoder' if scanned else 'decoder/layers_0'

  def shape(name, ndim):
    if len(shapes.get(name, ())) != ndim:
      raise UsageError(f'not a T5 of T5X: {name} is {shapes.get(name, "missing")}, a T5 has {ndim} '
                       f'axes there; the checkpoint has {", ".join(sorted(shapes)[:4])}, …')
    return shapes[name]

  def layer_count(stack):
    if scanned:
      return shape(f'{stack}/{stack}/pre_mlp_layer_norm/scale', 2)[1]
    return len({m[1] for name in shapes if (m := re.match(rf'{stack}/layers_(\d+)/', name))})

  has_encoder = any(name.startswith('encoder/') for name in shapes)
  embedding = 'token_embedder/embedding' if has_encoder else 'decoder/token_embedder/embedding'
  vocab_size, d_model = shape(embedding, 2)

  # The number of heads is that of the relative positions.
  per_layer = f'{layer}/relpos_bias/rel_embedding' in shapes
  table = f'{layer if per_layer else "decoder"}/relpos_bias/rel_embedding'
  n_heads, *_, rel_buckets = shape(table, 3 if scanned else 2)
  query, mlp = f'{layer}/self_attention/query/kernel', f'{layer}/mlp'
  if scanned:
    d_head = shape(query, 4)[3]
  else:
    width = shape(query, 2)[1]
    if not n_heads or width % n_heads:
      raise UsageError(f'not a T5 of T5X: {query} has {width} columns, not a multiple of the '
                       f'{n_heads} heads of {table}')
    d_head = width // n_heads

  gated = f'{mlp}/wi_0/kernel' in shapes
  d_ff = shape(f'{mlp}/{"wi_0" if gated else "wi"}/kernel', 3 if scanned else 2)[-1]
  tied = 'decoder/logits_dense/kernel' not in shapes
  return dict(
      vocab_size=vocab_size, d_model=d_model, d_ff=d_ff, n_heads=n_heads, d_head=d_head,
      enc_layers=layer_count('encoder') if has_encoder else 0, dec_layers=layer_count('decoder'),
      acts=('gelu', 'linear') if gated else ('relu',), tied=tied, scale_logits=tied,
      rel_buckets=rel_buckets, per_layer_bias=per_layer)


# --- Adafactor's state -------------------------------------------------------------------------


def _slot_rows(row: TensorRow, shape: tuple[int, ...], state) -> list[tuple[TensorRow, tuple]]:
  """Returns rows from {path: array} of our AdafactorState to T5X's slots, and the slots' shapes.

  row, shape: of the parameter in T5X. T5X and optax both keep the smaller axis of a matrix in
  v_row, of equal axes the first. Scanned kernels follow standard_logical_factor_rules instead:
  v_row keeps 'embed' (D) and v_col the rest, each for every layer. So their vectors are ours, but
  the names may be swapped. [google-research/t5x, adafactor.py]
  """
  def slot_row(ours, theirs, op):
    return TensorRow(f'{ours}/{row.path}', f'{row.name}/{theirs}', row.layer, op)

  if not _is_factored(state, row):
    return [(slot_row('v', 'v', row.op), shape)]
  our_shape = row.op.forward(np.broadcast_to(np.float32(0), shape)).shape
  ndim, stacked = len(shape), _is_stacked(row)
  ops, shapes = dict.fromkeys(FACTORS, COPY), dict.fromkeys(FACTORS)
  row_axis = 0                    # that T5X's v_row keeps of our matrix
  if stacked and ndim > 2:
    embed = ndim - 1 if re.search(r'/(o|wo)/kernel', row.path) else 0
    row_axis = 1 if embed else 0
    others = tuple(i for i in range(ndim) if i not in (1, embed))
    for factor, axes in zip(FACTORS, ((embed,), others)):
      shapes[factor] = tuple(shape[i] for i in sorted((1, *axes)))
      ops[factor] = _joined_axes(tuple(shape[i] for i in axes), (-1,), 1 if 0 in axes else 0)
  elif ndim == 2:
    smaller = _smaller_axis(shape)
    row_axis = 1 - smaller if row.op is TRANSPOSE else smaller
    shapes = dict(zip(FACTORS, ((shape[smaller],), (shape[1 - smaller],))))
  swapped = _smaller_axis(our_shape[1:] if stacked else our_shape) != row_axis
  return [(slot_row(ours, theirs, ops[theirs]), shapes[theirs])
          for ours, theirs in zip(FACTORS, reversed(FACTORS) if swapped else FACTORS)]


def _smaller_axis(shape) -> int:
  """Returns the axis that v_row keeps of a matrix, 0 for any other array."""
  return int(np.argsort(shape)[-2]) if len(shape) == 2 else 0


def _is_stacked(row) -> bool:
  return row.layer is None and '/layers/' in row.path


def _is_shared_table(row) -> bool:
  return row.path.endswith('relpos/table') and not _is_stacked(row)


def _is_factored(state, row) -> bool:
  """Returns whether Adafactor keeps v_row and v_col of our array; v is then one unused number."""
  inner = 1 if '/layers/' in row.path else 0
  v, v_row = (state[f'{key}/{row.path}'].shape[inner:] for key in ('v', 'v_row'))
  return v == (1,) and v_row != (1,)


def read_optimizer(reader: T5x, c, scanned: bool, abstract):
  """Reads Adafactor's state as float32 numpy arrays in an AdafactorState like `abstract` (shapes).

  count is the checkpoint's step. UsageError if the slots are missing, come from another optimizer,
  have momentum, or are factored where ours are not (see optim.min_factored).
  """
  slots, step, what = reader.slots(), reader.step, "the checkpoint's optimizer state"
  slot_shapes, params = slots.shapes(), reader.shapes()
  if step is None or not slot_shapes:
    raise UsageError(f'{what} is missing (a checkpoint of parameters only); start a fresh one')
  state = {path: np.zeros(x.shape, np.float32) for path, x in trees.flatten(abstract).items()}

  def read(name, shape):
    if slot_shapes.get(name) != shape:
      raise UsageError(f'{what}: {name} has shape {slot_shapes.get(name, "nothing")}, not {shape}: '
                       'it is not of Adafactor, or other matrices are factored than ours. Take the '
                       'parameters only, or set optim.min_factored (T5X: 128)')
    value = slots.read(name)
    if not np.isfinite(value.astype(np.float32)).all():
      raise UsageError(f'{what}: {name} is not finite (NaN or infinity)')
    return value

  rows = tensor_rows(c, scanned)
  for row in rows:
    if row.name not in params or f'v/{row.path}' not in state:
      raise UsageError(f'{what}: {row.name} or our {row.path} is missing; the parameters do not '
                       'fit this model')
    if scanned and _is_shared_table(row):
      raise UsageError(f'{what}: {row.name} has one table per layer, our model one for all layers: '
                       'take the parameters only')
    for slot, shape in _slot_rows(row, params[row.name], state):
      slot.layer_of(state)[...] = slot.op.forward(read(slot.name, shape))
    momentum = slot_shapes.get(f'{row.name}/m')
    if momentum not in (None, (1,)) and slots.read(f'{row.name}/m').any():
      raise UsageError(f'{what} has momentum ({row.name}/m of shape {momentum}), ours has none: '
                       'take the parameters only')

  known = {f'{row.name}/{slot}' for row in rows for slot in SLOTS}
  if extra := sorted(set(slot_shapes) - known):
    raise UsageError(f'{what} has {", ".join(extra[:4])} ({len(extra)} in all), which are not '
                     f"Adafactor's slots of the {len(rows)} parameters")
  state['count'] = np.asarray(step, np.int32)
  return trees.unflatten(state, like=abstract)


def _written_slots(rows, params, state, scanned) -> dict[str, TensorRow | None]:
  """Returns {T5X's name: row from our state, or None for one unused zero} for all slots."""
  slots = {}
  for row in rows:
    if scanned and _is_shared_table(row):
      raise UsageError('the optimizer state of a table of relative positions that all layers share '
                       'does not fit into a scanned T5X checkpoint: write the parameters only')
    shape = np.shape(params[row.path])[0 if row.layer is None else 1:]
    t5x_shape = row.op.inverse(np.broadcast_to(np.float32(0), shape)).shape
    if (_is_stacked(row) and len(t5x_shape) > 2 and not row.path.endswith('relpos/table')
        and not _is_factored(state, row)):
      raise UsageError(f'{row.path} {shape} is not factored in our optimizer state, but in every '
                       'scanned T5X checkpoint: write the parameters only')
    slots |= dict.fromkeys(f'{row.name}/{slot}' for slot in SLOTS)
    slots |= {slot.name: slot for slot, _ in _slot_rows(row, t5x_shape, state)}
  return slots


# --- writing -----------------------------------------------------------------------------------


def write(folder, c, params, step: int, scanned: bool = False, form: str = 't5x',
          optimizer=None) -> None:
  """Writes a checkpoint that T5X reads into the new folder `folder`, in float32.

  params: jax or numpy arrays. form: 't5x' is what T5X's Checkpointer.save writes and its restore
  and load_t5x_checkpoint read; 'orbax' is what OrbaxCheckpointManagerInterface.save writes. As
  there, parameters and Adafactor's v are zarr directories, the other slots and the step are in the
  msgpack file (derive_logical_axes in T5X's adafactor.py gives those no axes). The caller names the
  folder checkpoint_<step>.

  optimizer: our AdafactorState, or None, which writes no 'param_states'. T5X's inference and
  evaluation do not need them, and its trainer fills them in when it has a fallback_init_rng. Slots
  of zeros would be read silently, and the first updates would be far too large.
  """
  if form not in FORMS:
    raise UsageError(f'form {form!r} of a T5X checkpoint is unknown; known: {", ".join(FORMS)}')
  folder, arrays, rows = Path(folder), trees.flatten(params), tensor_rows(c, scanned)
  tensor_map.check(rows, {row.name for row in rows}, arrays, what='the T5X checkpoint')
  state = trees.flatten(optimizer)
  slots = _written_slots(rows, arrays, state, scanned) if state else {}
  if form == 'orbax':
    folder = folder / 'state'
  folder.mkdir(parents=True, exist_ok=True)
  tree = {}

  def put(name, array, inline=False):
    array = np.ascontiguousarray(array, np.float32).reshape(np.shape(array))
    if not inline:
      spec = t5x_files.write_zarr(folder, name, array)
      array = spec if form == 't5x' else t5x_files.PLACEHOLDER + name.replace('/', '.')
    tree[name] = array

  for name, array in tensor_map.write(rows, params):
    put(f'{t5x_files.TARGET}{name}', array)
  for name, row in slots.items():
    value = np.zeros(1) if row is None else row.op.inverse(np.asarray(row.layer_of(state)))
    inline = not name.endswith('/v') or value.shape == (1,)
    put(f'{t5x_files.SLOTS}{name}', value, inline)
  tree['state/step'] = np.asarray(step, np.int32)
  nested = trees.unflatten(tree)
  whole = nested if form == 'orbax' else {'version': 3, 'optimizer': nested}
  (folder / 'checkpoint').write_bytes(serialization.msgpack_serialize(whole))
