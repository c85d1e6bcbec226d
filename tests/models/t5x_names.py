"""T5X's parameter names <-> ours, for golden vectors that are defined over T5X's names."""

import numpy as np

ATTENTION = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
NORMS = {'pre_attention_layer_norm': 'attn_norm', 'pre_self_attention_layer_norm': 'attn_norm',
         'pre_cross_attention_layer_norm': 'cross_norm', 'pre_mlp_layer_norm': 'mlp_norm'}


def t5x_shapes(c):
  """'/'-joined T5X name -> (shape, our path, layer or None, transposed)."""
  D, A, F, N, V = c.d_model, c.n_heads * c.d_head, c.d_ff, c.n_heads, c.vocab_size
  rows = {'token_embedder/embedding': ((V, D), 'embedding', None, False)}
  if not c.tied:
    rows['decoder/logits_dense/kernel'] = ((D, V), 'logits/kernel', None, False)
  for stack, layers in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    rows[f'{stack}/{stack}_norm/scale'] = ((D,), f'{stack}/norm/scale', None, False)
    rows[f'{stack}/relpos_bias/rel_embedding'] = ((N, 32), f'{stack}/relpos/table', None, True)
    blocks = ({'attention': 'attn'} if stack == 'encoder' else
              {'self_attention': 'attn', 'encoder_decoder_attention': 'cross'})
    norms = (['pre_attention_layer_norm'] if stack == 'encoder' else
             ['pre_self_attention_layer_norm', 'pre_cross_attention_layer_norm'])
    for i in range(layers):
      at, ours = f'{stack}/layers_{i}', f'{stack}/layers'
      for theirs, name in blocks.items():
        for proj, short in ATTENTION.items():
          shape = (A, D) if proj == 'out' else (D, A)
          rows[f'{at}/{theirs}/{proj}/kernel'] = (shape, f'{ours}/{name}/{short}/kernel', i, False)
      for norm in norms + ['pre_mlp_layer_norm']:
        rows[f'{at}/{norm}/scale'] = ((D,), f'{ours}/{NORMS[norm]}/scale', i, False)
      names = ['wi'] if len(c.acts) == 1 else [f'wi_{j}' for j in range(len(c.acts))]
      for j, wi in enumerate(names):
        rows[f'{at}/mlp/{wi}/kernel'] = ((D, F), f'{ours}/mlp/wi_{j}/kernel', i, False)
      rows[f'{at}/mlp/wo/kernel'] = ((F, D), f'{ours}/mlp/wo/kernel', i, False)
  return rows


def golden_params(c):
  """Our parameter tree filled by the rule of the golden vectors: the i-th sorted T5X name holds
  sin(0.37 n + i), scaled by its kind."""
  rows, flat = t5x_shapes(c), {}
  for i, name in enumerate(sorted(rows)):
    shape, path, layer, transposed = rows[name]
    v = np.sin(np.arange(np.prod(shape)) * 0.37 + i).reshape(shape)
    v = 1 + 0.1 * v if name.endswith('/scale') else v if 'embedding' in name else 0.3 * v
    v = (v.T if transposed else v).astype(np.float32)
    if layer is None:
      flat[path] = v
    else:
      flat.setdefault(path, {})[layer] = v
  tree = {}
  for path, v in flat.items():
    *parents, leaf = path.split('/')
    node = tree
    for p in parents:
      node = node.setdefault(p, {})
    node[leaf] = np.stack([v[i] for i in range(len(v))]) if isinstance(v, dict) else v
  return tree
