"""colab/quickstart.ipynb runs from top to bottom at :tiny and defines nothing itself."""

import ast
import json
import pathlib

from ipykernel.kernelspec import write_kernel_spec
from IPython.core.inputtransformer2 import TransformerManager
import nbclient
import nbformat
import pytest

COLAB = pathlib.Path(__file__).parents[1] / 'colab'


@pytest.fixture(scope='module')
def notebook():
  return nbformat.read(COLAB / 'quickstart.ipynb', as_version=4)


def test_it_is_valid_and_stores_no_output(notebook):
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      assert cell.execution_count is None and not cell.outputs
      code = ast.parse(TransformerManager().transform_cell(cell.source))
      assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))
                     for node in ast.walk(code)), cell.source


def test_it_trains_plots_and_translates(notebook, tmp_path, monkeypatch):
  # A kernel of this Python, whatever kernels are installed.
  write_kernel_spec(tmp_path / 'kernels' / 'python3')
  monkeypatch.setenv('JUPYTER_PATH', str(tmp_path))
  monkeypatch.setenv('T5LAB_NOTEBOOK_ARG', ':tiny')
  monkeypatch.setenv('T5LAB_NOTEBOOK_WORKDIR', str(tmp_path / 'run'))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(COLAB.parent / '.cache' / 'jax'))
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
  monkeypatch.delenv('XLA_FLAGS', raising=False)       # a single device, as for a user
  monkeypatch.delenv('MPLBACKEND', raising=False)      # ipykernel's own: figures inline

  notebook.cells.append(nbformat.v4.new_code_cell(
      'print(json.dumps([result.scores, lab.weights, lab.generate(texts)]))'))
  # Raises CellExecutionError at the first cell that fails.
  nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3',
                          resources={'metadata': {'path': str(COLAB)}}).execute()

  outputs = [out for cell in notebook.cells for out in cell.get('outputs', ())]
  assert len([out for out in outputs if 'image/png' in out.get('data', ())]) == 1
  assert any('copy of the source' in out.get('data', {}).get('text/plain', '') for out in outputs)
  scores, weights, translations = json.loads(notebook.cells[-1].outputs[-1].text)
  assert {'ha_ende/raw/bleu', 'ha_ende/ema/bleu', 'ha_ende/ema/chrf'} <= scores.keys()
  assert 5 < scores['ha_ende/ema/loss'] < 20            # ten steps from about ln 2048 = 7.6
  assert weights == 'ema'
  assert len(translations) == 3 and all(isinstance(text, str) for text in translations)
  rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').open()]
  assert [row['step'] for row in rows if 'eval' not in row] == list(range(1, 11))
